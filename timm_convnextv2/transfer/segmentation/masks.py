"""Images and the masks with the classes of their pixels: two folders, their checks, and the transform of training."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from ...data import FolderSource, Pixels, check_readable, load_image, sample_seed
from ...data.formats.decode import printable
from ...data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, check_size, open_image_file
from ...data.formats.pixels import PLAIN
from ...data.sources.folder import ImageFiles
from ..unreadable import naming

MASK_FOLDERS = ("masks", "annotations", "labels")
SPLITS = {"train": TRAIN_FOLDERS, "validation": VALIDATION_FOLDERS, "test": ("test", "testing")}
SHOWN = 3  # names in a message


def load_mask(path: str | os.PathLike) -> np.ndarray:
    """The values of a mask, int64 `[H, W]`: a palette image's indices, or the values of an image with one channel.

    Raises:
        ValueError: The file cannot be decoded, has colours instead of indices, or is a JPEG, whose values are inexact.
    """
    name = printable(path)
    try:
        with open_image_file(os.fspath(path)) as file, Image.open(file) as image:
            check_size(image.height, image.width)
            if image.format == "JPEG":
                raise ValueError("is a JPEG, whose values are not exact; expected a PNG")
            if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                raise ValueError(
                    f"has colours (mode {image.mode}), expected an index in each pixel: a palette or grey PNG"
                )
            return np.array(image).astype(np.int64)
    except Exception as e:  # decoders raise nearly anything
        what = str(e) if isinstance(e, ValueError) else f"cannot be decoded ({type(e).__name__}: {e})"
        raise ValueError(f"{name} {what}".replace(f"{name} {name}", name)) from e


def read_classes(path: str | os.PathLike) -> list[str]:
    """The names of the classes: line i of a text file is that of index i, the first is 0.

    Raises:
        ValueError: It cannot be read, has fewer than two names, an empty line between them, or a name twice.
    """
    shown = printable(path)
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(
            f"The class names '{shown}' cannot be read ({e}). Write one name a line; line 1 is the name of index 0."
        ) from e
    empty = [i for i, name in enumerate(names, 1) if not name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if empty or (twice and any(twice)) or len(names) < 2:
        what = f"no name in line {empty[0]}" if empty else f"{', '.join(twice)} twice" if twice else f"names: {names}"
        raise ValueError(f"The class names '{shown}' have {what}; expected two or more names, one a line.")
    return names


class MaskedImages(Dataset):
    """Images and their masks, matched by their paths below the two folders without the endings.

    Args:
        images: Folder of the images.
        masks: Folder of the masks.
        classes: Names of the classes by index.
        in_chans: Channels of the images, see `data.load_image`.
        pixels: How stored values become pixels, see `Pixels`.
        ignore_index: Value of pixels without a class, in the masks and in what comes of them.
        reduce_zero_label: 0 in a mask means no class, and class i is written as i + 1, as in ADE20K.

    Attributes:
        unused: Masks without an image.

    Raises:
        ValueError: A folder is missing or has no images, images have no mask, or several have the same stem.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        masks: str | os.PathLike,
        classes: Sequence[str],
        *,
        in_chans: int = 3,
        pixels: Pixels = PLAIN,
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
    ) -> None:
        self.classes, self.ignore_index, self.reduce_zero_label = list(classes), ignore_index, reduce_zero_label
        if 0 <= ignore_index < len(self.classes):
            raise ValueError(
                f"The ignore index {ignore_index} is the index of the class '{self.classes[ignore_index]}'. Choose one "
                f"outside of 0..{len(self.classes) - 1}, or reduce_zero_label if 0 means no class."
            )
        found, there = paths_by_stem(images), paths_by_stem(masks)
        lost = [path for stem, path in found.items() if stem not in there]
        if lost:
            raise ValueError(
                f"{_count(lost, found, 'images have')} no mask in '{printable(masks)}': {_first(lost)}. A mask has the "
                "image's path below its folder, with any ending."
            )
        self.masks = [there[stem] for stem in found]
        self.unused = [path for stem, path in there.items() if stem not in found]
        self.source = ImageFiles(list(found.values()), in_chans, pixels)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """`(image, target)`: the image as `data.load_image` gives it, `[C, H, W]`; classes, int64 `[H, W]`."""
        with naming(f"The image {self.name(i)} with its mask"):
            return self.source[i], torch.from_numpy(self._classes_of(load_mask(self.masks[i])))

    def name(self, i: int) -> str:
        """Path of image `i`, safe to print."""
        return self.source.name(i)

    def _classes_of(self, mask: np.ndarray) -> np.ndarray:
        if not self.reduce_zero_label:
            return mask
        return np.where((mask == 0) | (mask == self.ignore_index), self.ignore_index, mask - 1)

    def check(self, workers: int = 8) -> np.ndarray:
        """Reads all masks and the size of all images before a run begins.

        Args:
            workers: Threads that read.

        Returns:
            Pixels of each class, int64 `[num_classes]`.

        Raises:
            ValueError: Says all that is wrong, with counts and the first names.
        """
        with ThreadPoolExecutor(workers) as pool:
            looks = list(pool.map(self._look, range(len(self))))
        faults = []
        for kind, what in (
            ("error", "masks or their images cannot be read"),
            ("size", "masks have another size than their images"),
            ("above", f"masks have indices of no class (there are {len(self.classes)}, {self._span()})"),
        ):
            bad = [getattr(look, kind) for look in looks if getattr(look, kind)]
            if bad:
                faults.append(f"{_count(bad, looks, what)}: {_first(bad)}")
        torn = [message for _, message in check_readable(self.source)] if not faults else []
        if torn:
            faults.append(
                f"{len(torn)} of {min(32, len(self))} images tried cannot be decoded: {'; '.join(torn[:SHOWN])}"
            )
        counts = np.sum([look.counts for look in looks], axis=0)
        if not faults and not counts.sum():
            faults.append(f"no pixel of {len(self)} masks has a class")
        if faults:
            root = printable(os.path.dirname(self.masks[0]))
            raise ValueError(f"The masks in '{root}' cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
        return counts

    def _span(self) -> str:
        start = int(self.reduce_zero_label)
        return f"{start} to {len(self.classes) - 1 + start}, and {self.ignore_index} for none"

    def _look(self, i: int) -> "_Look":
        none, name = np.zeros(len(self.classes), dtype=np.int64), printable(self.masks[i])
        try:
            mask = load_mask(self.masks[i])
            size = _image_size(self.source, i)
        except ValueError as e:
            return _Look(none, error=str(e))
        if mask.shape != size:
            return _Look(none, size=f"{name} {mask.shape[0]} x {mask.shape[1]}, image {size[0]} x {size[1]}")
        values, counts = np.unique(self._classes_of(mask), return_counts=True)
        known = (values >= 0) & (values < len(self.classes))
        others = values[~known & (values != self.ignore_index)] + int(self.reduce_zero_label)
        none[values[known]] = counts[known]
        return _Look(none, above=f"{name} has {', '.join(map(str, others[:5]))}" if len(others) else "")


class _Look(NamedTuple):
    """What was found in a mask: pixels of each class, and its faults."""

    counts: np.ndarray
    error: str = ""
    size: str = ""
    above: str = ""


def _image_size(source: ImageFiles, i: int) -> tuple[int, int]:
    """Height and width; from the file's head where Pillow reads the whole format."""
    path = source.path(i)
    if not path.lower().endswith((".npy", ".tif", ".tiff")):
        try:
            with open_image_file(path) as file, Image.open(file) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (image.width, image.height) if turned else (image.height, image.width)
        except Exception as e:
            raise ValueError(f"{printable(path)} cannot be decoded ({type(e).__name__}: {e})") from e
    height, width = load_image(path, source.in_chans, source.pixels).shape[-2:]
    return height, width


def paths_by_stem(root: str | os.PathLike) -> dict[str, str]:
    """The images below a folder by their path in it without ending, in order."""
    source = FolderSource(root)
    paths = sorted(source.path(i) for i in range(len(source)))
    found: dict[str, str] = {}
    twice = []
    for path in paths:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        if stem in found:
            twice.append(path)
        found[stem] = path
    if twice:
        raise ValueError(
            f"{_count(twice, paths, 'files have')} the name of another in '{printable(root)}' but for the ending: "
            f"{_first(twice)}. Which belongs to which mask is not known; rename or remove them."
        )
    return found


def _count(bad: Sequence, all_of: Sequence | dict, what: str) -> str:
    return f"{len(bad)} of {len(all_of)} {what}"


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:SHOWN])
    return shown + (", ..." if len(names) > SHOWN else "")


