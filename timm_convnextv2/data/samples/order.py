"""The order of the images of an epoch."""

from collections.abc import Iterator

import torch

from ...console import count
from ...seeds import mix
from ..sources.groups import Groups


class EpochBatchSampler:
    """Batches of `(epoch, index)` from a permutation that depends on (seed, epoch) only.

    A global batch is `batch_size * world_size` consecutive entries of the permutation; rank r takes every
    `world_size`-th of them, starting with r. So N processes together see the batches of one process with N times the
    batch size. An incomplete last global batch is dropped. The epoch in each index reaches persistent workers.

    With `groups`, as many images are drawn by weight; without them, each image comes at most once.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1,
        groups: Groups | None = None,
    ) -> None:  # fmt: skip
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"Expected batch_size >= 1 and 0 <= rank < world_size, got batch_size {batch_size}, rank {rank}, "
                f"world_size {world_size}."
            )
        if world_size > num_samples:
            images = count(num_samples, "image")
            raise ValueError(f"{world_size} processes cannot share {images}; start at most {num_samples}.")
        if batch_size * world_size > num_samples:
            raise ValueError(
                f"--batch-size {batch_size} on {count(world_size, 'process')} needs "
                f"{batch_size * world_size} images, the data set has {num_samples}; the largest --batch-size that "
                f"works is {num_samples // world_size}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.groups = rank, world_size, groups
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, per process."""
        return self.num_samples // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Selects the epoch, and the batch to start from."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch must lie in 0..{len(self)} (batches per epoch), got {start_batch}.")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.batch_size * self.world_size
        own = slice(self.rank, len(self) * step, self.world_size)
        if self.groups is not None:
            order, epochs = self.groups.order(self.seed, self.epoch, len(self) * step)
            return self._batches(order[own].clone(), epochs[own].clone(), self.start_batch)
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        dtype = torch.int32 if self.num_samples < 2**31 else torch.int64  # half the memory
        order = torch.randperm(self.num_samples, generator=generator, dtype=dtype)[own].clone()
        return self._batches(order, torch.tensor(self.epoch).expand(len(order)), self.start_batch)

    def _batches(self, order: torch.Tensor, epochs: torch.Tensor, start: int) -> Iterator[list[tuple[int, int]]]:
        for begin in range(start * self.batch_size, len(order), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield [*zip(epochs[batch].tolist(), order[batch].tolist(), strict=True)]
