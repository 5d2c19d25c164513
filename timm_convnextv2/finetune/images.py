"""timm's scripts fed by this package's decoder: the data sets, transforms and batches that they get.

timm's own reader converts every image to 8-bit RGB or grey, which clips 16-bit values to white and drops bands. Here
`feed` replaces what a script uses to open its data. Images of 8 bits with 1 or 3 channels stay Pillow images and go
through timm's own transforms, collation and mixup: the same numbers as by the script alone (EXIF rotation apart, which
timm ignores). All others, 16-bit, float and with other numbers of channels, are tensors:

- geometry (crop, scale, ratio, flips, interpolation) is timm's, which takes tensors too; RandAugment, AutoAugment,
  colour jitter and grey conversion are for 8-bit images and are left out;
- where timm's prefetcher normalises, on the device and by mean and std in units of 255, a batch that is not all
  uint8 is float32 in these units. Where it does not, the transform normalises.
"""

import logging
import os
from collections.abc import Iterator, Mapping
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
from timm.data.scheduled_sampler import ScheduledTransformDataset
from timm.data.transforms import CenterCropOrPad, MaybePILToTensor, MaybeToTensor
from torch.utils.data import default_collate, get_worker_info
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomGrayscale, v2
from torchvision.transforms.v2.functional import to_pil_image

from ..console import say
from ..data import ImageError, Pixels, image_extensions
from ..data.formats.decode import from_pil, is_8_bit, printable, to_mode
from ..data.formats.pixels import PLAIN
from ..data.paths.walk import open_tar
from ..data.sources.stream import decode_undecoded, leave_undecoded, undecoded_picture
from ..data.sources.timm import decode_any
from .folders import FolderReader, is_opaque, split_folder

_logger = logging.getLogger(__name__)

# Of timm's transforms, those that are defined on 8-bit images only.
_COLOURS = (RandAugment, AutoAugment, AugMixAugment, ColorJitter, RandomGrayscale)


# ------------------------------------------------------------------------------------------------------------ data set


def _keep_8_bit(image: Image.Image, in_chans: int) -> Image.Image | torch.Tensor:
    """A Pillow image where timm's transforms are for it, else a tensor."""
    return to_mode(image, in_chans) if in_chans in (1, 3) and is_8_bit(image) else from_pil(image, in_chans)


def _pil_if_8_bit(image: Image.Image | torch.Tensor, in_chans: int) -> Image.Image | torch.Tensor:
    """What came as a tensor, from `.npy` or tifffile, as a Pillow image where timm's transforms are for it."""
    as_tensor = isinstance(image, torch.Tensor)
    return to_pil_image(image) if as_tensor and image.dtype == torch.uint8 and in_chans in (1, 3) else image


class Images(ImageDataset):
    """timm's `ImageDataset`, whose images are decoded as for pretraining.

    `dataset[i]` is `(image, target)`: before `transform` a Pillow image (8 bits, mode L or RGB), else a tensor
    `[C, H, W]` as of `load_image`. An image that cannot be decoded is replaced by the next one with a warning that
    names it, as timm does.

    Args:
        reader: One of timm's, or a `FolderReader`.
        in_chans: Channels that images are converted to.
        strict: An image that cannot be decoded is an error.
        pixels: How stored values become pixels, see `Pixels`.

    Raises:
        ValueError: By a sample: a package is missing; or, where it is strict, the image cannot be decoded.
        RuntimeError: By a sample: it and those that follow cannot be decoded.
    """

    def __init__(self, reader: Any, in_chans: int = 3, strict: bool = False, pixels: Pixels = PLAIN) -> None:
        super().__init__(None, reader=reader)
        self.in_chans, self.strict, self.pixels = in_chans, strict, pixels

    def load(self, index: int) -> tuple[Any, ...]:
        """Image, target and what else timm's reader gives, before any transform.

        Raises:
            ImageError, OSError: It cannot be read or decoded; names the file.
        """
        reader: Any = self.reader
        picture, *rest = reader[index]
        image = decode_any(picture, self.name(index), self.in_chans, pixels=self.pixels, convert=_keep_8_bit)
        return _pil_if_8_bit(image, self.in_chans), *rest

    def name(self, index: int) -> str:
        """File name of a sample, or its number where only reading the sample tells it."""
        known = hasattr(self.reader, "samples")
        return printable(str(self.filename(index, absolute=True))) if known else f"sample {index}"

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for _ in range(self._max_retries):
            try:
                image, target, *features = self.load(index)
                break
            except (ImageError, OSError) as e:
                if self.strict:
                    raise
                _logger.warning(f"Skipped: {e}")
                index = (index + 1) % len(self.reader)
        else:
            raise RuntimeError(f"{self._max_retries} images in a row cannot be read, the last: {self.name(index)}")
        image = image if self.transform is None else self.transform(image)
        target = -1 if target is None else target
        return (image, target, *features) if self.additional_features is not None else (image, target)


