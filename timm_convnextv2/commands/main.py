"""`timm-convnextv2 COMMAND`, the same as `python -m timm_convnextv2 COMMAND`."""

import importlib
import sys

from ..config import add_options
from ..console import PROGRAM, CommandParser, closest, refused, say, unbroken_output
from ..version import __version__
from .base import command_of, own_options
from .table import COMMANDS, GROUPS

NAMES = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
SHELLS = ("bash", "zsh", "fish")


def usage() -> str:
    """The text of `--help`."""
    rows = "\n".join(f"  {name:<10}{GROUPS.get(name) or COMMANDS[name].summary}" for name in NAMES)
    return (
        f"usage: {PROGRAM} COMMAND [OPTION ...]\n\n"
        "ConvNeXt V2 for timm, with masked pretraining that is really sparse.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help                show this text; COMMAND --help shows the options of a command\n"
        "  --version                 show the version\n"
        "  --print-completion SHELL  print the completion of words for bash, zsh or fish\n\n"
        "On several GPUs: torchrun --nproc-per-node N -m timm_convnextv2 COMMAND [OPTION ...]"
    )


@unbroken_output(BrokenPipeError)  # as behind `| head`
def main(argv: list[str] | None = None) -> int:
    """Runs a command, by default that of this process, from the words after the program's name; returns its status."""
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
    if name == "--print-completion":
        return _print_completion(options)
    if name not in NAMES:
        say(
            f"{PROGRAM}: error: no command '{name}'.{closest(name, NAMES)} Expected one of {', '.join(NAMES)}; "
            f"see {PROGRAM} --help.",
            error=True,
        )
        return 2
    try:  # mistakes are told before the seconds that torch takes to import
        command, rest = command_of(words)
        own_options(command, rest)
    except ValueError as e:
        return refused(name, e)
    from .. import registry  # noqa: F401  the package itself does not register the models for a command

    return importlib.import_module(f".{name}", __package__).main(options)


def _print_completion(words: list[str]) -> int:
    """Prints the script for a shell, which completes without calling Python."""
    import shtab

    if len(words) != 1 or words[0] not in SHELLS:
        say(f"{PROGRAM}: error: --print-completion takes {', '.join(SHELLS)}, got '{' '.join(words)}'.", error=True)
        return 2
    parser = CommandParser(prog=PROGRAM)
    commands = parser.add_subparsers()
    groups = {}
    for name, command in COMMANDS.items():
        group, _, action = name.partition(" ")
        if action and group not in groups:
            groups[group] = commands.add_parser(group, help=GROUPS[group]).add_subparsers()
        own = (groups[group] if action else commands).add_parser(action or name, help=command.summary)
        add_options(own, command.config)
        own.add_argument("--help-all", action="store_true")
        for option in own._actions:
            if option.metavar in ("FILE", "PATH"):
                vars(option)["complete"] = shtab.FILE
            elif option.metavar in ("DIR", "FOLDER", "IMAGES", "LABELLED", "RUN", "PLACE"):
                vars(option)["complete"] = shtab.DIRECTORY
    say(shtab.complete(parser, words[0]))
    return 0
