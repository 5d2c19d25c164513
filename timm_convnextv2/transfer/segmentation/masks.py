"""Images and masks of pixel classes: two folders, their checks, and the transform of training."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from ...data import FolderSource, Pixels, check_readable
from ...data.formats.decode import open_scene
from ...data.formats.errors import naming
from ...data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, check_size, open_image_file, printable
from ...data.formats.pixels import PLAIN
from ...data.formats.tiff import sparse_values
from ...data.sources.files import ImageFiles
from ..backbone import as_float
from ..figures import first

MASK_FOLDERS = ("masks", "annotations", "labels")
SPLITS = {"train": TRAIN_FOLDERS, "validation": VALIDATION_FOLDERS, "test": ("test", "testing")}


def load_mask(path: str | os.PathLike) -> np.ndarray:
    """The values of a mask, int64 `[H, W]`: the indices of a palette image, or the values of a one-channel image."""
    name = printable(path)
    try:
        with open_image_file(os.fspath(path)) as file, Image.open(file) as image:
            check_size(image.height, image.width)
            if (values := sparse_values(file)) is not None:
                return values.astype(np.int64)
            if image.format == "JPEG":
                raise ValueError("is a JPEG, whose values are not exact; expected a PNG")
            if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                raise ValueError(f"has colours (mode {image.mode}), expected class indices: a palette or grey PNG")
            return np.array(image).astype(np.int64)
    except Exception as e:  # decoders raise nearly anything
        what = str(e) if isinstance(e, ValueError) else f"cannot be decoded ({type(e).__name__}: {e})"
        raise ValueError(f"{name} {what}".replace(f"{name} {name}", name)) from e


def read_classes(path: str | os.PathLike) -> list[str]:
    """Class names from a text file: line 1 is the name of index 0."""
    shown = printable(path)
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(
            f"The class names '{shown}' cannot be read ({e}). Write one name per line; line 1 is the name of index 0."
        ) from e
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if not all(names) or duplicates or len(names) < 2:
        what = f"duplicates: {', '.join(duplicates)}" if duplicates else f"names: {names}"
        what = what if all(names) else f"no name in line {names.index('') + 1}"
        raise ValueError(f"The class names '{shown}' have {what}; expected two or more names, one per line.")
    return names


class MaskedImages(Dataset):
    """Images and their masks, matched by their paths below the two folders without extensions.

    Pixels without a class have the value `ignore_index`. With `reduce_zero_label`, 0 in a mask means no class, and
    class i is stored as i + 1, as in ADE20K.
    """

    def __init__(
        self, images: str | os.PathLike, masks: str | os.PathLike, classes: Sequence[str], *, in_chans: int = 3,
        pixels: Pixels = PLAIN, ignore_index: int = 255, reduce_zero_label: bool = False
    ) -> None:  # fmt: skip
        self.classes, self.ignore_index, self.reduce_zero_label = list(classes), ignore_index, reduce_zero_label
        if 0 <= ignore_index < len(self.classes):
            raise ValueError(
                f"The ignore index {ignore_index} is the index of the class '{self.classes[ignore_index]}'. Choose one "
                f"outside of 0..{len(self.classes) - 1}, or reduce_zero_label if 0 means no class."
            )
        found, there = paths_by_stem(images), paths_by_stem(masks)
        if lost := [path for stem, path in found.items() if stem not in there]:
            raise ValueError(
                f"{len(lost)} of {len(found)} images have no mask in '{printable(masks)}': {first(lost)}. A mask has "
                "the image's path below its folder, with any extension."
            )
        self.masks = [there[stem] for stem in found]
        self.unused = [path for stem, path in there.items() if stem not in found]
        self.source = ImageFiles(list(found.values()), in_chans, pixels)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """`(image, target)`: the image `[C, H, W]` as from `data.load_image`, and classes, int64 `[H, W]`."""
        with naming(f"The image {self.source.name(i)} with its mask"):
            return self.source[i], torch.from_numpy(self._target(load_mask(self.masks[i])))

    def _target(self, mask: np.ndarray) -> np.ndarray:
        if not self.reduce_zero_label:
            return mask
        return np.where((mask == 0) | (mask == self.ignore_index), self.ignore_index, mask - 1)

    def check(self) -> np.ndarray:
        """Reads all masks and the size of all images; returns the pixels of each class, int64 `[num_classes]`.

        A `ValueError` has all faults, with counts and the first names.
        """
        counts, total, faults = np.zeros(len(self.classes), dtype=np.int64), len(self), []
        bad: dict[str, list[str]] = {}
        with ThreadPoolExecutor(8) as pool:
            for counted, fault, where in pool.map(self._check_mask, range(total)):
                counts += counted
                if fault:
                    bad.setdefault(fault, []).append(where)
        for fault, names in sorted(bad.items()):
            faults.append(f"{len(names)} of {total} {fault}: {first(names)}")
        if not faults and (corrupt := [message for _, message in check_readable(self.source)]):
            faults.append(
                f"{len(corrupt)} of {min(32, total)} images tried cannot be decoded: {'; '.join(corrupt[:3])}"
            )
        if not faults and not counts.sum():
            faults.append(f"no pixel of {total} masks has a class")
        if faults:
            root = printable(os.path.dirname(self.masks[0]))
            raise ValueError(f"The masks in '{root}' cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
        return counts

    def _image_size(self, i: int) -> tuple[int, int]:
        """Height and width, upright, by the image's header."""
        with closing(open_scene(self.source.path(i), self.source.in_chans, self.source.pixels)) as scene:
            return scene.size

    def _check_mask(self, i: int) -> tuple[np.ndarray, str, str]:
        """The pixels of each class in a mask; its fault in the plural, or ''; what is wrong."""
        counts, name = np.zeros(len(self.classes), dtype=np.int64), printable(self.masks[i])
        try:
            mask, size = load_mask(self.masks[i]), self._image_size(i)
        except ValueError as e:
            return counts, "masks or their images cannot be read", str(e)
        if mask.shape != size:
            where = f"{name} {mask.shape[0]} x {mask.shape[1]}, image {size[0]} x {size[1]}"
            return counts, "masks have another size than their images", where
        values, numbers = np.unique(self._target(mask), return_counts=True)
        known, shift = (values >= 0) & (values < len(self.classes)), int(self.reduce_zero_label)
        counts[values[known]] = numbers[known]
        if len(others := values[~known & (values != self.ignore_index)] + shift):
            span = f"{shift} to {len(self.classes) - 1 + shift}, and {self.ignore_index} for none"
            what = f"masks have indices of no class (there are {len(self.classes)}, {span})"
            return counts, what, f"{name} has {', '.join(map(str, others[:5]))}"
        return counts, "", ""


