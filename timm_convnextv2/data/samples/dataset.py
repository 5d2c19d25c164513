"""Samples `(image, mask)` of masked pretraining, whose random numbers make a run repeatable."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from ...models.masking import random_mask
from ...seeds import mix, sample_seed, seeded
from ..formats.errors import ImageError
from ..formats.pillow import Choose, Reduced
from ..sources.source import Bad, Source
from ..sources.stream import TimmStream

_KEPT_OF_SKIPPED = 32  # most bad images in a row at the position where a resumed stream starts
_MAX_BAD_IN_A_ROW = 1000  # a corrupt folder or shard; --max-bad-images stops most runs earlier


class _Samples:
    """The parts of a data set of samples.

    Args:
        transform: Decoded image `[C, h, w]` to network input; may use torch's global CPU generator, no other random
            numbers. With a method `reduction(size)`, as `PretrainTransform` has, it must also take `Reduced` images.
        grid: Image size in patches, `(h, w)`.
        mask_ratio: Fraction of the patches to remove.
    """

    def __init__(
        self, source: Any, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int = 0
    ) -> None:
        self.source, self.transform, self.grid, self.mask_ratio, self.seed = source, transform, grid, mask_ratio, seed
        random_mask(1, grid, mask_ratio, generator=torch.Generator())  # fails here, not in a worker

    def __len__(self) -> int:
        return len(self.source)

    def choose(self, seed: int) -> Choose | None:
        """How far an image may be reduced for the crop of this seed; None if the transform has no `reduction`."""
        reduction = getattr(self.transform, "reduction", None)
        if reduction is None:
            return None

        def choose(size: tuple[int, int]) -> int:
            with seeded(seed):
                return reduction(size)

        return choose

    def sample(self, image: torch.Tensor | Reduced, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and the mask of this seed."""
        with seeded(seed):
            sample = self.transform(image)
        generator = torch.Generator().manual_seed(mix(seed, 1))
        return sample, random_mask(1, self.grid, self.mask_ratio, generator=generator)[0]


class PretrainDataset(_Samples, Dataset):
    """Samples of masked pretraining, whose crop, flip and mask depend on (seed, epoch, index) only.

    `dataset[epoch, index]` is `(image [C, H, W], mask [h, w], bad)`: `mask` is bool, True = removed. An image that
    cannot be decoded is replaced by the next one that can, under the random numbers of the original; `bad` lists
    `(index, message)` of the unreadable ones. A thousand unreadable images in a row are a ValueError.
    """

    source: Source

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Bad]:
        epoch, index = key
        n, bad, seed = len(self), [], sample_seed(self.seed, epoch, index)
        for offset in range(min(_MAX_BAD_IN_A_ROW, n)):
            i = (index + offset) % n
            try:
                image = self.source.read(i, self.choose(seed), seed=mix(seed, 2))
            except (ImageError, OSError) as error:
                bad.append((i, self.source.reason(i, error)))
            else:
                return *self.sample(image, seed), bad
        raise _too_many(bad)


def _too_many(bad: Bad) -> ValueError:
    return ValueError(
        f"{len(bad)} images in a row cannot be read. Fix or remove these files:\n"
        + "\n".join(message for _, message in bad)
    )


class PretrainStream(_Samples, IterableDataset):
    """`PretrainDataset` for a `TimmStream`: yields `(image [C, H, W], mask [h, w], bad)`.

    Crop, flip and mask depend on (seed, epoch, rank, worker, position in the worker's stream); the reader decides which
    image is at a position, depending on the number of workers. An image that cannot be decoded is replaced by the last
    readable one before it (at the very start, the next one), so that every process makes the same number of batches;
    the index in `bad` is the position. A run resumed within an epoch rereads the consumed images without decoding.
    """

    source: TimmStream

    def __init__(self, source: TimmStream, *sampling: Any, **named: Any) -> None:
        super().__init__(source, *sampling, **named)
        # shared memory: reaches persistent workers
        self.epoch, self.start, self.batch_size = SharedCount(), SharedCount(), SharedCount(1)

    def set_epoch(self, epoch: int, start_batch: int = 0, batch_size: int = 1) -> None:
        """Selects the random numbers, the reader's order, and the batch to start from; call before iterating.

        A loader takes batches from its workers in turn, starting with the first. To keep the order of an epoch that is
        read from its beginning, the first `start_batch % num_workers` batches of the loader are None.
        `start_batch` may be above 0 only for repeatable sources.
        """
        if start_batch and not self.source.repeatable:
            raise ValueError(
                f"The reader of '{self.source.dataset_name}' cannot repeat an epoch, so a run cannot resume within "
                "one. Resume from a milestone checkpoint."
            )
        self.epoch.value, self.start.value, self.batch_size.value = epoch, start_batch, batch_size
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, Bad] | None]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream, start = mix(self.seed, self.source.rank, number), self.start.value
        epoch, in_a_row, waiting = self.epoch.value, [], []
        if number < start % workers:
            yield from [None] * self.batch_size.value
        consumed = (start - number + workers - 1) // workers * self.batch_size.value
        numbered = enumerate(self.source.undecoded())
        last = _skip(numbered, max(0, consumed))
        for position, (name, load) in numbered:
            bad, image = [], None
            try:
                image = load(self.choose(sample_seed(stream, epoch, position)))
            except ImageError as error:
                message = str(error)
                bad = [(position, message if name in message else f"{name}: {message}")]
            if bad:
                in_a_row = in_a_row + bad
                if len(in_a_row) == _MAX_BAD_IN_A_ROW:
                    raise _too_many(in_a_row)
                if last is None:
                    waiting.append((position, bad))
                    continue
            else:
                last, in_a_row = load, []
            for at, reported in [*waiting, (position, bad)]:
                seed = sample_seed(stream, epoch, at)
                # the replacement of a bad image is decoded again, at the size that this crop needs
                shown: Any = last(self.choose(seed)) if reported else image
                yield *self.sample(shown, seed), reported
            waiting = []
        if waiting:
            raise _too_many(in_a_row)


def _skip(numbered: Iterator[tuple[int, tuple[str, Callable]]], count: int) -> Callable | None:
    """Skips images of a stream; returns the last one that can be decoded, as a replacement for bad ones."""
    recent = deque((load for _, (_, load) in islice(numbered, count)), maxlen=_KEPT_OF_SKIPPED)
    for load in reversed(recent):
        with suppress(ImageError):
            load()
            return load
    return None


def collate(
    samples: list[tuple[torch.Tensor, torch.Tensor, Bad] | None],
) -> tuple[torch.Tensor, torch.Tensor, Bad] | None:
    """Joins samples to `(images [B, C, H, W], masks [B, h, w], bad)`; `bad` lists `(index, message)` of the batch."""
    if samples[0] is None:  # a batch that a resumed stream skips, see `PretrainStream.set_epoch`
        return None
    images, masks, bad = zip(*samples, strict=True)
    # in a worker, default_collate stacks straight into shared memory
    return default_collate(list(images)), default_collate(list(masks)), [entry for entries in bad for entry in entries]
