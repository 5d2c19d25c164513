"""The data of a run, opened and checked before anything is written."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..console import say
from ..data import (
    EpochBatchSampler,
    InputStatistics,
    PretrainDataset,
    PretrainStream,
    PretrainTransform,
    TimmStream,
    check_readable,
    collate,
    hold_out,
)
from ..data.measure.duplicates import files_of, shared_note
from ..data.sources.stream import shard_note
from ..runs.group import Processes
from ..runs.trainer import Bad
from ..runs.world import leave_signals_to_parent
from ..seeds import seeded
from .config import Loading

SHOWN_IMAGES = 6
WATCHED_IMAGES = 64
_LINES = 10
# Crops and masks of the images that are drawn and measured: those of an epoch that no run reaches.
SHOWN_EPOCH = 2**31 - 1


class Sampling(NamedTuple):
    """How images become samples, for `PretrainDataset` and `PretrainStream`."""

    transform: PretrainTransform
    grid: tuple[int, int]  # size of the crop in patches, (h, w)
    mask_ratio: float  # fraction of the patches to remove
    seed: int  # of order, crops and masks


class Batches(NamedTuple):
    """The images of a run, in the order in which it trains on them.

    `loader` yields `(images [B, C, H, W], masks [B, h, w], bad)`; masks are bool, True = removed. `shown` are the few
    samples to draw during the run, `watched` those to measure; on rank 0 only, unless it is a stream, and held-out
    images if there are any.
    """

    loader: DataLoader
    set_epoch: Callable[[int, int], None]  # sets the epoch and the batch to start from; see `iterate`
    per_epoch: int  # batches of an epoch per process
    num_images: int  # without those held out
    name_of: Callable[[int], str] | None  # by index; None for streams, whose reasons begin with the name
    shown: list
    watched: list
    held_out: "Fixed | None"  # never trained on, with masks, each the same in all epochs; None without --holdout
    inputs: InputStatistics  # of the images that rank 0 tried
    sampler: EpochBatchSampler | None = None  # of this process; None for streams
    stream_workers: int | None = None  # data processes of each process that share a stream; None unless it is one

    def iterate(self, epoch: int, start_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Bad]]:
        """The batches of an epoch from `start_batch` on, the same as if the epoch were read from its beginning.

        A `ValueError` says that the stream cannot start in the middle of an epoch, or that the data cannot be read.
        """
        self.set_epoch(epoch, start_batch)
        empty = start_batch % max(1, self.stream_workers or 1)  # see `PretrainStream.set_epoch`
        return islice(self.loader, empty, None)

    def indices(self, epoch: int, start_batch: int, count: int, rank: int, world_size: int) -> list[int] | None:
        """Indices of the images in `count` batches of a process; None for streams."""
        if (own := self.sampler) is None:
            return None
        sampler = EpochBatchSampler(own.num_samples, own.batch_size, own.seed, rank, world_size, own.groups)
        sampler.set_epoch(epoch, start_batch)
        return [index for batch in islice(sampler, count) for _, index in batch]

    def sampling(self) -> list[str]:
        """One line for each of the first groups that images are drawn from; none if each image comes once an epoch."""
        if self.sampler is None or self.sampler.groups is None:
            return []
        length = len(self.sampler) * self.sampler.batch_size * self.sampler.world_size
        lines = self.sampler.groups.lines(length)
        return lines[:_LINES] + [f"and {len(lines) - _LINES} more groups"] * (len(lines) > _LINES)

    def named(self, bad: Bad) -> list[tuple[str, str]]:
        """Replaces the indices by names."""
        return [(self.name_of(i) if self.name_of else why.partition(": ")[0], why) for i, why in bad]


class Fixed(Dataset):
    """Images to draw and measure, each always with the same crop and mask."""

    def __init__(self, dataset: PretrainDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, Bad]:
        return self.dataset[SHOWN_EPOCH, i]

    def spread(self, most: int) -> list:
        """At most so many of the images, the first and the last among them, at equal distances."""
        count = min(most, len(self))
        return [self[i * (len(self) - 1) // max(1, count - 1)] for i in range(count)]

    def loader(self, batch_size: int, workers: int) -> DataLoader:
        """All of them in batches, always in the same order."""
        return DataLoader(self, batch_size, **_loading(min(workers, 2)))  # they live as long as the run, beside others


def _loading(workers: int) -> dict[str, Any]:
    """Arguments of a `DataLoader`. Its generator is its own, or each epoch would draw from the model's."""
    more = dict(worker_init_fn=leave_signals_to_parent, generator=torch.Generator())
    return dict(num_workers=workers, persistent_workers=workers > 0, collate_fn=collate, **more)


def open_batches(
    open_source: Callable[[], Any], sampling: Sampling, *, batch_size: int, loading: Loading, world: Processes,
    holdout: float = 0.0,
) -> Batches:  # fmt: skip
    """Opens the data and tries a few images; refuses data of which none can be decoded, or fewer than a batch."""
    source = open_source()
    if note := str(source.left):
        world.print(note)
    transform = sampling.transform
    options: dict[str, Any] = dict(pin_memory=loading.pin_mem, **_loading(loading.workers))
    inputs = InputStatistics(transform.img_size[0] // sampling.grid[0], transform.mean, transform.std)
    if isinstance(source, TimmStream):
        if holdout:
            raise ValueError("--holdout needs indexable images; a stream has none. Measure with --probe-dir instead.")
        stream = PretrainStream(source, *sampling)
        source.set_loader_cfg(num_workers=loading.workers)
        if note := shard_note(source, loading.workers, world.size):
            world.print(note)
        loader = DataLoader(stream, batch_size=batch_size, drop_last=True, **options)
        # from a second reader: workers would continue with one that has been opened here
        watched = [*islice(PretrainStream(open_source(), *sampling), WATCHED_IMAGES if world.primary else SHOWN_IMAGES)]
        shown = watched[:SHOWN_IMAGES]
        for image, *_ in shown:
            inputs.add(image)
        return Batches(
            loader, partial(stream.set_epoch, batch_size=batch_size), len(source) // batch_size,
            len(source) * world.size, None, shown, watched, None, world.share(inputs), None, loading.workers,
        )  # fmt: skip

    def add(image: torch.Tensor) -> None:
        with seeded(inputs.images):  # leaves the run's random numbers unchanged
            inputs.add(transform(image))

    check_readable(source, visit=add if world.primary else None)
    inputs = world.share(inputs)
    source, apart = hold_out(source, holdout, sampling.seed)
    if apart and world.primary and (note := shared_note(files_of(source), files_of(apart), "held-out")):
        say(f"warning: {note}", error=True)
    dataset = PretrainDataset(source, *sampling)
    held_out = None if apart is None else Fixed(PretrainDataset(apart, *sampling))
    sampler = EpochBatchSampler(len(source), batch_size, sampling.seed, world.rank, world.size, source.groups)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    fixed = Fixed(dataset) if held_out is None else held_out
    shown, watched = ((fixed.spread(n) if world.primary else []) for n in (SHOWN_IMAGES, WATCHED_IMAGES))
    return Batches(
        loader, sampler.set_epoch, len(sampler), len(source), source.name, shown, watched, held_out, inputs, sampler
    )
