"""From a source to batches of `(image, mask)`: the transform, and what makes a run repeatable."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import InterpolationMode, v2

from ..models.masking import random_mask
from .decode import Choose, ImageError, Reduced
from .mixing import mix
from .sources import TimmStream
from .weights import Groups

__all__ = [
    "EpochBatchSampler",
    "PretrainDataset",
    "PretrainStream",
    "PretrainTransform",
    "check_readable",
    "collate",
    "sample_seed",
]

# A JPEG is decoded at 1/2, 1/4 or 1/8 if its crop keeps this many times the output's pixels per side. PSNR against the
# full decode at exactly this many, photograph-like JPEGs, bicubic, median (minimum) in dB: 38.8 (37.0) at 1, 45.4
# (44.6) at 1.5, 49.2 (47.5) at 2; most crops keep more, see benchmarks/decode.py. 1.5 is the smallest of these above
# 40 dB. Drawings with sharp edges at the scale of the output's pixels lose more: 30 dB at 1.5.
MIN_OVERSAMPLING = 1.5
_KEPT_OF_SKIPPED = 32  # pictures in a row that may be bad where a resumed stream starts
_MAX_BAD_IN_A_ROW = 1000  # a damaged folder or shard; --max-bad-images stops most runs before


class PretrainTransform:
    """Random resized crop, flips, scaling to [0, 1] and normalisation: the paper's augmentation for pretraining.

    Uses torch's global random generator only. uint8 pictures are resized as uint8, which is fast. Of pictures decoded
    at reduced size it makes the same crop: see `reduction`.

    Args:
        img_size: Output size in pixels, one side or `(H, W)`.
        scale: Range of the crop's share of the picture's area.
        ratio: Range of the crop's width / height.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        interpolation: 'bilinear', 'bicubic' or 'nearest', antialiased.
        mean: Mean per channel, in units of the scaled picture (uint8 pictures: 0..1).
        std: Standard deviation per channel, same units.

    Raises:
        ValueError: An argument is out of range, or (when called) `mean` does not have one number per channel.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"img_size must be one side or (height, width) in pixels, got {img_size}.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two values of width / height, 0 < low <= high, got {ratio}.")
        for option, p in (("hflip", hflip), ("vflip", vflip)):
            if not 0 <= p <= 1:
                raise ValueError(f"{option} is a probability in [0, 1], got {p}.")
        if interpolation not in ("bilinear", "bicubic", "nearest"):
            raise ValueError(f"interpolation must be 'bilinear', 'bicubic' or 'nearest', got '{interpolation}'.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must have the same length and std be positive, got {mean} and {std}.")
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = interpolation
        self.crop = v2.RandomResizedCrop(self.img_size, scale, ratio, InterpolationMode(interpolation), antialias=True)
        steps: list[torch.nn.Module] = [v2.RandomHorizontalFlip(hflip)] if hflip else []
        steps += [v2.RandomVerticalFlip(vflip)] if vflip else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        self.steps = v2.Compose(steps)

    def reduction(self, size: tuple[int, int]) -> int:
        """The largest of 1, 2, 4, 8 by which a picture may be decoded smaller without visible change.

        The crop then still has at least `MIN_OVERSAMPLING` times as many pixels as the output, in height and width.
        Draws the crop as a call does: set the random generator to the same state before both.

        Args:
            size: Full `(height, width)` of the picture in pixels.
        """
        if self.interpolation == "nearest":  # picks single pixels, which the reduced picture has not
            return 1
        _, _, height, width = self._box(size)
        enough = min(height / self.img_size[0], width / self.img_size[1]) / MIN_OVERSAMPLING
        return next((r for r in (8, 4, 2) if r <= enough), 1)

    def _box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draws the crop of a picture of this (height, width): `(top, left, height, width)` in pixels."""
        drawn = self.crop.make_params([torch.empty(1).expand(1, *size)])  # of the image it reads the shape only
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"]

    def _crop_reduced(self, image: Reduced) -> torch.Tensor:
        """What `self.crop` does, with a box that may begin and end within pixels: uint8 `[C, H, W]`."""
        top, left, height, width = self._box(image.size)
        frame_top, frame_left, frame_height, frame_width = image.frame
        y, x = frame_height / image.size[0], frame_width / image.size[1]
        top, left = frame_top + top * y, frame_left + left * x
        bottom, right = top + height * y, left + width * x
        # Cut out first, as at full size, or the filter would look beyond the crop. All numbers are multiples of 1/8,
        # so nothing is lost to rounding.
        y0, x0 = math.floor(top), math.floor(left)
        window = image.pixels[:, y0 : math.ceil(bottom), x0 : math.ceil(right)]
        array = window[0].numpy() if len(window) == 1 else window.permute(1, 2, 0).numpy()
        resized = Image.fromarray(np.ascontiguousarray(array)).resize(
            (self.img_size[1], self.img_size[0]),
            Image.Resampling[self.interpolation.upper()],
            box=(left - x0, top - y0, right - x0, bottom - y0),
        )
        pixels = torch.from_numpy(np.array(resized))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

    def __call__(self, image: torch.Tensor | Reduced) -> torch.Tensor:
        """`[C, h, w]` uint8 or float, or `Reduced` -> float32 `[C, H, W]`, normalised."""
        channels = len(image.pixels if isinstance(image, Reduced) else image)
        if channels != len(self.mean):
            raise ValueError(
                f"The image has {channels} channels but mean and std have {len(self.mean)} numbers; give one "
                "number per channel (--mean, --std)."
            )
        cropped = self._crop_reduced(image) if isinstance(image, Reduced) else self.crop(image)
        return self.steps(cropped).contiguous()


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed in 0 .. 2**63 - 1 of one sample in one epoch, well mixed, the same everywhere and always."""
    return mix(seed, epoch, index)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would reseed the accelerators too, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        yield


