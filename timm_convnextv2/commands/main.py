"""The console command `timm-convnextv2 COMMAND`, the same as `python -m timm_convnextv2 COMMAND`."""

import importlib
import sys
from typing import NamedTuple

from ..console import PROGRAM, closest, say
from ..version import __version__


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        module: Has `main(argv) -> int`; imported when the command is asked for.
        summary: One line for the help.
    """

    module: str
    summary: str


COMMANDS = {
    "pretrain": Command("timm_convnextv2.commands.pretrain", "pretrain a backbone on unlabelled images with FCMAE"),
    "finetune": Command("timm_convnextv2.commands.finetune", "finetune a backbone with timm's train.py and a recipe"),
    "validate": Command("timm_convnextv2.commands.validate", "measure a finetuned model with timm's validate.py"),
    "predict": Command("timm_convnextv2.commands.predict", "classify images with timm's inference.py"),
    "report": Command("timm_convnextv2.commands.report", "show runs on one page"),
    "publish": Command("timm_convnextv2.commands.publish", "publish weights and a model card on the Hugging Face Hub"),
    "compare": Command(
        "timm_convnextv2.commands.compare", "finetune from scratch, from your encoder and from named weights"
    ),
    "embed": Command("timm_convnextv2.commands.embed", "write one row of features for each image"),
    "evaluate": Command("timm_convnextv2.commands.evaluate", "compare frozen features: kNN, ridge, linear probe, rank"),
    "collapse": Command("timm_convnextv2.commands.collapse", "compare how alike the channels of models are"),
    "stats": Command(
        "timm_convnextv2.commands.stats", "measure the pixels of a data set: mean, std, percentiles, histogram"
    ),
    "check": Command(
        "timm_convnextv2.commands.check", "look for files of a folder that are unreadable, flat, double or odd"
    ),
    "detect": Command("timm_convnextv2.commands.detect", "train, measure and run a detector of objects on a backbone"),
    "segment": Command(
        "timm_convnextv2.commands.segment", "train, measure and run a segmenter of pixels on a backbone"
    ),
}


def usage() -> str:
    """The text of `--help`."""
    rows = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [OPTION ...]\n\n"
        "ConvNeXt V2 for timm, with masked pretraining that is really sparse.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help  this text; of one command: COMMAND --help\n"
        "  --version   the version\n\n"
        "On several GPUs: torchrun --nproc-per-node N -m timm_convnextv2 COMMAND [OPTION ...]"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command; returns its exit status.

    Args:
        argv: The words after the program's name; those of the process if None.
    """
    words = sys.argv[1:] if argv is None else argv
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
    return importlib.import_module(COMMANDS[name].module).main(options)
