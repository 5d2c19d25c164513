"""`Processes`: the processes of a command, as code that lists or writes files for all of them sees them."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """This process (`rank`) among `size`. Without torch.distributed, it exchanges values with itself only."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group  # None: the group of all processes
        self.primary = rank == 0  # it prints and writes
        self.distributed = size > 1 and dist.is_initialized()

    def print(self, text: str) -> None:
        """Prints on rank 0."""
        if self.primary:
            print(text, flush=True)

    def print_error(self, error: Exception) -> None:
        """Prints an error of one process; the command itself prints only on the first process of a node."""
        if self.size > 1 and int(os.environ.get("LOCAL_RANK", self.rank)):
            print(f"process {self.rank}: {error}", file=sys.stderr, flush=True)

    def share(self, value: Any) -> Any:
        """The value of rank 0."""
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of ranks."""
        everywhere: list[Any] = [items]
        if self.distributed:
            everywhere *= self.size
            dist.all_gather_object(everywhere, items, group=self._group)
        return sum(everywhere, [])

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some process."""
        counts = torch.tensor(flags, dtype=torch.int64)
        if self.distributed:
            dist.all_reduce(counts, group=self._group)
        return [bool(n) for n in counts]

    def wait(self) -> None:
        """Waits for all processes."""
        self.any(False)


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes of torchrun, unless the caller has; leaves them at the end."""
    own = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if own:  # no timeout in practice: processes wait for the slowest
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
    finally:
        if own:
            leave_group()


def leave_group() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        # Gloo's threads free the tensors of the last operation, for which they need the GIL. PyTorch 2.7 holds it while
        # it joins them, and waits for ever if they are not done.
        time.sleep(0.2)
        dist.destroy_process_group()


def on_primary(group: Processes, act: Callable[[], T]) -> T:
    """Runs `act` on rank 0; all processes return its result or raise its error, so that none waits for the others."""
    found = error = None
    if group.primary:
        try:
            found = act()
        except (ValueError, RuntimeError, OSError) as e:
            error = e
    found, error = group.share((found, error))
    if error is not None:
        raise error
    return found  # pyright: ignore[reportReturnType]
