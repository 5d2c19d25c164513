"""What commands share: their parser and help, made from `table`, and how a command ends."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..config import add_options, build, check_values, entries, parsed, words_given
from ..console import PROGRAM, CommandParser, closest, ended_by_signals, refused, say
from .table import COMMANDS, GROUPS, actions


class _Help(argparse.Action):
    """--help shows the main options of the command, --help-all every one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, main = self.const
        say(parser_of(name, COMMANDS[name].main.split() if main else None).format_help().rstrip())
        parser.exit()


def parser_of(name: str, names: Sequence[str] | None = None) -> CommandParser:
    """The parser of a command with the options `names`, by default with all of them."""
    command = COMMANDS[name]
    words = " ".join(_usage(entry) for entry in entries(command.config).values() if _usage(entry))
    examples = "\n".join(f"    {PROGRAM} {name} {line}" for line in command.example.splitlines())
    text = "\n\n".join(filter(None, (f"{command.summary[0].upper()}{command.summary[1:]}.", command.text)))
    parser = CommandParser(
        prog=f"{PROGRAM} {name}",
        usage=" ".join(filter(None, (f"{PROGRAM} {name}", words, "[OPTION ...]"))),
        description=f"{text}\n\nexample:\n{examples}",
        epilog=f"All options: {PROGRAM} {name} --help-all" if names else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_Help, nargs=0, const=(name, True), default=argparse.SUPPRESS,
        help="show the options that matter most",
    )  # fmt: skip
    parser.add_argument(
        "--help-all", action=_Help, nargs=0, const=(name, False), default=argparse.SUPPRESS, help="show all options"
    )
    add_options(parser, command.config, names)
    return parser


def _usage(entry: Any) -> str:
    """How positional words are shown in the usage line."""
    if entry.option.words:
        return f"[{entry.option.words} ...]"
    if not entry.option.positional:
        return ""
    return f"{entry.option.metavar} [...]" if entry.kind[1] == "many" else entry.option.metavar


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the first words name, as in `table`, and the other words; a ValueError if there is none.

    The help of `detect` and `segment` ends the program.
    """
    name, rest = words[0], list(words[1:])
    if name in GROUPS:
        known = actions(name)
        if rest[:1] and rest[0] in ("-h", "--help", "--help-all"):
            say(_group_help(name))
            raise SystemExit(0)
        if not rest or rest[0] not in known:
            got = f"'{rest[0]}'.{closest(rest[0], known)} E" if rest else "nothing. E"
            raise ValueError(f"got {got}xpected {', '.join(known[:-1])} or {known[-1]} after '{name}'.")
        return f"{name} {rest[0]}", rest[1:]
    return name, rest


def _group_help(name: str) -> str:
    rows = "\n".join(f"  {action:<10}{COMMANDS[f'{name} {action}'].summary}" for action in actions(name))
    summary = f"{GROUPS[name][0].upper()}{GROUPS[name][1:]}."
    more = f"{PROGRAM} {name} train --help shows the options of train, and so on."
    return f"usage: {PROGRAM} {name} {'|'.join(actions(name))} [OPTION ...]\n\n{summary}\n\n{rows}\n\n{more}"


def own_options(name: str, words: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    """The values that words set (None: those of the process), and words that are for a script of timm."""
    parser, words = parser_of(name), sys.argv[1:] if words is None else words
    if COMMANDS[name].passes_on:
        found, rest = parser.parse_known_args(list(words))
        given = parsed(found)
    else:
        given, rest = words_given(parser, words), []
    check_values(COMMANDS[name].config, given)
    return given, rest


def run(name: str, act: Callable[[Any], int | None], words: Sequence[str] | None) -> int:
    """Calls `act` with the config from `words` (None: those of the process); see `ended`."""

    def start() -> int | None:
        given, _ = own_options(name, words)
        config = build(COMMANDS[name].config, given)
        if given.get("amp"):
            from ..runs.device import fit_amp  # imports torch, which a mistake in options does not need

            config = fit_amp(config, given)
        return act(config)

    return ended(name, start)


def ended(name: str, act: Callable[[], int | None]) -> int:
    """Calls `act`, and returns its exit status (None: 0).

    A user error is one message and exit status 2; Ctrl-C is exit status 130, SIGTERM 143, SIGHUP 129.
    """
    try:
        with ended_by_signals():
            return act() or 0
    except ValueError as e:
        return refused(name, e)
    except (RuntimeError, OSError) as e:
        from ..runs.errors import worker_died  # imports torch, which a mistake in options does not need

        return refused(name, worker_died(e) or e)
    except KeyboardInterrupt:
        say("Stopped. Files that were not complete were not written.", error=True)
        return 130
