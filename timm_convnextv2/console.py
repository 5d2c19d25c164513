"""Shared by all commands: the parser, messages, and the words with which the user calls a command."""

import argparse
import contextlib
import difflib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = "timm-convnextv2"
PACKAGE = "timm_convnextv2"


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` without abbreviations, whose errors are a `ValueError` like all other user errors."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        # argparse reads -0.017 as a number but -1.7e-2 as an option
        self._negative_number_matcher = re.compile(r"-(\d+(_\d+)*\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if unknown := [word for word in words[: words.index("--") if "--" in words else None] if self._unknown(word)]:
            near = closest(unknown[0].partition("=")[0], self._option_string_actions, 0.7)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{near}")
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}.")
        return found

    def _unknown(self, word: str) -> bool:
        """Whether a word is an option that the parser does not have."""
        known = self._option_string_actions
        if word.partition("=")[0] in known or self._parse_optional(word) is None:  # pyright: ignore[reportAttributeAccessIssue]
            return False
        return word[:2] == "--" or word[:2] not in known  # -b16 holds a value

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._words_first(sys.argv[1:] if args is None else args), namespace)

    def _words_first(self, words: Sequence[str]) -> list[str]:
        """The words of no option, then the options: argparse finds words only if they stand together.

        A word that an option of several values cannot take is none of its values: `--show-bands 4 3 2 IMAGES`.
        """
        first, rest, i = [], [], 0
        while i < len(words):
            word = words[i]
            i += 1
            if word == "--":
                return [*rest, "--", *first, *words[i:]]
            if self._parse_optional(word) is None:  # pyright: ignore[reportAttributeAccessIssue]
                first.append(word)
                continue
            rest.append(word)
            action = self._option_string_actions.get(word)
            if action is None and (word[:2] != "--" or "=" in word) and word[:2] in self._option_string_actions:
                continue  # -b16: its value is in the word
            most = {None: 1, "?": 1}.get(action.nargs, action.nargs) if action else "*"
            taken = 0
            while i < len(words) and (not isinstance(most, int) or taken < most):
                if self._parse_optional(words[i]) is not None:  # pyright: ignore[reportAttributeAccessIssue]
                    break
                if taken and action and not self._takes(action, words[i]):
                    break
                rest.append(words[i])
                i, taken = i + 1, taken + 1
        return [*first, *rest]

    def _takes(self, action: argparse.Action, word: str) -> bool:
        """Whether an option can have a word as another of its values."""
        try:
            self._get_value(action, word)  # pyright: ignore[reportAttributeAccessIssue]
        except argparse.ArgumentError:
            return False
        return True


def say(text: str, error: bool = False) -> None:
    """Prints on rank 0 only; errors on the first process of each node, because nodes may have folders of their own."""
    local = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # as timm reads them
    of_all = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    rank = next((os.environ[name] for name in (local if error else of_all) if name in os.environ), "0")
    if int(rank) == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


class _Unbroken:
    """A stream that drops text while it cannot be written, and escapes characters that it cannot encode."""

    def __init__(self, stream: Any, errors: type[OSError]) -> None:
        self.stream, self.errors = stream, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(self.errors):
            try:
                self.stream.write(text)
            except UnicodeEncodeError as e:  # names of files may be any bytes
                self.stream.write(text.encode(e.encoding, "backslashreplace").decode(e.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(self.errors):
            self.stream.flush()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP exit with status 128 + number, after all `finally` blocks; nohup stays nohup."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unbroken_output(errors: type[OSError]) -> Iterator[None]:
    """Within it, `errors` of stdout and stderr drop text instead of ending the program.

    `BrokenPipeError`: nobody reads any more. `OSError`: also a full disk behind a log, or a terminal that is gone.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Unbroken(stream, errors) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except errors:  # what is left in the buffer would raise again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refused(command: str, error: Exception | str) -> int:
    """Prints a user error as one message and returns exit status 2."""
    say(f"{PROGRAM} {command}: error: {error}", error=True)
    return 2


class Faults:
    """The mistakes that independent checks find, refused together: `with faults.next(): check()`, `faults.refuse()`."""

    def __init__(self) -> None:
        self.found: list[ValueError] = []

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Within it, a `ValueError` is kept for later."""
        try:
            yield
        except ValueError as e:
            self.found.append(e)

    def refuse(self) -> None:
        """Raises the only mistake as it was, or several in one message, a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ValueError("\n  - ".join([f"{len(self.found)} mistakes:", *map(str, self.found)]))


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean ...?' if known words begin so, or one is similar; else ''."""
    known = list(known)
    begin = [name for name in known if name.startswith(word)] if len(word) > 3 else []
    near = [word] * (word in known) or begin[:3] or difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    shown = "' or '".join(near)
    return f" Did you mean '{shown}'?" if near else ""


def check_same_classes(
    here: Sequence[str], there: Sequence[str], where: tuple[object, object], *, remedy: str, ordered: bool = True
) -> None:
    """Refuses class names that differ between two data sets, or between data and a model, and names some.

    `where` describes both for the message, which ends with `remedy`; `ordered`: class `i` has the same name in both.
    """
    if list(here) == list(there) or (not ordered and set(here) == set(there)):
        return
    parts = []
    for place, one, other in ((where[0], here, there), (where[1], there, here)):
        if only := [name for name in one if name not in set(other)]:
            shown = ", ".join(only[:5]) + (", ..." if len(only) > 5 else "")
            parts.append(f"only {place} has {shown} ({len(only)})")
    moved = [i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
    if not parts:
        first = ", ".join(f"{i} ('{here[i]}' and '{there[i]}')" for i in moved[:3])
        parts = [f"their order differs at {len(moved)} indices: {first}"]
    raise ValueError(
        f"The classes of {where[0]} ({len(here)}) are not those of {where[1]} ({len(there)}): {'; '.join(parts)}. "
        f"{remedy}"
    )


def invocation(command: str, distributed: bool = False) -> list[str]:
    """The words that start a command as the user did: a clone's script, the console command, or the module.

    `distributed` includes torchrun if it started this process.
    """
    script = Path(sys.argv[0])
    if script.parent.name == "train_scripts" and (script.parent / f"{command}.py").is_file():
        words = [str(script.with_name(f"{command}.py"))]
    else:
        words = ["-m", PACKAGE, command]
    if distributed and "LOCAL_WORLD_SIZE" in os.environ:
        return ["torchrun", *_nodes(), "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *words]
    if words[0] == "-m" and shutil.which(PROGRAM):
        return [PROGRAM, command]
    if script.name == PROGRAM:  # called by its path because the environment is not activated
        return [str(script), command]
    return [interpreter(), *words]


def interpreter() -> str:
    """'python' if that is this interpreter, else its path (the environment may not be activated)."""
    here, found = os.path.abspath(sys.executable), shutil.which("python")
    return "python" if found and os.path.abspath(found) == here else here


def _nodes() -> list[str]:
    """torchrun's options for several nodes; none for one node."""
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if nodes == "1":
        return []
    # torchrun passes on the first node's name but not the port of the rendezvous; 29500 is its default
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HEAD')}:29500"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", endpoint]


def count(n: int, noun: str) -> str:
    """'1 process', '2 processes', '3 steps'."""
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """'40 s', '12 min' or '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
