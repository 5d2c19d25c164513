"""The data of a run, opened and checked before anything is written."""

import re
from collections.abc import Callable, Iterator
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
from ..runs.end import leave_signals_to_parent
from ..runs.world import Seat, World

SHOWN_IMAGES = 6


WATCHED_IMAGES = 64


_LINES = 10


# crops and masks of the reconstructions and the measures: drawn as those of an epoch that never comes
SHOWN_EPOCH = 2**31 - 1


Bad = list[tuple[int, str]]  # index and reason of images that could not be decoded


class DataError(ValueError):
    """The data of a run cannot be read on, and no other image makes up for it."""


class Batches(NamedTuple):
    """What the loop needs of the data.

    Attributes:
        loader: Yields `(images [B, C, H, W], masks [B, h, w], bad)`; masks are bool, True = removed.
        set_epoch: Takes the epoch and the batch to start from; see `iterate`.
        per_epoch: Batches of an epoch, per process.
        num_images: Images of the data set, without those held out.
        name_of: Name of an image by its index; None for streams, whose reasons begin with the name.
        shown: The few images and masks that are shown during the run, on the first process.
        watched: As many as the measures look at, likewise; all of these are of the held-out ones where there are any.
        held_out: Images that are never trained on, with masks, each the same in all epochs; None where there are none.
        inputs: What the network gets, of the images that were tried: the first process's, on all.
        sampler: Of this process; None for streams.
        stream_workers: Data processes of each process that share a stream, 0 for none; None where there is no stream.
    """

    loader: DataLoader
    set_epoch: Callable[[int, int], None]
    per_epoch: int
    num_images: int
    name_of: Callable[[int], str] | None
    shown: list
    watched: list
    held_out: Dataset | None
    inputs: InputStatistics
    sampler: EpochBatchSampler | None = None
    stream_workers: int | None = None

    def check_resume(self, before: int | None, update: int) -> None:
        """Refuses to resume a stream in the middle of an epoch where its images would come in another order.

        Args:
            before: `stream_workers` of the run so far.
            update: Updates of the epoch that were made.

        Raises:
            ValueError: The number of workers differs, or the run is of a version that could not repeat an epoch.
        """
        if self.stream_workers is None or not update or before == self.stream_workers:
            return
        then = "an earlier version of this package" if before is None else f"--workers {before}"
        raise ValueError(
            f"Cannot resume a stream in the middle of an epoch with --workers {self.stream_workers}: the run so far "
            f"had {then}, which reads the images in another order. Resume with the same, or from a milestone "
            "checkpoint."
        )

    def iterate(self, epoch: int, start_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Bad]]:
        """The batches of an epoch from `start_batch` on, as an epoch that is read from its beginning gives them.

        Raises:
            ValueError: The stream cannot start in the middle of an epoch.
            DataError: The data cannot be read on.
        """
        self.set_epoch(epoch, start_batch)
        empty = start_batch % max(1, self.stream_workers or 1)  # see `PretrainStream.set_epoch`
        return islice(_told(self.loader), empty, None)

    def indices(self, epoch: int, start_batch: int, count: int, rank: int, world_size: int) -> list[int] | None:
        """Indices of the images of `count` batches of a process; None for streams."""
        if self.sampler is None:
            return None
        own = self.sampler
        sampler = EpochBatchSampler(own.num_samples, own.batch_size, own.seed, rank, world_size, own.groups)
        sampler.set_epoch(epoch, start_batch)
        return [index for batch in islice(sampler, count) for _, index in batch]

    def sampling(self) -> list[str]:
        """A line for each of the first groups that images are drawn from; none where each comes once an epoch."""
        if self.sampler is None or self.sampler.groups is None:
            return []
        length = len(self.sampler) * self.sampler.batch_size * self.sampler.world_size
        lines = self.sampler.groups.lines(length)
        return lines[:_LINES] + [f"and {len(lines) - _LINES} more groups"] * (len(lines) > _LINES)

    def named(self, bad: Bad) -> list[tuple[str, str]]:
        """Names in the place of indices."""
        return [(self.name_of(i) if self.name_of else why.partition(": ")[0], why) for i, why in bad]


