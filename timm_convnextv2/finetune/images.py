"""timm's scripts fed by this package's decoder: the data sets, transforms and batches that they get.

timm's own reader converts every image to 8-bit RGB or grey, which clips 16-bit values to white and drops bands. `feed`
replaces the functions with which a script opens its data. Images of 8 bits with 1 or 3 channels stay Pillow images and
give the numbers of the script alone (except for EXIF rotation, which timm ignores). All others are tensors: their
geometry (crop, scale, ratio, flips, interpolation) is timm's; RandAugment, AutoAugment, colour jitter and grey
conversion are for 8-bit images and are left out. timm's prefetcher normalises in units of 255, so a batch that is not
all uint8 is float32 in these units.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, IterableImageDataset, Mixup
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.dataset import _ERROR_RETRY
from timm.data.loader import fast_collate
from timm.data.readers.reader import Reader
from timm.data.scheduled_sampler import ScheduledTransformDataset
from timm.data.transforms import CenterCropOrPad, MaybePILToTensor, MaybeToTensor
from torch.utils.data import default_collate, get_worker_info
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomGrayscale, v2
from torchvision.transforms.v2.functional import to_pil_image

from ..console import count, say
from ..data import ImageError, Pixels, image_extensions
from ..data.formats.errors import listed
from ..data.formats.files import printable
from ..data.formats.pillow import from_pil, is_8_bit, to_mode
from ..data.formats.pixels import PLAIN
from ..data.paths.walk import open_tar
from ..data.sources.stream import leave_undecoded, undecoded_image
from ..data.sources.timm import decode_any
from ..runs.errors import DataError
from .folders import FolderReader, opaque_prefix, split_folder

_logger = logging.getLogger(__name__)

# those of timm's transforms that are defined on 8-bit images only
_COLOURS = (RandAugment, AutoAugment, AugMixAugment, ColorJitter, RandomGrayscale)


@dataclass
class Kept:
    """The images that a script gets if it leaves out those that cannot be decoded, by their numbers in `dataset`."""

    max_bad: float  # fraction of the images that may be left out
    dataset: Any = None  # set by the script's `create_dataset`
    numbers: list[int] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Why images were left out, one reason per image."""
        reasons = []
        for number in sorted({*range(len(self.dataset or ()))} - {*self.numbers}):
            try:
                self.dataset.load(number)
            except (ImageError, OSError) as e:
                reasons.append(str(e))
        return reasons

    def check(self) -> None:
        """Refuses more images that cannot be decoded than `max_bad` allows."""
        total, bad = len(self.dataset), len(self.dataset) - len(self.numbers)
        if bad > self.max_bad * total or bad == total:
            what = f"{bad} of {total} images cannot be decoded, more than --max-bad-images {self.max_bad:g} allows"
            raise DataError(f"{what}; nothing was written:\n{listed(self.left_out(), 10)}")


@dataclass(frozen=True)
class Reading:
    """How a script reads images.

    An image that cannot be decoded is replaced by the next one, with a warning that names it; in a stream, and with
    `kept`, it is left out.
    """

    in_chans: int = 3  # images are converted to it
    pixels: Pixels = PLAIN
    kept: Kept | None = None

    def convert(self, image: Image.Image, in_chans: int) -> Image.Image | torch.Tensor:
        """A Pillow image if timm's transforms are for it, else a tensor."""
        return to_mode(image, in_chans) if in_chans in (1, 3) and is_8_bit(image) else from_pil(image, in_chans)

    def decode(self, image: Any, name: str) -> Image.Image | torch.Tensor:
        """An image of 8 bits with 1 or 3 channels as a Pillow image, any other as a tensor `[C, H, W]`."""
        image = decode_any(image, name, in_chans=self.in_chans, pixels=self.pixels, convert=self.convert)
        # .npy and tifffile give tensors of 8-bit images too
        small = isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and self.in_chans in (1, 3)
        return to_pil_image(image) if small else image


class Images(ImageDataset):
    """timm's `ImageDataset` with images decoded as in pretraining; `dataset[i]` is `(image, target)`.

    `reader` is a reader of timm, a `FolderReader`, or a map-style data set of torchvision.
    """

    def __init__(self, reader: Any, reading: Reading = Reading()) -> None:  # noqa: B008  frozen
        super().__init__(None, reader=reader)
        self.reading = reading

    def load(self, index: int) -> tuple[Any, ...]:
        """Image, target and other values of timm's reader, before any transform."""
        reader: Any = self.reader
        image, *rest = reader[index]
        return self.reading.decode(image, self.name(index)), *rest

    def name(self, index: int) -> str:
        """File name of a sample, or its number if only reading the sample gives the name."""
        known = isinstance(self.reader, Reader) and hasattr(self.reader, "samples")
        return printable(str(self.filename(index, absolute=True))) if known else f"sample {index}"

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """timm's, but with `Reading.kept` one name for each image that was kept, relative to the folder of the images.

        Base names would be the same for different images.
        """
        if self.reading.kept is None:
            return list(map(str, super().filenames(basename, absolute)))
        known = hasattr(self.reader, "samples")
        return [str(self.filename(i)) if known else f"sample {i}" for i in self.reading.kept.numbers]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for _ in range(self._max_retries):
            try:
                image, target, *features = self.load(index)
                break
            except (ImageError, OSError) as e:
                if self.reading.kept:
                    return None, index
                _logger.warning(f"Skipped: {e}")
                index = (index + 1) % len(self.reader)
        else:
            raise RuntimeError(f"{self._max_retries} images in a row cannot be read, the last: {self.name(index)}")
        image = image if self.transform is None else self.transform(image)
        target = index if self.reading.kept else -1 if target is None else target
        return (image, target, *features) if self.additional_features is not None else (image, target)


