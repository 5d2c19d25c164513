"""Images and masks of pixel classes: two folders, their checks, and the transform of training."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from ...data import FolderSource, Pixels, check_readable
from ...data.formats.decode import open_scene
from ...data.formats.errors import naming
from ...data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, check_size, open_image_file, printable
from ...data.formats.pillow import open_pillow
from ...data.formats.pixels import PLAIN
from ...data.formats.tiff import sparse_values
from ...data.paths.lists import open_text
from ...data.sources.files import ImageFiles
from ..backbone import as_float
from ..figures import first
from ..yolo import YoloImage, draw_classes

MASK_FOLDERS = ("masks", "annotations", "labels")
SPLITS = {"train": TRAIN_FOLDERS, "validation": VALIDATION_FOLDERS, "test": ("test", "testing")}


class MaskCodes(NamedTuple):
    """How the values in mask files become classes: by default they are the classes.

    `values` has the values of each class, such as `("0", "1,255")`; `colours` has one 0xRRGGBB per class, for masks in
    colours. `ignore_index` is no class. With `reduce_zero_label`, 0 is no class either, and class i is stored as i + 1,
    as in ADE20K.
    """

    ignore_index: int = 255
    reduce_zero_label: bool = False
    values: tuple[str, ...] = ()
    colours: tuple[int, ...] = ()

    def check(self, classes: Sequence[str]) -> "MaskCodes":
        """Returns itself if it suits these classes."""
        if 0 <= self.ignore_index < len(classes):
            raise ValueError(
                f"The ignore index {self.ignore_index} is the index of the class '{classes[self.ignore_index]}'. "
                f"Choose one outside of 0..{len(classes) - 1}, or reduce_zero_label if 0 means no class."
            )
        if self.values and len(self.values) != len(classes):
            raise ValueError(f"--mask-values {' '.join(self.values)}: expected one per class, that is {len(classes)}.")
        self.table()
        return self

    def table(self) -> dict[int, int]:
        """The class of each value; empty if the values are the classes."""
        codes = [(str(colour), i) for i, colour in enumerate(self.colours)]
        codes += [(word, i) for i, words in enumerate(self.values) for word in words.split(",")]
        try:
            found = {int(word): i for word, i in codes}
        except ValueError as e:
            raise ValueError(f"--mask-values {' '.join(self.values)}: expected numbers ({e}).") from e
        if len(found) < len(codes):
            raise ValueError("Two classes have the same value or colour in masks.")
        return found

    def classes(self, values: np.ndarray) -> np.ndarray:
        """The classes of values of any shape, int64; `ignore_index` if they have none, -1 if they are unknown."""
        if table := self.table():
            unique, inverse = np.unique(values, return_inverse=True)
            known = [table.get(v, v if v == self.ignore_index and not self.colours else -1) for v in unique.tolist()]
            return np.array(known, dtype=np.int64)[inverse].reshape(values.shape)
        if self.reduce_zero_label:
            return np.where((values == 0) | (values == self.ignore_index), self.ignore_index, values - 1)
        return values


def load_mask(path: str | os.PathLike, colours: bool = False) -> np.ndarray:
    """The stored values of a mask, int64 `[H, W]`: of a palette or grey image, or colours as 0xRRGGBB.

    Grey masks of 2 or 4 bits are not stretched to 0..255, and those whose 0 is white are not inverted.
    """
    name = printable(path)
    try:
        with open_image_file(os.fspath(path)) as file, open_pillow(file) as image:
            check_size(image.height, image.width)
            if (values := sparse_values(file)) is not None:
                return values.astype(np.int64)
            if image.format == "JPEG":
                raise ValueError("is a JPEG, whose values are not exact; expected a PNG")
            if colours:
                red, green, blue = np.moveaxis(np.array(image.convert("RGB")).astype(np.int64), -1, 0)
                return red << 16 | green << 8 | blue
            if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                raise ValueError(
                    f"has colours (mode {image.mode}), expected class indices: a palette or grey PNG; or name the "
                    "colours in the class file and pass --mask-colors"
                )
            how = image.tile[0][3] if image.tile else ""
            stored = (how if isinstance(how, str) else str((how or [""])[0])).partition(";")[2]  # of 'L;4I': '4I'
            values = np.array(image).astype(np.int64)
            if "I" in stored and image.mode in ("1", "L"):  # Pillow inverts where 0 is white
                values = (1 if image.mode == "1" else 255) - values
            return values // {"2": 85, "4": 17}.get(stored[:1], 1) if image.mode == "L" else values
    except Exception as e:  # decoders raise nearly anything
        what = str(e) if isinstance(e, ValueError) else f"cannot be decoded ({type(e).__name__}: {e})"
        raise ValueError(f"{name} {what}".replace(f"{name} {name}", name)) from e


def read_classes(path: str | os.PathLike) -> list[str]:
    """Class names from a text file: line 1 is the name of index 0."""
    shown = printable(path)
    try:
        with open_text(path) as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
    except (OSError, UnicodeError) as e:
        raise ValueError(
            f"The class names '{shown}' cannot be read ({e}). Write one name per line; line 1 is the name of index 0."
        ) from e
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if not all(names) or duplicates or len(names) < 2:
        what = f"duplicates: {', '.join(duplicates)}" if duplicates else f"names: {names}"
        what = what if all(names) else f"no name in line {names.index('') + 1}"
        raise ValueError(f"The class names '{shown}' have {what}; expected two or more names, one per line.")
    return names


def read_colours(lines: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """Names and colours (0xRRGGBB) from lines `NAME R G B` of a class file."""
    parts = [line.replace(",", " ").rsplit(maxsplit=3) for line in lines]
    try:
        colours = [bytes(map(int, numbers)) for _, *numbers in parts]  # of 0 to 255
        if any(len(colour) != 3 for colour in colours):
            raise ValueError("three numbers are needed")
    except ValueError as e:
        raise ValueError(f"--mask-colors: lines of the class file are `NAME R G B`, got {first(lines)} ({e}).") from e
    return [name for name, *_ in parts], tuple(int.from_bytes(colour, "big") for colour in colours)


class Pairs(NamedTuple):
    """Images and their masks: paths, or labels in YOLO's format; masks without an image."""

    images: list[str]
    masks: list[str] | list[YoloImage]
    unused: Sequence[str] = ()


