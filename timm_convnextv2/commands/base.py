"""What commands share: the parser of a config class, and how a command ends."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..config import add_options, build, words_given
from ..console import PROGRAM, CommandParser, ended_by_signals, refused, say
from ..runs.errors import worker_died

C = TypeVar("C")


def parser_of(name: str, text: str | None, config: type) -> CommandParser:
    """The parser of a command; `text` is its page of help, with line breaks as they are."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"{PROGRAM} {name}", description=text, formatter_class=layout)
    add_options(parser, config)
    return parser


def run(
    name: str, text: str | None, config: type, act: Callable[[Any], int | None], words: Sequence[str] | None
) -> int:
    """Calls `act` with the config from `words` (None: those of the process), and returns its exit status (None: 0).

    A user error is one message and exit status 2; Ctrl-C is exit status 130, SIGTERM 143, SIGHUP 129.
    """
    try:
        given = words_given(parser_of(name, text, config), sys.argv[1:] if words is None else words)
        with ended_by_signals():
            return act(build(config, given)) or 0
    except (ValueError, RuntimeError, OSError) as e:
        return refused(name, RuntimeError(worker_died(e)) if worker_died(e) else e)
    except KeyboardInterrupt:
        say("Stopped. Files that were not complete were not written.", error=True)
        return 130


def own_options(name: str, text: str | None, config: type[C], words: Sequence[str] | None) -> tuple[C, list[str]]:
    """The config of a command's own options, and the other words, which are for another program."""
    own, rest = parser_of(name, text, config).parse_known_args(sys.argv[1:] if words is None else words)
    return build(config, vars(own)), rest
