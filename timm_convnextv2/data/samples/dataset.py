"""From a source to batches of `(image, mask)`: the transform, and what makes a run repeatable."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from ...models.masking import random_mask
from ...seeds import mix, sample_seed, seeded
from ..formats.decode import Choose, Reduced
from ..formats.errors import ImageError
from ..sources.stream import TimmStream

_KEPT_OF_SKIPPED = 32  # pictures in a row that may be bad where a resumed stream starts


_MAX_BAD_IN_A_ROW = 1000  # a damaged folder or shard; --max-bad-images stops most runs before


def _choose(transform: Callable, seed: int) -> Choose | None:
    """How far pictures may be reduced for the crop that `transform` makes with this seed; None if it cannot tell."""
    reduction = getattr(transform, "reduction", None)
    if reduction is None:
        return None

    def choose(size: tuple[int, int]) -> int:
        with seeded(seed):
            return reduction(size)

    return choose


def _make_sample(
    image: torch.Tensor | Reduced, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(seed):
        sample = transform(image)
    generator = torch.Generator().manual_seed(mix(seed, 1))
    return sample, random_mask(1, grid, mask_ratio, generator=generator)[0]


Bad = list[tuple[int, str]]


class PretrainDataset(Dataset):
    """Samples for masked pretraining, where crop, flip and mask depend on (seed, epoch, index) only.

    `dataset[epoch, index]` gives `(image [C, H, W], mask [h, w], bad)`: `mask` is bool, True = removed. A picture
    that cannot be decoded is replaced by the next one that can, under the random numbers of the original; `bad` lists
    the `(index, message)` of those that could not.

    Args:
        source: Map-style source of pictures `[C, h, w]` with `name(i)`; raises ImageError or OSError for bad ones. If
            it has `load_reduced(i, choose)`, large JPEGs need not be decoded at full size; if it has `load_sample(i,
            seed)`, the picture is another one in each epoch, as a window of a large image is.
        transform: Picture to image; may use torch's global CPU generator, nothing else random. With a method
            `reduction(size)`, as `PretrainTransform` has, it must also take `Reduced` pictures.
        grid: Image size in patches, `(h, w)`.
        mask_ratio: Share of the patches to remove.
        seed: Seed of the run.

    Raises:
        ValueError: The mask ratio is impossible on this grid; or, by a sample, a thousand pictures in a row (all, in a
            smaller source) are unreadable.
    """

    def __init__(
        self, source: Dataset, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int = 0
    ) -> None:
        self.source, self.transform, self.grid, self.mask_ratio, self.seed = source, transform, grid, mask_ratio, seed
        random_mask(1, grid, mask_ratio, generator=torch.Generator())  # complains here, not in a worker

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Bad]:
        epoch, index = key
        n, bad = len(self), []
        seed = sample_seed(self.seed, epoch, index)
        choose = _choose(self.transform, seed)
        reduced = None if choose is None else getattr(self.source, "load_reduced", None)
        sample = getattr(self.source, "load_sample", None)
        for offset in range(min(_MAX_BAD_IN_A_ROW, n)):
            i = (index + offset) % n
            try:
                if sample is not None:
                    picture = sample(i, mix(seed, 2))
                else:
                    picture = self.source[i] if reduced is None else reduced(i, choose)
                break
            except (ImageError, OSError) as error:
                bad.append((i, _named(self.source, i, error)))
        else:
            raise _too_many(bad)
        return *_make_sample(picture, self.transform, self.grid, self.mask_ratio, seed), bad


def _too_many(bad: Bad) -> ValueError:
    return ValueError(
        f"{len(bad)} images in a row cannot be read, so this looks like more than a few bad files:\n"
        + "\n".join(message for _, message in bad)
    )


class PretrainStream(IterableDataset):
    """`PretrainDataset` for streams: yields `(image [C, H, W], mask [h, w], bad)`.

    Crop, flip and mask depend on (seed, epoch, rank, worker, position in the worker's stream); which picture stands
    at a position is up to the reader, and changes with the number of workers. A picture that cannot be decoded is
    replaced by the last one before it that could (the next one at the very start), so that every process makes
    the same number of batches; the index in `bad` is the position.

    A run that is resumed in the middle of an epoch reads what it had consumed again, without decoding it, and goes on
    behind it: see `set_epoch`.

    Args:
        source: The stream.
        transform, grid, mask_ratio, seed: As for `PretrainDataset`.

    Raises:
        ValueError: The mask ratio is impossible on this grid; or, when iterating, a thousand pictures in a row are
            unreadable or the stream is empty.
    """

    def __init__(
        self, source: TimmStream, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int = 0
    ) -> None:
        super().__init__()
        from timm.data.readers.shared_count import SharedCount

        self.source, self.transform, self.grid, self.mask_ratio, self.seed = source, transform, grid, mask_ratio, seed
        # shared memory: reaches persistent workers
        self.epoch, self.start, self.batch_size = SharedCount(), SharedCount(), SharedCount(1)
        random_mask(1, grid, mask_ratio, generator=torch.Generator())

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int, start_batch: int = 0, batch_size: int = 1) -> None:
        """Selects the random numbers, the reader's order, and where in it to start; call before iterating.

        A loader takes its batches from its workers in turn, from the first one on. So that they come in the order of
        an epoch that is read from its beginning, the first `start_batch % num_workers` batches of the loader are
        None.

        Args:
            epoch: From 0.
            start_batch: Batches of this epoch that the loader has given before.
            batch_size: Of the loader.

        Raises:
            ValueError: The source cannot repeat an epoch, so that it has no middle to start from.
        """
        if start_batch and not self.source.repeatable:
            raise ValueError(
                f"The reader of '{self.source.dataset_name}' cannot repeat an epoch, so that a run cannot resume in "
                "the middle of one. Resume from a milestone checkpoint."
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
            bad, picture = [], None
            try:
                picture = load(_choose(self.transform, sample_seed(stream, epoch, position)))
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
                # what stands in for a bad picture is decoded anew, at the size that this crop needs
                image: Any = last(_choose(self.transform, seed)) if reported else picture
                yield *_make_sample(image, self.transform, self.grid, self.mask_ratio, seed), reported
            waiting = []
        if waiting:
            raise _too_many(in_a_row)


def _skip(numbered: Iterator[tuple[int, tuple[str, Callable]]], count: int) -> Callable | None:
    """Passes over so many pictures of a stream; returns the last one that can be decoded, to stand in for others."""
    recent = deque((load for _, (_, load) in islice(numbered, count)), maxlen=_KEPT_OF_SKIPPED)
    return next((load for load in reversed(recent) if _decodes(load)), None)


def _decodes(load: Callable) -> bool:
    try:
        load()
    except ImageError:
        return False
    return True


def collate(
    samples: list[tuple[torch.Tensor, torch.Tensor, Bad] | None],
) -> tuple[torch.Tensor, torch.Tensor, Bad] | None:
    """Joins samples to `(images [B, C, H, W], masks [B, h, w], bad)`; `bad` lists `(index, message)` of the batch."""
    if samples[0] is None:  # a place in the loader's order that a resumed stream leaves empty
        return None
    images, masks, bad = zip(*samples, strict=True)
    # stacks, in a worker straight into shared memory
    return default_collate(list(images)), default_collate(list(masks)), [entry for entries in bad for entry in entries]


def _named(source: Any, i: int, error: Exception) -> str:
    name, message = source.name(i), str(error)
    return message if name in message else f"{name}: {message}"
