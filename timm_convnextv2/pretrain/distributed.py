"""What a process knows of the others: its device and rank, who speaks, and when all of them stop."""

import argparse
import signal
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

__all__ = ["World"]


class World:
    """The processes of a run; without torchrun, this one alone.

    Args:
        device: Name of the device, such as 'cuda' or 'cpu'; torchrun's local rank is added to it.

    Attributes:
        device: Where this process trains.
        rank: Its number.
        size: Number of processes.
        primary: Whether it is the first, which speaks and writes.
        stop: Name of the signal that asked to stop, else ''.
        training: Whether settings and data have been checked.

    Raises:
        ValueError: The device cannot be used.
    """

    def __init__(self, device: str) -> None:
        try:
            found = argparse.Namespace(device=device)
            self.device: torch.device = init_distributed_device(found)
            torch.zeros(1, device=self.device)
        except (AssertionError, RuntimeError) as e:
            raise ValueError(f"--device {device} cannot be used: {e}") from e
        self.rank, self.size, self.distributed = found.rank, found.world_size, found.distributed
        self.primary = self.rank == 0
        self.stop = ""
        self.training = False
        # what the processes agree on goes through the CPU, so that nobody waits for a GPU
        self._cpu_group = dist.new_group(backend="gloo") if self.distributed and self.device.type != "cpu" else None

    def say(self, text: str) -> None:
        """Prints, on the first process."""
        if self.primary:
            print(text, flush=True)

    def watch_signals(self) -> None:
        """SIGTERM and SIGINT ask to stop after the update; a second one stops at once."""

        def ask(number: int, _frame) -> None:
            self.stop = signal.Signals(number).name
            for other in (signal.SIGTERM, signal.SIGINT):
                signal.signal(other, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some process."""
        if not self.distributed:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(counts, group=self._cpu_group)
        return [bool(n) for n in counts]

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def gather(self, items: list) -> list:
        """The items of all processes, joined in the order of ranks."""
        if not self.distributed:
            return items
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, items, group=self._cpu_group)
        return sum(everywhere, [])

    def share(self, value: Any) -> Any:
        """What the first process has."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._cpu_group)
        return values[0]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes, on its device and without a wait."""
        x = x / self.size
        if self.distributed:
            dist.all_reduce(x)
        return x