class TorchReader:
    """A map-style data set of torchvision as a reader for `Images`: what it finds, not decoded where that is a file."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "loader"):
            dataset.loader = os.fspath  # torchvision's would convert to 8-bit RGB

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[index]


class ImageStream(IterableImageDataset):
    """timm's `IterableImageDataset` for `wds/`, `hfids/` and `tfds/`, whose images are decoded as those of `Images`.

    Order and targets are timm's. An image that cannot be decoded is left out with a warning that names it. TensorFlow
    decodes those of `tfds/`, as 8 bits.

    Args:
        reader: timm's.
        name: Of the data set.
        input_key: Field that holds the image; of `wds/` several, separated by `;`.
        in_chans, strict, pixels: See `Images`.

    Raises:
        ValueError: By iteration: see `Images`; there are fewer shards than workers; or as many images in a row as timm
            retries cannot be decoded.
    """

    def __init__(
        self,
        reader: Any,
        name: str,
        input_key: str,
        in_chans: int = 3,
        strict: bool = False,
        pixels: Pixels = PLAIN,
    ) -> None:
        super().__init__(None, reader=reader)
        self.dataset_name, self.input_key = name, input_key
        self.in_chans, self.strict, self.pixels = in_chans, strict, pixels

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        leave_undecoded(self.reader, self.dataset_name, self.input_key, labelled=True)
        bad, reader = 0, iter(self.reader)  # type: ignore[arg-type]  # one of a stream
        for number, (item, target) in enumerate(reader):
            name, picture = undecoded_picture(item, f"{self.dataset_name} sample {number}")
            try:
                image = decode_undecoded(
                    picture, name, self.input_key, self.in_chans, pixels=self.pixels, convert=_keep_8_bit
                )
            except (ImageError, OSError) as e:
                bad += 1
                if self.strict or bad >= _ERROR_RETRY:
                    raise
                _logger.warning(f"Skipped: {e}")
                continue
            bad = 0
            image = _pil_if_8_bit(image, self.in_chans)
            image = image if self.transform is None else self.transform(image)
            yield image, target if self.target_transform is None else self.target_transform(target)


def probe(dataset: Images, tries: int = 32) -> str:
    """Decodes images spread over a data set before a script is started on it.

    Returns:
        What is not 8-bit about them, such as 'float32 with 3 channels'; empty where all are.

    Raises:
        ValueError: None can be decoded; names the first. Or a package is missing.
    """
    n, kinds, bad = max(1, min(tries, len(dataset))), {}, []
    for i in (k * len(dataset) // n for k in range(n)):
        try:
            image = dataset.load(i)[0]
        except (ImageError, OSError) as e:
            bad.append(str(e))
            continue
        if isinstance(image, torch.Tensor):
            kinds[f"{'8-bit' if image.dtype == torch.uint8 else 'not 8-bit'} with {len(image)} channels"] = None
    if len(bad) == n:
        raise ValueError(f"None of {n} images tried (of {len(dataset)}) can be read, for example: {bad[0]}")
    return ", ".join(kinds)


def refuse_for_tensors(kinds: str, options: dict[str, Any], crop_mode: str | None) -> None:
    """Refuses what timm has for 8-bit images only, and what would stop the script at some image.

    Args:
        kinds: What is not 8-bit RGB or grey about the images, see `probe`; empty where all are.
        options: Of a script of timm.
        crop_mode: For evaluation, as timm resolves it.

    Raises:
        ValueError: Names the option and what to use instead.
    """
    mixes = options.get("mixup") or options.get("cutmix") or options.get("cutmix_minmax")
    wrong = {
        "--crop-mode border": (crop_mode == "border", "use --crop-mode center or squash"),
        "--mixup-mode half": (mixes and options.get("mixup_mode") == "half", "use batch, pair or elem"),
        "--naflex-loader": (options.get("naflex_loader"), "leave it out"),
        "--tf-preprocessing": (options.get("tf_preprocessing"), "leave it out"),
    }
    for option, (there, remedy) in wrong.items():
        if kinds and there:
            raise ValueError(f"{option} is for 8-bit RGB or grey, and there are images {kinds}: {remedy}.")


# --------------------------------------------------------------------------------------------------------- transforms


def _is_colour(step: Any) -> bool:
    inner = step.transforms[0] if isinstance(step, RandomApply) else step
    return isinstance(inner, _COLOURS)


def _times_255(image: torch.Tensor) -> torch.Tensor:
    """uint8 as it is, float in the units of timm's prefetcher, 0..255."""
    return image if image.dtype == torch.uint8 else image * 255