def open_split(root: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """The folders of images and masks of a split.

    Args:
        root: With `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`; the masks' folder may also be
            called annotations or labels, the splits have timm's names for them (training, val, ...).
        split: 'train', 'validation' or 'test'.

    Raises:
        ValueError: There are no such folders.
    """
    root = Path(root)
    for name in SPLITS[split]:
        for masks in MASK_FOLDERS:
            for pair in ((root / name / "images", root / name / masks), (root / "images" / name, root / masks / name)):
                if all(path.is_dir() for path in pair):
                    return pair
    raise ValueError(
        f"'{printable(root)}' has no images and masks of the split '{split}'; expected {split}/images and "
        f"{split}/masks, or images/{split} and masks/{split} (masks may be called {' or '.join(MASK_FOLDERS[1:])}, "
        f"{split} {' or '.join(SPLITS[split][1:])})."
    )


class TrainTransform:
    """What training does to an image and its mask together: scale, crop, flip, and colours of three channels.

    Args:
        size: Side of the square crops in pixels.
        fill: Value a channel, in 0..1, of what lies beyond the image.
        scale: Smallest and largest factor of the image's size.
        short_side: Pixels that the shorter side has at factor 1; None leaves the image's own.
        hflip: Probability of a horizontal flip.
        vflip: Likewise, vertical.
        colours: Distort brightness, contrast, saturation and hue of images with three channels.
        ignore_index: Class of what lies beyond the image.
    """

    def __init__(
        self,
        size: int,
        fill: Sequence[float],
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        hflip: float = 0.5,
        vflip: float = 0.0,
        colours: bool = True,
        ignore_index: int = 255,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"The scale is {scale}, expected two factors above 0, the smaller first (--scale).")
        self.size, self.scale, self.short_side, self.ignore_index = size, scale, short_side, ignore_index
        fills = {tv_tensors.Image: list(fill), tv_tensors.Mask: ignore_index}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fills)  # pyright: ignore[reportArgumentType]
        self.flips = v2.Compose([v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)])
        self.colours = v2.RandomPhotometricDistort() if colours and len(fill) == 3 else v2.Identity()

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Image `[C, H, W]` and classes `[H, W]` to a float image `[C, size, size]` and classes `[size, size]`."""
        x, y = tv_tensors.Image(as_float(image)), tv_tensors.Mask(target)
        height, width = target.shape
        factor = float(torch.empty(()).uniform_(*self.scale))
        factor *= 1 if self.short_side is None else self.short_side / min(height, width)
        shape = [max(1, round(height * factor)), max(1, round(width * factor))]
        x, y = V.resize(x, shape), V.resize(y, shape)
        x, y = self.flips(*self._varied_crop(x, y))
        return self.colours(x).as_subclass(Tensor), y.as_subclass(Tensor)

    def _varied_crop(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A crop in which no class has more than three quarters of the pixels, if one of ten is such."""
        for _ in range(9):
            crop = self.crop(x, y)
            counts = crop[1][crop[1] != self.ignore_index].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                return crop
        return self.crop(x, y)


def as_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 as float in 0..1; floats as they are."""
    return image.div(255) if image.dtype == torch.uint8 else image


class TrainSamples(Dataset):
    """Samples `(image, target)` for `loop.create_loader`, of which all that is random depends on (seed, epoch, index).

    Args:
        data: The images.
        transform: See `TrainTransform`.
        seed: Of what is random.
    """

    def __init__(self, data: MaskedImages, transform: TrainTransform, seed: int = 0) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sample = self.data[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
            return self.transform(*sample)
