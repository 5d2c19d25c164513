"""Windows out of images that are too large to decode: a map-style source of square parts, as many as their area."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ...seeds import sample_seed
from ..formats.decode import faults_named
from ..formats.errors import EmptyError, ImageError, MissingPackageError
from ..formats.pixels import Pixels
from .pages import DerivedSource
from .scenes import Scenes, open_scene

_TRIES = 16
_CELL = 16  # pixels
_NAMED = 5
_FIXED = 2**31 - 1  # the epoch of windows that are asked for without one


class Windows(NamedTuple):
    """Which windows are read.

    Attributes:
        size: Side in pixels.
        per_image: Windows of an average image in an epoch; None: as many as cover it.
        min_content: Smallest share of a window that must not be flat, see `content`; 0: all windows will do.
        min_std: Standard deviation up to which a cell is flat, in units of the pixels.
    """

    size: int
    per_image: float | None = None
    min_content: float = 0.0
    min_std: float = 0.01

    def check(self) -> "Windows":
        """Itself.

        Raises:
            ValueError: A number is out of range.
        """
        if self.size < 1 or self.per_image is not None and not self.per_image > 0:
            raise ValueError(
                f"--window-size is a side in pixels and --windows-per-image a number above 0, got {self.size} and "
                f"{self.per_image}."
            )
        if not 0 <= self.min_content < 1 or not self.min_std >= 0:
            raise ValueError(
                f"--min-content is a share from 0 to below 1 and --content-std at least 0, got {self.min_content:g} "
                f"and {self.min_std:g}."
            )
        return self


def content(image: torch.Tensor, min_std: float) -> float:
    """The share of a window that shows something: of its cells of 16 x 16 pixels, those that are not flat.

    A cell is flat if in no channel the standard deviation of its pixels is above `min_std`. Pixels without data have
    all one value, their channel's mean, and so are flat. What a last cell lacks is left out.

    Args:
        image: `[C, H, W]`, uint8 or float; uint8 is divided by 255 first.
        min_std: In units of the pixels.
    """
    cell = min(_CELL, *image.shape[1:])
    x = image.float() / 255 if image.dtype == torch.uint8 else image
    cells = x.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)
    return float((cells.std(3, correction=0) > min_std).any(0).float().mean())


class WindowSource(DerivedSource):
    """Square windows of the images of another source, anywhere within them, by area.

    `source[i]` is a window `[C, S, S]` whose place never changes; `load_sample(i, seed)` draws its place from a seed.
    Image k has the share of windows that its area has of the area of all: an image with a hundred times the pixels
    counts a hundred times. In all, there are as many windows as cover the area, `ceil(area / S**2)`, or
    `per_image` times the number of images. Rounding moves at most one window from an image to the next.

    A window that is nodata everywhere, or shows less than `min_content`, is drawn again, up to 16 times in all; then
    the one that shows most is taken.

    Args:
        source: With `path(i)`, `name(i)`, `in_chans` and `pixels`: a `FolderSource`, or one like it.
        windows: Which ones.
        tick: Called with 1 after each header that was read.

    Attributes:
        left: What the source leaves out, and what was found of the images.

    Raises:
        ValueError: The source has no files, or images are smaller than a window: how many, and some by name.
        MissingPackageError: (a ValueError) A package that reads the images is not installed.
    """

    def __init__(self, source: Any, windows: Windows, tick: Callable[[int], None] | None = None) -> None:
        if not hasattr(source, "path") or not hasattr(source, "in_chans"):
            raise ValueError(
                "--window-size reads parts of files, which this data set has not: give a folder with --data-dir, or "
                "leave it out."
            )
        self.source, self.windows = source, windows.check()
        sizes, whole = _scan(source, tick)
        _refuse_small(source, sizes, windows.size)
        self._set(range(len(source)), sizes, whole)

    def _set(self, files: Sequence[int], sizes: list[tuple[int, int] | None], whole: int) -> None:
        self.files, self.sizes, self.scenes, self.num_whole = files, sizes, Scenes(), whole
        # a file whose header cannot be read has one window, which fails where it can be counted and named
        areas = [self.windows.size**2 if size is None else size[0] * size[1] for size in sizes]
        total = sum(areas)
        count = (
            -(-total // self.windows.size**2)
            if self.windows.per_image is None
            else max(1, round(self.windows.per_image * len(areas)))
        )
        self.ends = [(end * count + total // 2) // total for end in accumulate(areas)]

    @property
    def left(self) -> str:
        side = self.windows.size
        none = sum(end == before for end, before in zip(self.ends, [0, *self.ends], strict=False))
        parts = [f"{len(self)} windows of {side} x {side} pixels an epoch, from {len(self.files)} images"]
        if none:
            parts.append(f"{none} images are so small that they have none (more --windows-per-image)")
        if self.num_whole:
            parts.append(
                f"{self.num_whole} images are decoded whole for each window, as their format asks for it (tiled TIFF "
                "or .npy is faster)"
            )
        return "; ".join([*parts, *filter(None, [str(getattr(self.source, "left", None) or "")])])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.load_sample(i, sample_seed(0, _FIXED, i))

    def load_sample(self, i: int, seed: int) -> torch.Tensor:
        """Window `i`, at a place drawn from the seed.

        Raises:
            ImageError: (a ValueError) It cannot be decoded, or nothing but nodata was found.
        """
        file = self._file(i)
        pixels = _pixels(self.source, self.files[file])
        side, path = self.windows.size, self.source.path(self.files[file])
        try:
            scene = self.scenes.get(path, self.in_chans, pixels)
            height, width = scene.size
            generator = torch.Generator().manual_seed(seed)
            best, most, empty = None, -1.0, None
            for _ in range(_TRIES):
                top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width))
                try:
                    with faults_named(self.source.name(self.files[file])):
                        image = scene.read(top, left, side, side)
                except EmptyError as error:
                    empty = error
                    continue
                shown = content(image, self.windows.min_std) if self.windows.min_content else 1.0
                if shown > most:
                    best, most = image, shown
                if shown >= self.windows.min_content:
                    break
        except (ImageError, OSError) as error:
            raise _named(self.name(i), self.source.name(self.files[file]), error) from None
        if best is None:
            raise ImageError(f"{self.name(i)}: {_TRIES} windows were tried, and the last {empty}")
        return best

    def _file(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        return bisect_right(self.ends, i)

    def name(self, i: int) -> str:
        """The image, and which of its windows."""
        file = self._file(i)
        first = self.ends[file - 1] if file else 0
        return f"{self.source.name(self.files[file])}, window {i - first + 1} of {self.ends[file] - first}"

    def hold_out(self, share: float, seed: int) -> tuple["WindowSource", "WindowSource"]:
        """Splits by images, not by windows, which overlap: the windows to train on, and those held out.

        Args:
            share: Of the images, above 0.
            seed: Of the choice.

        Raises:
            ValueError: Nothing would be left.
        """
        count, total = max(1, round(share * len(self.files))), len(self.files)
        if count >= total:
            raise ValueError(
                f"--holdout {share:g} leaves nothing to train on: with --window-size whole images are held out, and "
                f"there {'is 1' if total == 1 else f'are {total}'}."
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        apart = self._part(sorted(order[:count]))
        return self._part(sorted(order[count:])), apart

    def _part(self, numbers: list[int]) -> "WindowSource":
        part = object.__new__(WindowSource)
        part.source, part.windows = self.source, self.windows
        part._set([self.files[k] for k in numbers], [self.sizes[k] for k in numbers], self.num_whole)
        return part


def _pixels(source: Any, i: int) -> Pixels:
    """The record for image `i`; of a `PageSource` each has its own."""
    return source.page_pixels(i) if hasattr(source, "page_pixels") else source.pixels


def _named(name: str, file: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: {str(error).removeprefix(f'{file}: ')}")


def _scan(source: Any, tick: Callable[[int], None] | None) -> tuple[list[tuple[int, int] | None], int]:
    """Size of each image, None where its header cannot be read; how many are decoded whole for each window."""
    sizes: list[tuple[int, int] | None] = []
    whole = 0
    for i in range(len(source)):
        try:
            scene = open_scene(source.path(i), source.in_chans, _pixels(source, i))
            scene.close()
            sizes.append(scene.size)
            whole += scene.whole
        except MissingPackageError:
            raise
        except (ImageError, OSError):
            sizes.append(None)
        if tick is not None:
            tick(1)
    return sizes, whole


def _refuse_small(source: Any, sizes: list[tuple[int, int] | None], side: int) -> None:
    small = [i for i, size in enumerate(sizes) if size is not None and min(size) < side]
    if not small:
        return
    shown = ", ".join(f"{source.name(i)} ({' x '.join(map(str, sizes[i] or ()))})" for i in small[:_NAMED])
    more = f" and {len(small) - _NAMED} more" if len(small) > _NAMED else ""
    smallest = min(min(size) for size in sizes if size is not None)
    raise ValueError(
        f"{len(small)} of {len(sizes)} images are smaller than a window of {side} x {side} pixels: {shown}{more}. The "
        f"largest --window-size that all have is {smallest}; or keep small images in another folder, or leave "
        "--window-size out."
    )