class Counts(NamedTuple):
    """What masks hold."""

    classes: np.ndarray  # pixels of each class, int64
    ignored: float  # fraction of all pixels
    notes: list[str]


_PLAIN_CODES = MaskCodes()


class MaskedImages(Dataset):
    """Images and their masks; pixels without a class have the value `codes.ignore_index`."""

    def __init__(
        self, pairs: Pairs, classes: Sequence[str], *, in_chans: int = 3, pixels: Pixels = PLAIN,
        codes: MaskCodes = _PLAIN_CODES
    ) -> None:  # fmt: skip
        self.classes, self.codes, self.ignore_index = list(classes), codes.check(classes), codes.ignore_index
        self.masks, self.unused = pairs.masks, pairs.unused
        self.files, self.source = pairs.images, ImageFiles(pairs.images, in_chans, pixels)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """`(image, target)`: the image `[C, H, W]` as from `data.load_image`, and classes, int64 `[H, W]`."""
        with naming(f"The image {self.source.name(i)} with its mask"):
            return self.source[i], torch.from_numpy(self.codes.classes(self._values(i)))

    def _values(self, i: int) -> np.ndarray:
        mask = self.masks[i]
        return draw_classes(mask) if isinstance(mask, YoloImage) else load_mask(mask, bool(self.codes.colours))

    def check(self) -> Counts:
        """Reads all masks and the sizes of all images; a `ValueError` has all faults with counts and some names."""
        total, notes, none = len(self), [], self.ignore_index
        with ThreadPoolExecutor(8) as pool:
            found, kinds, bad, where = zip(*pool.map(self._check_mask, range(total)), strict=True)
        *counts, ignored = np.sum(found, axis=0).tolist()
        faults = [
            f"{bad.count(fault)} of {total} {fault}: {first(w for w, b in zip(where, bad, strict=True) if b == fault)}"
            for fault in sorted({*bad} - {""})
        ]
        if not faults and (corrupt := [message for _, message in check_readable(self.source)]):
            tried = f"{min(32, total)} images tried"
            faults.append(f"{len(corrupt)} of {tried} cannot be decoded: {'; '.join(corrupt[:3])}")
        if not (faults or self.codes.table() or self.codes.reduce_zero_label):
            white = sum(values == {0, none} for values in kinds)
            others = sum(bool(values - {0, none}) for values in kinds)
            what = f"{white} of {total} masks hold only 0 and {none}, which is no class (--ignore-index)"
            if white and not others:
                faults.append(f"{what}; if {none} is the foreground, pass --mask-values 0 {none}")
            elif white > 0.01 * total:
                notes.append(f"{what}, while others have classes; if {none} is one, pass --mask-values 0 1,{none}")
        if not faults and not sum(counts):
            faults.append(f"no pixel of {total} masks has a class")
        if faults:
            mask = self.masks[0]
            root = printable(os.path.dirname(mask.path if isinstance(mask, YoloImage) else mask))
            raise ValueError(f"The masks in '{root}' cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
        return Counts(np.array(counts), ignored / (ignored + sum(counts)), notes)

    def _check_mask(self, i: int) -> tuple[np.ndarray, set[int], str, str]:
        """The pixels of each class, and those ignored; the stored values; the fault in the plural, or '', and where."""
        counts, mask = np.zeros(len(self.classes) + 1, dtype=np.int64), self.masks[i]
        name = printable(mask.path if isinstance(mask, YoloImage) else mask)
        try:
            mask, size = self._values(i), self._image_size(i)
        except ValueError as e:
            return counts, set(), "masks or their images cannot be read", str(e)
        if mask.shape != size:
            where = f"{name} {mask.shape[0]} x {mask.shape[1]}, image {size[0]} x {size[1]}"
            return counts, set(), "masks have another size than their images", where
        values, numbers = np.unique(mask, return_counts=True)
        classes = self.codes.classes(values)
        known, ignored = (classes >= 0) & (classes < len(self.classes)), classes == self.ignore_index
        np.add.at(counts, classes[known], numbers[known])
        counts[-1] = numbers[ignored].sum()
        if len(others := values[~known & ~ignored]):
            shift = int(self.codes.reduce_zero_label)
            span = f"{shift} to {len(self.classes) - 1 + shift}, and {self.ignore_index} for none"
            what = f"masks have indices of no class (there are {len(self.classes)}, {span})"
            shown = [f"#{v:06x}" if self.codes.colours else str(v) for v in others[:5].tolist()]
            if self.codes.table():
                what = f"masks have {'colours' if self.codes.colours else 'values'} of no class"
            return counts, set(), what, f"{name} has {', '.join(shown)}"
        return counts, set(values[:100].tolist()), "", ""

    def _image_size(self, i: int) -> tuple[int, int]:
        """Height and width, upright, by the image's header."""
        with closing(open_scene(self.source.path(i), self.source.in_chans, self.source.pixels)) as scene:
            return scene.size


def paths_by_stem(root: str | os.PathLike, suffix: str = "") -> dict[str, str]:
    """The images below a folder by their relative path without extension and suffix, in order."""
    source = FolderSource(root)
    found, duplicates = {}, []
    for path in sorted(source.path(i) for i in range(len(source))):
        stem = os.path.splitext(os.path.relpath(path, root))[0].removesuffix(suffix)
        if stem in found:
            duplicates.append(path)
        found[stem] = path
    if duplicates:
        raise ValueError(
            f"{len(duplicates)} of {len(source)} files in '{printable(root)}' have the name of another one except for "
            f"the extension: {first(duplicates)}. Images and masks are matched by name; rename or remove them."
        )
    return found


def match_masks(images: str | os.PathLike, masks: str | os.PathLike, suffix: str = "") -> Pairs:
    """Images and masks whose paths below the two folders are equal, without extension; a mask's ends in `suffix`."""
    found, there = paths_by_stem(images), paths_by_stem(masks, suffix)
    if lost := [path for stem, path in found.items() if stem not in there]:
        raise ValueError(
            f"{len(lost)} of {len(found)} images have no mask in '{printable(masks)}': {first(lost)}. A mask has the "
            "image's path below its folder, with any extension; see also --mask-suffix."
        )
    unused = [path for stem, path in there.items() if stem not in found]
    return Pairs(list(found.values()), [there[stem] for stem in found], unused)


def open_split(root: str | os.PathLike, split: str, suffix: str = "") -> Pairs:
    """The images and masks of a split: 'train', 'validation' or 'test'.

    `root` has `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`. The masks' folder may also be
    called annotations or labels; the splits may have any of timm's names (training, val, ...).
    """
    root = Path(root)
    for name in SPLITS[split]:
        for masks in MASK_FOLDERS:
            for pair in ((root / name / "images", root / name / masks), (root / "images" / name, root / masks / name)):
                if all(path.is_dir() for path in pair):
                    return match_masks(*pair, suffix)
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