def _told(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; what the data cannot be read for is a `DataError` with one message."""
    try:
        yield from loader
    except ValueError as error:
        raise DataError(_original(error)) from error


def worker_died(error: BaseException | None) -> str:
    """What to tell of the death of a data worker; '' where an error is another.

    PyTorch raises it in the main thread, wherever that is.
    """
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    found = next(
        (t for t in reversed(texts) if re.search(r"DataLoader worker .*(killed by|exited unexpectedly)", t)), ""
    )
    if not found:
        return ""
    return (
        f"{found.splitlines()[0].rstrip(' .')}. Where nobody killed it, the machine has too little memory for it "
        "(fewer --workers), or too little shared memory (/dev/shm)."
    )


def _original(error: Exception) -> str:
    """The message of an error that came from a worker with its traceback as text."""
    return re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", str(error), flags=re.M)[-1].strip()


class Fixed(Dataset):
    """Images to measure with: crop and mask of each are the same whenever it is asked for.

    Args:
        dataset: Of images held out, or of all.
    """

    def __init__(self, dataset: PretrainDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, Bad]:
        return self.dataset[SHOWN_EPOCH, i]


def open_batches(
    create_source: Callable,
    transform: PretrainTransform,
    *,
    grid: tuple[int, int],
    mask_ratio: float,
    batch_size: int,
    seed: int,
    workers: int,
    pin_mem: bool,
    world: World | Seat,
    holdout: float = 0.0,
) -> Batches:
    """Opens the data and tries a few images.

    Args:
        create_source: Opens the source; called twice for a stream.
        transform: From a decoded image to a crop of the network's size.
        grid: Image size in patches, `(h, w)`.
        mask_ratio: Share of the patches to remove.
        batch_size: Images per batch and process.
        seed: Of the order, crops and masks.
        workers: Data processes per training process.
        pin_mem: Load into pinned memory.
        world: The processes that share the data.
        holdout: Share of the images that are never trained on.

    Raises:
        ValueError: No image can be decoded, or there are fewer images than a batch takes.
    """
    source = create_source()
    if note := str(source.left):
        world.say(note)
    options: dict[str, Any] = dict(
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_mem,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own, or each epoch would draw from the model's
    )
    sampling = (transform, grid, mask_ratio, seed)
    inputs = InputStatistics(transform.img_size[0] // grid[0], transform.mean, transform.std)
    if isinstance(source, TimmStream):
        if holdout:
            raise ValueError(
                "--holdout chooses images by their number, which a stream has not. Leave it out, and measure on a "
                "split of its own with --probe-dir."
            )
        stream = PretrainStream(source, *sampling)
        source.set_loader_cfg(num_workers=workers)
        if note := shard_note(source, workers, world.size):
            world.say(note)
        loader = DataLoader(stream, batch_size=batch_size, drop_last=True, **options)

        def set_epoch(epoch: int, start_batch: int) -> None:
            stream.set_epoch(epoch, start_batch, batch_size)

        # from a reader of its own: workers would continue with one that has been opened here
        count = WATCHED_IMAGES if world.primary else SHOWN_IMAGES
        watched = [*islice(PretrainStream(create_source(), *sampling), count)]
        shown = watched[:SHOWN_IMAGES]
        for image, *_ in shown:
            inputs.add(image)
        per_epoch, images, inputs = len(source) // batch_size, len(source) * world.size, world.share(inputs)
        return Batches(loader, set_epoch, per_epoch, images, None, shown, watched, None, inputs, None, workers)

    def look(image: torch.Tensor) -> None:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers stay
            torch.default_generator.manual_seed(inputs.images)
            inputs.add(transform(image))

    check_readable(source, look=look if world.primary else None)
    inputs = world.share(inputs)
    source, apart = hold_out(source, holdout, seed)
    dataset = PretrainDataset(source, *sampling)
    held_out = None if apart is None else Fixed(PretrainDataset(apart, *sampling))
    sampler = EpochBatchSampler(len(source), batch_size, seed, world.rank, world.size, source.groups)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    looked_at = Fixed(dataset) if held_out is None else held_out
    shown = _spread(looked_at, SHOWN_IMAGES) if world.primary else []
    watched = _spread(looked_at, WATCHED_IMAGES) if world.primary else []
    return Batches(
        loader, sampler.set_epoch, len(sampler), len(source), source.name, shown, watched, held_out, inputs, sampler
    )


def _spread(images: Fixed, most: int) -> list:
    """Up to so many of the images, at equal distances."""
    count = min(most, len(images))
    return [images[i * len(images) // count] for i in range(count)]
