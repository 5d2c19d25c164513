"""How a run ends: messages, data workers, errors."""

import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import timm
import torch

import timm_convnextv2

from ..files import system_reason
from .world import SIGNALS


def end_workers(workers: set[BaseProcess]) -> None:
    """Ends data workers, for which Python would wait for ever: they ignore SIGTERM."""
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a fault, and raises it
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    signal.signal(signal.SIGCHLD, handler)


VERSIONS = f"timm_convnextv2 {timm_convnextv2.__version__}, timm {timm.__version__}, torch {torch.__version__}"


class NotFiniteError(FloatingPointError):
    """A loss is not finite.

    Attributes:
        number: Updates of the run before that one.
        loss: Its value.
    """

    def __init__(self, number: int, loss: float) -> None:
        super().__init__(f"The loss is {loss}.")
        self.number, self.loss = number, loss


def leave_signals_to_parent(_worker: int) -> None:
    """Data workers live on while the training process finishes its update."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def attempt(
    what: str,
    act: Callable[[], Any],
    note: Callable[[str], Any],
    errors: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> str:
    """Does something that a run can do without; where the disk refuses, that is a warning.

    Args:
        what: Its name.
        act: Does it.
        note: Prints a line.
        errors: What is a warning.

    Returns:
        The warning, '' where all went well.
    """
    try:
        act()
    except errors as e:
        reason = system_reason(e) if isinstance(e, OSError) else str(e)
        warning = f"Warning: {what} failed ({reason}). Training continues without it."
        note(warning)
        return warning
    return ""
