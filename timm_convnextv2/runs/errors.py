"""The errors that end a run, and the failures that do not."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..files import system_reason


class NotFiniteError(FloatingPointError):
    """The loss of the update after `number` others of the run is not finite."""

    def __init__(self, number: int, loss: float) -> None:
        super().__init__(f"The loss is {loss}.")
        self.number, self.loss = number, loss


class NotSavedError(Exception):
    """A run cannot save its state any more: the reason, the last whole checkpoint, and the remedy."""


class DataError(ValueError):
    """The run's data became unreadable, and no other image can replace it."""


def reading(batches: Iterable) -> Iterator[Any]:
    """Yields the batches; a `ValueError` of the data becomes a `DataError` with a message of one line."""
    try:
        yield from batches
    except ValueError as e:
        raise DataError(original_message(e)) from e


def original_message(error: Exception) -> str:
    """The message of an error, without the traceback that PyTorch puts before it when a data worker raised it."""
    return re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", str(error), flags=re.M)[-1].strip()


def worker_died(error: BaseException | None) -> str:
    """A message about a dead data worker, which PyTorch raises anywhere in the main thread; '' for other causes."""
    found = ""
    while error is not None:
        if re.search(r"DataLoader worker .*(killed by|exited unexpectedly)", str(error)):
            found = str(error)
        error = error.__cause__ or error.__context__
    if not found:
        return ""
    return (
        f"{found.splitlines()[0].rstrip(' .')}. Unless somebody killed it, the machine has too little memory for it "
        "(lower --workers) or too little shared memory (/dev/shm)."
    )


def attempt(what: str, act: Callable[[], Any], note: Callable[[str], Any], errors: Any = OSError) -> str:
    """Does something optional: `errors` become a warning, which `note` prints and which is returned ('' if none)."""
    try:
        act()
    except errors as e:
        reason = system_reason(e) if isinstance(e, OSError) else str(e)
        warning = f"Warning: {what} failed ({reason}). Training continues without it."
        note(warning)
        return warning
    return ""
