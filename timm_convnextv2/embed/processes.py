"""The processes that share a run: of torchrun, or this one alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

__all__ = ["Processes", "processes"]

T = TypeVar("T")


class Processes(NamedTuple):
    """The number of this process, and how many there are."""

    rank: int = 0
    size: int = 1

    def first(self, work: Callable[[], T]) -> T:
        """Lets the first process work; all get its result, or its error."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except (ValueError, RuntimeError, OSError) as e:
                box[1] = e
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def tell(self, error: Exception) -> None:
        """Prints an error of this process alone, where the command, which speaks once per node, would not."""
        if self.size > 1 and int(os.environ.get("LOCAL_RANK", self.rank)):
            print(f"process {self.rank}: {error}", file=sys.stderr, flush=True)


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes of torchrun, unless the caller has; leaves them at the end."""
    own = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if own:  # the others wait for the slowest, however long it takes
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
    finally:
        if own:
            dist.destroy_process_group()