def paths_by_stem(root: str | os.PathLike) -> dict[str, str]:
    """The images below a folder by their relative path without extension, in order."""
    source = FolderSource(root)
    found, duplicates = {}, []
    for path in sorted(source.path(i) for i in range(len(source))):
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        if stem in found:
            duplicates.append(path)
        found[stem] = path
    if duplicates:
        raise ValueError(
            f"{len(duplicates)} of {len(source)} files in '{printable(root)}' have the name of another one except for "
            f"the extension: {first(duplicates)}. Images and masks are matched by name; rename or remove them."
        )
    return found


def open_split(root: str | os.PathLike, split: str) -> tuple[Path, Path]:
    """The folders of images and masks of a split: 'train', 'validation' or 'test'.

    `root` has `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`. The masks' folder may also be
    called annotations or labels; the splits may have any of timm's names (training, val, ...).
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
    """Scales, crops and flips an image with its mask, and distorts the colours of three channels.

    Crops have `size` x `size` pixels; beyond the image they have the values `fill`, one per channel in 0..1, and the
    class `ignore_index`. `scale` is the smallest and the largest factor of the image's size, or of the size at which
    its shorter side has `short_side` pixels. `hflip` and `vflip` are probabilities.
    """

    def __init__(
        self, size: int, fill: Sequence[float], *, scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None, hflip: float = 0.5, vflip: float = 0.0, colours: bool = True,
        ignore_index: int = 255
    ) -> None:  # fmt: skip
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
        """mmsegmentation's `cat_max_ratio`: a crop without a class above 3/4 of the pixels, if ten tries find one."""
        for _ in range(9):
            crop = self.crop(x, y)
            counts = crop[1][crop[1] != self.ignore_index].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                return crop
        return self.crop(x, y)


def collate(samples: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets)