class ImageStream(IterableImageDataset):
    """timm's `IterableImageDataset` for `wds/`, `hfids/` and `tfds/`, with images decoded as by `Images`.

    Order and targets are timm's. TensorFlow decodes the images of `tfds/`, as 8 bits.
    """

    def __init__(self, reader: Any, name: str, input_key: str, reading: Reading) -> None:
        super().__init__(None, reader=reader)
        self.dataset_name, self.input_key, self.reading = name, input_key, reading

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        leave_undecoded(self.reader, self.dataset_name, self.input_key, labelled=True)
        bad, reader = 0, iter(self.reader)  # type: ignore[arg-type]  # timm's readers of streams are iterable
        for number, (item, target) in enumerate(reader):
            name, stored = undecoded_image(item, f"{self.dataset_name} sample {number}")
            try:
                image = self.reading.decode(stored, name)
            except (ImageError, OSError) as e:
                bad += 1
                if bad >= _ERROR_RETRY:
                    raise
                _logger.warning(f"Skipped: {e}")
                continue
            bad = 0
            image = image if self.transform is None else self.transform(image)
            yield image, target if self.target_transform is None else self.target_transform(target)


def probe(dataset: Images, tries: int = 32) -> str:
    """Decodes images spread over a data set; returns the kinds of tensors, such as 'not 8-bit with 3 channels'."""
    n, kinds, bad = max(1, min(tries, len(dataset))), [], []
    for i in (k * len(dataset) // n for k in range(n)):
        try:
            image = dataset.load(i)[0]
        except (ImageError, OSError) as e:
            bad.append(str(e))
            continue
        if isinstance(image, torch.Tensor):
            depth = "8-bit" if image.dtype == torch.uint8 else "not 8-bit"
            kinds.append(f"{depth} with {count(len(image), 'channel')}")
    if len(bad) == n:
        raise ValueError(f"None of {n} images tried (of {len(dataset)}) can be read, for example: {bad[0]}")
    return ", ".join(dict.fromkeys(kinds))


def refuse_for_tensors(kinds: str, options: Mapping[str, Any], crop_mode: str | None) -> None:
    """Refuses options that timm has for 8-bit images only, if there are `kinds` of other images; see `probe`."""
    mixes = options.get("mixup") or options.get("cutmix") or options.get("cutmix_minmax")
    wrong = {
        "--crop-mode border": (crop_mode == "border", "use --crop-mode center or squash"),
        "--mixup-mode half": (mixes and options.get("mixup_mode") == "half", "use batch, pair or elem"),
        "--naflex-loader": (options.get("naflex_loader"), "leave it out"),
        "--tf-preprocessing": (options.get("tf_preprocessing"), "leave it out"),
    }
    for option, (is_set, remedy) in wrong.items() if kinds else ():
        if is_set:
            raise ValueError(f"{option} is for 8-bit RGB or grey, and there are images {kinds}: {remedy}.")


def _is_colour(step: Any) -> bool:
    return isinstance(step.transforms[0] if isinstance(step, RandomApply) else step, _COLOURS)


def _times_255(image: torch.Tensor) -> torch.Tensor:
    """uint8 unchanged, float in the units of timm's prefetcher, 0..255."""
    return image if image.dtype == torch.uint8 else image * 255


class ByKind:
    """A transform of `timm.data.create_transform` for Pillow images, and its geometry for tensors `[C, H, W]`."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        steps = transform.transforms if isinstance(transform, Compose) else [transform]
        self.left_out = [type(step).__name__ for step in steps if _is_colour(step)]
        swap = {MaybeToTensor: v2.ToDtype(torch.float32, scale=True), MaybePILToTensor: _times_255}
        self.steps = [swap.get(type(step), step) for step in steps if not _is_colour(step)]

    def __call__(self, image: Any) -> torch.Tensor:
        if not isinstance(image, torch.Tensor):
            return self.transform(image)
        worker = get_worker_info()
        if self.left_out and (worker is None or worker.id == 0):  # once, and from one data worker only
            _logger.warning(f"Left out for images that are not 8-bit RGB or grey: {', '.join(self.left_out)}.")
        self.left_out = []
        for step in self.steps:
            if isinstance(step, CenterCropOrPad) and isinstance(step.fill, list | tuple):
                raise ValueError("--crop-mode border is for 8-bit images; use center or squash.")
            image = step(image)
        return image


def _by_kind(dataset: Any) -> None:
    """Lets the transforms that timm's loader gave a data set, or the data set around it, take tensors too."""
    if isinstance(dataset, ScheduledTransformDataset):
        dataset.transforms = tuple(ByKind(transform) for transform in dataset.transforms)
    elif isinstance(dataset, AugMixDataset):
        dataset.transform = tuple(ByKind(x) for x in (dataset.transform, dataset.augmentation, dataset.normalize))
    else:
        dataset.transform = ByKind(dataset.transform)


def collate(batch: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's `fast_collate`; float32 in 0..255 unless all images are uint8, because timm would truncate."""
    views = [x if isinstance(x, tuple) else (x,) for x, *_ in batch]  # AugMix gives several of each image
    if all(view.dtype == torch.uint8 for image in views for view in image):
        return fast_collate(batch)
    images = torch.stack([image[k].float() for k in range(len(views[0])) for image in views])
    targets = default_collate([sample[1] for sample in batch])
    return images, targets.repeat(len(views[0]), *[1] * (targets.ndim - 1))


class CollateMixup(FastCollateMixup):
    """timm's mixup and cutmix in collation; on float32 in 0..255 unless all images are uint8."""

    def __call__(self, batch: list[tuple], _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        if all(image.dtype == torch.uint8 for image, *_ in batch):
            return super().__call__(batch)
        if self.mode == "half":
            raise ValueError("--mixup-mode half is for 8-bit images; use batch, pair or elem.")
        return Mixup.__call__(self, *collate(batch))


def create_dataset(
    name: str = "", root: str | None = None, split: str = "validation", *, reading: Reading,
    readers: Mapping[str, FolderReader] | None = None, **kwargs: Any
) -> Any:  # fmt: skip
    """timm's `create_dataset`; folders, tars, `hfds/` and `torch/` give `Images`, streams `ImageStream`.

    `readers` has the splits that are open already, by name.
    """
    if readers and split in readers:
        return Images(readers[split], reading)
    class_map, input_key = kwargs.get("class_map", ""), kwargs.get("input_key")
    prefix = opaque_prefix(name)
    if root is not None and not prefix:
        if os.path.isdir(root):
            return Images(FolderReader(split_folder(root, split), class_map, input_key), reading)
        if root.lower().endswith(".tar") and os.path.isfile(root):
            tar, left = open_tar(root, class_map, input_key.lower().split(";") if input_key else None)
            if str(left):
                say(f"{root}: {left}")
            return Images(tar, reading)
    if prefix == "tfds" and reading.in_chans not in (1, 3):
        raise ValueError(f"Data set '{name}' gives images with 1 or 3 channels, got {reading.in_chans}.")
    if prefix == "wds" and not input_key:
        kwargs["input_key"] = ";".join(extension[1:] for extension in image_extensions())
    if prefix in ("wds", "hfids"):
        kwargs["input_img_mode"] = ""  # else timm's reader converts
    dataset: Any = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    if isinstance(dataset, IterableImageDataset):
        return ImageStream(dataset.reader, name, kwargs.get("input_key") or "image", reading)
    if prefix == "torch":
        if hasattr(dataset, "loader"):
            dataset.loader = os.fspath  # torchvision's would convert to 8-bit RGB
        return Images(dataset, reading)
    if type(dataset) is not ImageDataset:
        return dataset
    images = Images(dataset.reader, reading)
    images.additional_features = dataset.additional_features
    return images


class _KeptOnly:
    """A loader whose targets are the numbers of its images: records them, and gives no empty batches."""

    def __init__(self, loader: Any, kept: Kept) -> None:
        self.loader, self.kept = loader, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.kept.numbers.clear()
        for images, numbers in self.loader:
            self.kept.numbers += numbers.tolist()
            if len(numbers):
                yield images, numbers
        self.kept.check()


def _collate_kept(batch: list[tuple], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`collate` of the images that could be decoded."""
    if kept := [sample for sample in batch if sample[0] is not None]:
        return collate(kept)
    return torch.empty(0, channels, 1, 1), torch.empty(0, dtype=torch.long)


def create_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """timm's `create_loader`, for the images of `Images` and `ImageStream`."""
    base = dataset
    while not isinstance(base, Images | ImageStream) and hasattr(base, "dataset"):
        base = base.dataset
    ours = isinstance(base, Images | ImageStream)
    if ours and kwargs.get("use_prefetcher", True) and kwargs.get("collate_fn") is None:
        kwargs["collate_fn"] = collate
    kept = base.reading.kept if isinstance(base, Images) else None
    if kept is not None:
        kept.dataset, kwargs["collate_fn"] = base, partial(_collate_kept, channels=base.reading.in_chans)
    loader = timm.data.create_loader(dataset, *args, **kwargs)
    if ours:
        _by_kind(loader.dataset)
    return loader if kept is None else _KeptOnly(loader, kept)


def feed(script: ModuleType, reading: Reading, readers: Mapping[str, FolderReader] | None = None) -> None:
    """Lets an imported script of timm read its images by this package's decoder; see `create_dataset`."""
    opened = partial(create_dataset, reading=reading, readers=readers)
    vars(script).update(create_dataset=opened, create_loader=create_loader, FastCollateMixup=CollateMixup)
