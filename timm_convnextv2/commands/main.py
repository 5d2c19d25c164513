"""`timm-convnextv2 COMMAND`, the same as `python -m timm_convnextv2 COMMAND`."""

import importlib
import sys

from ..console import PROGRAM, closest, say, unbroken_output
from ..version import __version__

# Each name is a module beside this file with `main(argv) -> int`, imported when the command is asked for.
COMMANDS = {
    "pretrain": "pretrain a backbone on unlabelled images with FCMAE",
    "finetune": "finetune a backbone with timm's train.py and a recipe",
    "validate": "measure a finetuned model with timm's validate.py",
    "predict": "classify images with timm's inference.py",
    "report": "show runs on one page",
    "publish": "publish weights and a model card on the Hugging Face Hub",
    "compare": "finetune from scratch, from your encoder and from named weights",
    "embed": "write one row of features per image",
    "evaluate": "compare frozen features: kNN, ridge, linear probe, rank",
    "collapse": "compare how similar the channels of models are",
    "stats": "measure the pixels of a data set: mean, std, percentiles, histogram",
    "check": "find corrupt, blank, duplicate and unusual files in a folder",
    "detect": "train, evaluate and run an object detector on a backbone",
    "segment": "train, evaluate and run a semantic segmenter on a backbone",
    "demo": "write a small labelled image folder to try things out",
}


def usage() -> str:
    """The text of `--help`."""
    rows = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [OPTION ...]\n\n"
        "ConvNeXt V2 for timm, with masked pretraining that is really sparse.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help  show this text; COMMAND --help shows the options of a command\n"
        "  --version   show the version\n\n"
        "On several GPUs: torchrun --nproc-per-node N -m timm_convnextv2 COMMAND [OPTION ...]"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        argv: The words after the program's name; by default those of the process.
    """
    with unbroken_output(BrokenPipeError):  # as behind `| head`
        return _main(sys.argv[1:] if argv is None else argv)


def _main(words: list[str]) -> int:
    if not words:
        say(usage(), error=True)
        return 2
    name, options = words[0], words[1:]
    if name in ("-h", "--help"):
        say(usage())
        return 0
    if name == "--version":
        say(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        say(
            f"{PROGRAM}: error: no command '{name}'.{closest(name, COMMANDS)} Expected one of {', '.join(COMMANDS)}; "
            f"see {PROGRAM} --help.",
            error=True,
        )
        return 2
    from .. import registry  # noqa: F401  the package itself does not register the models for a command

    return importlib.import_module(f".{name}", __package__).main(options)
