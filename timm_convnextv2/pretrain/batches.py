"""The data of a run, opened and checked before anything is written."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

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
from ..data.samples.shards import shard_note
from ..runs.trainer import Bad
from ..runs.world import Seat, World, leave_signals_to_parent
from .config import Crops, Loading

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


def transform_of(crops: Crops) -> PretrainTransform:
    """The augmentation that the options describe."""
    return PretrainTransform(
        crops.size, crops.scale, crops.ratio, crops.hflip, crops.vflip, crops.train_interpolation, *crops.normalization
    )


class Batches(NamedTuple):
    """The images of a run, in the order in which it trains on them.

    Attributes:
        loader: Yields `(images [B, C, H, W], masks [B, h, w], bad)`; masks are bool, True = removed.
        set_epoch: Sets the epoch and the batch to start from; see `iterate`.
        per_epoch: Batches of an epoch per process.
        num_images: Images of the data set, without those held out.
        name_of: Name of an image by its index; None for streams, whose reasons begin with the name.
        shown: The few images and masks to draw during the run; on rank 0 only, unless it is a stream.
        watched: The images and masks to measure, likewise. Both are held-out images if there are any.
        held_out: Images that are never trained on, with masks, each the same in all epochs; None without --holdout.
        inputs: Statistics of the network's input, of the images that rank 0 tried.
        sampler: Sampler of this process; None for streams.
        stream_workers: Data processes of each process that share a stream, 0 for none; None unless it is a stream.
    """

    loader: DataLoader
    set_epoch: Callable[[int, int], None]
    per_epoch: int
    num_images: int
    name_of: Callable[[int], str] | None
    shown: list
    watched: list
    held_out: "Fixed | None"
    inputs: InputStatistics
    sampler: EpochBatchSampler | None = None
    stream_workers: int | None = None

    def check_resume(self, before: int | None, update: int) -> None:
        """Refuses to resume after `update` updates of an epoch of a stream that other workers read in another order."""
        if self.stream_workers is not None and update and before != self.stream_workers:
            raise ValueError(
                f"Cannot resume a stream in the middle of an epoch with --workers {self.stream_workers}: the run so "
                f"far had --workers {before}, which read the images in another order. Resume with the same, or from a "
                "milestone checkpoint."
            )

    def iterate(self, epoch: int, start_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Bad]]:
        """The batches of an epoch from `start_batch` on, the same as if the epoch were read from its beginning.

        Raises:
            ValueError: The stream cannot start in the middle of an epoch.
            DataError: The data cannot be read any further.
        """
        self.set_epoch(epoch, start_batch)
        empty = start_batch % max(1, self.stream_workers or 1)  # see `PretrainStream.set_epoch`
        return islice(self.loader, empty, None)

    def indices(self, epoch: int, start_batch: int, count: int, rank: int, world_size: int) -> list[int] | None:
        """Indices of the images in `count` batches of a process; None for streams."""
        if self.sampler is None:
            return None
        own = self.sampler
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
        """At most so many of the images, at equal distances."""
        count = min(most, len(self))
        return [self[i * len(self) // count] for i in range(count)]

    def loader(self, batch_size: int, workers: int) -> DataLoader:
        """All of them in batches, always in the same order."""
        workers = min(workers, 2)  # they live as long as the run, beside those of the training
        return DataLoader(
            self, batch_size, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate,
            worker_init_fn=leave_signals_to_parent, generator=torch.Generator(),
        )  # fmt: skip


def open_batches(
    open_source: Callable[[], Any],
    sampling: Sampling,
    *,
    batch_size: int,
    loading: Loading,
    world: World | Seat,
    holdout: float = 0.0,
) -> Batches:
    """Opens the data and tries a few images. A stream is opened twice.

    Refuses data of which no image can be decoded, and fewer images than a batch.
    """
    source = open_source()
    if note := str(source.left):
        world.print(note)
    transform = sampling.transform
    options: dict[str, Any] = dict(
        num_workers=loading.workers,
        collate_fn=collate,
        pin_memory=loading.pin_mem,
        persistent_workers=loading.workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own, or each epoch would draw from the model's
    )
    inputs = InputStatistics(transform.img_size[0] // sampling.grid[0], transform.mean, transform.std)
    if isinstance(source, TimmStream):
        if holdout:
            raise ValueError(
                "--holdout needs indexable images; a stream has none. Leave it out, and measure on a split of its own "
                "with --probe-dir."
            )
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
        with torch.random.fork_rng(devices=[]):  # leaves the run's random numbers unchanged
            torch.default_generator.manual_seed(inputs.images)
            inputs.add(transform(image))

    check_readable(source, visit=add if world.primary else None)
    inputs = world.share(inputs)
    source, apart = hold_out(source, holdout, sampling.seed)
    dataset = PretrainDataset(source, *sampling)
    held_out = None if apart is None else Fixed(PretrainDataset(apart, *sampling))
    sampler = EpochBatchSampler(len(source), batch_size, sampling.seed, world.rank, world.size, source.groups)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    fixed = Fixed(dataset) if held_out is None else held_out
    shown, watched = ((fixed.spread(n) if world.primary else []) for n in (SHOWN_IMAGES, WATCHED_IMAGES))
    return Batches(
        loader, sampler.set_epoch, len(sampler), len(source), source.name, shown, watched, held_out, inputs, sampler
    )
