"""The processes of a command, as code that lists or writes files for all of them sees them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Group(Protocol):
    """A `World`, or the `Processes` of a command that trains nothing."""

    @property
    def primary(self) -> bool: ...
    def share(self, value: Any) -> Any: ...
    def gather(self, items: list) -> list: ...


class Processes(NamedTuple):
    """Rank of this process and number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The value of rank 0."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of ranks."""
        everywhere: list[Any] = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(everywhere, items)
        return sum(everywhere, [])

    def print_error(self, error: Exception) -> None:
        """Prints an error of one process; the command itself prints only on the first process of a node."""
        if self.size > 1 and int(os.environ.get("LOCAL_RANK", self.rank)):
            print(f"process {self.rank}: {error}", file=sys.stderr, flush=True)


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
            dist.destroy_process_group()


def on_primary(group: Group, act: Callable[[], T]) -> T:
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