class ByKind:
    """One of timm's transforms for Pillow images, and the same geometry for tensors `[C, H, W]`.

    Args:
        transform: What `timm.data.create_transform` made: ends in a uint8 tensor, or in a normalised one.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        steps = transform.transforms if isinstance(transform, Compose) else [transform]
        self.left_out = [step for step in steps if _is_colour(step)]
        swap = {MaybeToTensor: v2.ToDtype(torch.float32, scale=True), MaybePILToTensor: _times_255}
        self.steps = [swap.get(type(step), step) for step in steps if not _is_colour(step)]

    def __call__(self, image: Any) -> torch.Tensor:
        if not isinstance(image, torch.Tensor):
            return self.transform(image)
        self._tell()
        for step in self.steps:
            if isinstance(step, CenterCropOrPad) and isinstance(step.fill, list | tuple):
                raise ValueError("--crop-mode border is for 8-bit images; use center or squash.")
            image = step(image)
        return image

    def _tell(self) -> None:
        """Says once what the images do without."""
        worker = get_worker_info()
        if self.left_out and (worker is None or worker.id == 0):
            names = ", ".join(type(step).__name__ for step in self.left_out)
            _logger.warning(f"Left out for images that are not 8-bit RGB or grey: {names}.")
        self.left_out = []


def _by_kind(dataset: Any) -> None:
    """Lets the transforms that timm's loader gave a data set, or the data set around it, take tensors too."""
    if isinstance(dataset, ScheduledTransformDataset):
        dataset.transforms = tuple(ByKind(transform) for transform in dataset.transforms)
    elif isinstance(dataset, AugMixDataset):
        dataset.transform = tuple(ByKind(x) for x in (dataset.transform, dataset.augmentation, dataset.normalize))
    else:
        dataset.transform = ByKind(dataset.transform)


# -------------------------------------------------------------------------------------------------------------- batches