def _choose(transform: Callable, seed: int) -> Choose | None:
    """How far pictures may be reduced for the crop that `transform` makes with this seed; None if it cannot tell."""
    reduction = getattr(transform, "reduction", None)
    if reduction is None:
        return None

    def choose(size: tuple[int, int]) -> int:
        with _seeded(seed):
            return reduction(size)

    return choose


def _make_sample(
    image: torch.Tensor | Reduced, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    with _seeded(seed):
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


class EpochBatchSampler:
    """Batches of `(epoch, index)` from a permutation that depends on (seed, epoch) only.

    A global batch is `batch_size * world_size` consecutive entries of the permutation, of which rank r takes every
    `world_size`-th from r on: N processes together see the batches that one process with N times the batch size
    would. An incomplete last global batch is dropped. The epoch travels with the index, into persistent workers too.

    Args:
        num_samples: Length of the data set.
        batch_size: Images per batch and process.
        seed: Seed of the run.
        rank: Number of this process.
        world_size: Number of processes.
        groups: Draws the images of an epoch, as many as without; None: each at most once.

    Raises:
        ValueError: The data set is smaller than one global batch, or a number is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        groups: Groups | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"Expected batch_size >= 1 and 0 <= rank < world_size, got batch_size {batch_size}, rank {rank}, "
                f"world_size {world_size}."
            )
        if world_size > num_samples:
            raise ValueError(
                f"{world_size} processes cannot share {num_samples} image{'s' * (num_samples != 1)}; start at most "
                f"{num_samples} processes."
            )
        if batch_size * world_size > num_samples:
            raise ValueError(
                f"A batch of {batch_size} images on {world_size} process{'es' * (world_size != 1)} needs "
                f"{batch_size * world_size} images, the data set has {num_samples}; the largest --batch-size that "
                f"works is {num_samples // world_size}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.groups = rank, world_size, groups
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, per process, wherever it starts."""
        return self.num_samples // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Selects the epoch, and the batch to start from where a run is resumed in the middle of one."""
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
        dtype = torch.int32 if self.num_samples < 2**31 else torch.int64  # half the memory for all but the largest
        order = torch.randperm(self.num_samples, generator=generator, dtype=dtype)[own].clone()
        return self._batches(order, torch.tensor(self.epoch).expand(len(order)), self.start_batch)

    def _batches(self, order: torch.Tensor, epochs: torch.Tensor, start: int) -> Iterator[list[tuple[int, int]]]:
        for begin in range(start * self.batch_size, len(order), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield [*zip(epochs[batch].tolist(), order[batch].tolist(), strict=True)]


def _named(source: Any, i: int, error: Exception) -> str:
    name, message = source.name(i), str(error)
    return message if name in message else f"{name}: {message}"


def check_readable(source: Any, tries: int = 32, look: Callable[[torch.Tensor], None] | None = None) -> Bad:
    """Decodes up to `tries` pictures spread over a map-style source, before a run is started on it.

    Args:
        source: With `name(i)`.
        tries: Largest number of images.
        look: Called with each image that can be decoded.

    Returns:
        `(index, message)` of those that cannot be decoded, some of them.

    Raises:
        ValueError: None can be decoded; up to three are named with their reasons.
    """
    count = max(1, min(tries, len(source)))
    indices = [i * len(source) // count for i in range(count)]
    bad: Bad = []
    for i in indices:
        try:
            image = source[i]
        except (ImageError, OSError) as error:
            bad.append((i, _named(source, i, error)))
            continue
        if look is not None:
            look(image)
    if len(bad) == len(indices):
        reasons = "\n".join(message for _, message in bad[:3])
        raise ValueError(f"None of {len(bad)} images tried (of {len(source)}) can be read, for example:\n{reasons}")
    return bad