def collate(batch: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's `fast_collate`; float32 in 0..255 where not all images are uint8, which timm would truncate."""
    views = [x if isinstance(x, tuple) else (x,) for x, *_ in batch]  # of AugMix several of each image
    if all(view.dtype == torch.uint8 for image in views for view in image):
        return fast_collate(batch)
    images = torch.stack([image[k].float() for k in range(len(views[0])) for image in views])
    targets = default_collate([sample[1] for sample in batch])
    return images, targets.repeat(len(views[0]), *[1] * (targets.ndim - 1))


class CollateMixup(FastCollateMixup):
    """timm's mixup and cutmix in collation; on float32 in 0..255 where not all images are uint8."""

    def __call__(self, batch: list[tuple], _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        if all(image.dtype == torch.uint8 for image, *_ in batch):
            return super().__call__(batch)
        if self.mode == "half":
            raise ValueError("--mixup-mode half is for 8-bit images; use batch, pair or elem.")
        return Mixup.__call__(self, *collate(batch))


# ---------------------------------------------------------------------------------------------------- for the scripts


def create_dataset(
    name: str = "",
    root: str | None = None,
    split: str = "validation",
    class_map: Any = "",
    load_bytes: bool = False,
    input_key: str | None = None,
    *,
    in_chans: int,
    strict: bool = False,
    pixels: Pixels = PLAIN,
    class_to_idx: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's `create_dataset`; folders, tars, `hfds/` and `torch/` give `Images`, streams `ImageStream`.

    Args:
        name, root, split, class_map, load_bytes, input_key, kwargs: timm's.
        in_chans, strict, pixels: See `Images`.
        class_to_idx: Class by the name of its folder, instead of `class_map`.

    Raises:
        ValueError: A folder or tar has no image, or the data set has not as many channels.
    """
    prefix = name.partition("/")[0].lower() if is_opaque(name) else ""
    if root is not None and os.path.isdir(root) and not is_opaque(name) and not load_bytes:
        reader = FolderReader(split_folder(root, split), class_to_idx or class_map, input_key)
        return Images(reader, in_chans, strict, pixels)
    if root is not None and root.lower().endswith(".tar") and os.path.isfile(root) and not prefix and not load_bytes:
        tar, left = open_tar(root, class_map, input_key.lower().split(";") if input_key else None)
        if str(left):
            say(f"{root}: {left}")
        return Images(tar, in_chans, strict, pixels)
    if prefix == "tfds" and in_chans not in (1, 3):
        raise ValueError(f"Data set '{name}' gives images with 1 or 3 channels, got {in_chans}.")
    if prefix == "wds":
        input_key = input_key or ";".join(extension[1:] for extension in image_extensions())
    if prefix in ("wds", "hfids"):
        kwargs["input_img_mode"] = ""
    dataset = timm.data.create_dataset(
        name, root=root, split=split, class_map=class_map, load_bytes=load_bytes, input_key=input_key, **kwargs
    )
    if load_bytes:
        return dataset
    if isinstance(dataset, IterableImageDataset):
        return ImageStream(dataset.reader, name, input_key or "image", in_chans, strict, pixels)
    if prefix == "torch":
        return Images(TorchReader(dataset), in_chans, strict, pixels)
    if type(dataset) is not ImageDataset:
        return dataset
    images = Images(dataset.reader, in_chans, strict, pixels)
    images.additional_features = dataset.additional_features
    return images


def create_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """timm's `create_loader`, for the images of `Images` and `ImageStream`."""
    base = dataset
    while not isinstance(base, Images | ImageStream) and hasattr(base, "dataset"):
        base = base.dataset
    if not isinstance(base, Images | ImageStream):
        return timm.data.create_loader(dataset, *args, **kwargs)
    if kwargs.get("use_prefetcher", True) and kwargs.get("collate_fn") is None:
        kwargs["collate_fn"] = collate
    loader = timm.data.create_loader(dataset, *args, **kwargs)
    _by_kind(loader.dataset)
    return loader


def feed(
    script: ModuleType,
    *,
    in_chans: int,
    strict: bool = False,
    pixels: Pixels = PLAIN,
    class_to_idx: Mapping[str, int] | None = None,
) -> None:
    """Lets one of timm's scripts, imported, read its images by this package's decoder.

    Args:
        script: train.py, validate.py or inference.py.
        in_chans, strict, pixels, class_to_idx: See `create_dataset`.
    """
    reading: dict[str, Any] = dict(in_chans=in_chans, strict=strict, pixels=pixels, class_to_idx=class_to_idx)
    opened = partial(create_dataset, **reading)
    vars(script).update(create_dataset=opened, create_loader=create_loader, FastCollateMixup=CollateMixup)
