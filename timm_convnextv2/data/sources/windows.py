"""Windows of images that are too large to decode whole, drawn by area."""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import accumulate, count

import torch

from ...config import check_limits
from ...console import count as plural
from ...seeds import sample_seed
from ..config import WindowOptions
from ..formats.decode import Scene, faults_named, finished, open_scene
from ..formats.errors import EmptyError, ImageError
from ..formats.pixels import Pixels
from .source import Source, locate, of_each_file

_TRIES = 16
_CELL = 16  # pixels
_NAMED = 5
_MOST_OPEN = 16  # images
_TOKENS = count()
_FIXED_EPOCH = 2**31 - 1  # its random numbers place windows that are read without a seed


def content(image: torch.Tensor, min_std: float) -> float:
    """The fraction of the cells of 16 x 16 pixels of a window, `[C, H, W]`, that are not flat.

    A cell is flat if the standard deviation of its pixels (uint8: divided by 255) is at most `min_std` in every
    channel. Pixels without data are flat, because they are filled with the mean of their channel. Incomplete cells at
    the edges are ignored.
    """
    cell = min(_CELL, *image.shape[1:])
    x = image.float() / 255 if image.dtype == torch.uint8 else image
    if x.isnan().any():
        x = torch.where(x.isnan(), x.nanmean((1, 2), keepdim=True), x)
    cells = x.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)
    return float((cells.std(3, correction=0) > min_std).any(0).float().mean())


@lru_cache(_MOST_OPEN)
def _opened(process: int, token: int, path: str, in_chans: int, pixels: Pixels) -> Scene:
    """Keeps the last few images open, because opening a large TIFF reads thousands of offsets.

    `process`: a forked worker must not share file positions with its parent. `token`: another source opens them again.
    """
    return open_scene(path, in_chans, pixels)


class WindowSource(Source):
    """Square windows of the images of another source, anywhere within them.

    `read(i, seed=s)` draws the position of window `i` from the seed; without a seed it is always the same. The number
    of windows of an image is proportional to its area. In total there are as many as cover all images,
    `ceil(area / S**2)`, or `windows_per_image` times the number of images.

    A window that is nodata everywhere, or has less content than `min_content`, is drawn again, up to 16 times in total;
    then the one with the most content is used. With `Pixels.standardize` each window is standardised by itself. A
    source without files, or with smaller ones, is a ValueError.
    """

    def __init__(self, source: Source, windows: WindowOptions, tick: Callable[[int], None] | None = None) -> None:
        if not source.has_files:
            raise ValueError("--window-size needs image files; this data set has none. Give a folder, or leave it out.")
        check_windows(windows)
        super().__init__(source.in_chans, source.pixels)
        self.source, self.windows, self.token = source, windows, next(_TOKENS)
        self.side = windows.window_size or 0

        def header(i: int) -> tuple[tuple[int, int] | None, bool]:
            with closing(open_scene(source.path(i), source.in_chans, source.pixels_of(i))) as scene:
                return scene.size, scene.whole

        sizes, whole = zip(*of_each_file(source, header, (None, False), tick), strict=True)
        self.num_whole = sum(whole)
        _refuse_small(source, sizes, self.side)
        self._set(range(len(source)), sizes)

    def _set(self, files: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> None:
        self.files, self.sizes = files, sizes
        # a file whose header cannot be read gets one window, which fails when it is read: there it is counted and named
        areas = [self.side**2 if size is None else size[0] * size[1] for size in sizes]
        total, per_image = sum(areas), self.windows.windows_per_image
        windows = -(-total // self.side**2) if per_image is None else max(1, round(per_image * len(areas)))
        self.ends = [(end * windows + total // 2) // total for end in accumulate(areas)]
        none = sum(end == before for end, before in zip(self.ends, [0, *self.ends], strict=False))
        whole = self.num_whole and (
            f"{plural(self.num_whole, 'image')} must be decoded whole for each window, because of their format "
            "(tiled TIFF or .npy is faster)"
        )
        notes = (
            f"{plural(len(self), 'window')} of {self.side} x {self.side} pixels per epoch, from "
            f"{plural(len(files), 'image')}",
            none and f"{plural(none, 'image')} too small to get a window (raise --windows-per-image)",
            whole,
            str(self.source.left),
        )
        self.left = "; ".join(filter(None, notes))  # pyright: ignore

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, i: int, choose: object = None, seed: int | None = None) -> torch.Tensor:
        """Reads window `i` at a position drawn from the seed; an ImageError if all positions tried are nodata."""
        file = self.files[locate(self.ends, i)[0]]
        generator = torch.Generator().manual_seed(sample_seed(0, _FIXED_EPOCH, i) if seed is None else seed)
        best, most, empty = None, -1.0, None
        try:
            scene = _opened(os.getpid(), self.token, self.source.path(file), self.in_chans, self.pixels_of(i))
            for _ in range(_TRIES):
                top, left = (int(torch.randint(n - self.side + 1, (), generator=generator)) for n in scene.size)
                try:
                    with faults_named(self.source.name(file)):
                        image = scene.read(top, left, self.side, self.side)
                except EmptyError as error:
                    empty = error
                    continue
                found = content(image, self.windows.content_std) if self.windows.min_content else 1.0
                if found > most:
                    best, most = image, found
                if found >= self.windows.min_content:
                    break
        except (ImageError, OSError) as error:
            reason = str(error).removeprefix(f"{self.source.name(file)}: ")
            raise ImageError(f"{self.name(i)}: {reason}") from None
        if best is None:
            raise ImageError(f"{self.name(i)}: {_TRIES} windows were tried, the last {empty}")
        return finished(best, self.pixels)

    def pixels_of(self, i: int) -> Pixels:
        return self.pixels._replace(page=self.source.pixels_of(self.files[locate(self.ends, i)[0]]).page)

    def name(self, i: int) -> str:
        file, window, count = locate(self.ends, i)
        return f"{self.source.name(self.files[file])}, window {window + 1} of {count}"

    def hold_out(self, fraction: float, seed: int) -> tuple["WindowSource", "WindowSource"]:
        """Splits by images: the windows to train on, and those held out."""
        held, total = max(1, round(fraction * len(self.files))), len(self.files)
        if held >= total:
            raise ValueError(
                f"--holdout {fraction:g} leaves nothing to train on: with --window-size whole images are held out, and "
                f"there {'is 1' if total == 1 else f'are {total}'}."
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        return self._subset(sorted(order[held:])), self._subset(sorted(order[:held]))

    def _subset(self, numbers: list[int]) -> "WindowSource":
        other = copy.copy(self)
        other._set([self.files[k] for k in numbers], [self.sizes[k] for k in numbers])
        return other


def check_windows(windows: WindowOptions) -> None:
    """Refuses options on windows that are out of range or lack the size."""
    check_limits(windows)
    if not windows.min_content < 1:
        raise ValueError(f"--min-content must be below 1, got {windows.min_content:g}.")
    if windows.window_size is None and (windows.windows_per_image or windows.min_content):
        option = "--windows-per-image" if windows.windows_per_image else "--min-content"
        raise ValueError(f"{option} is about windows: set their side with --window-size.")


def _refuse_small(source: Source, sizes: Sequence[tuple[int, int] | None], side: int) -> None:
    small = {i: size for i, size in enumerate(sizes) if size is not None and min(size) < side}
    if not small:
        return
    shown = ", ".join(f"{source.name(i)} ({h} x {w})" for i, (h, w) in [*small.items()][:_NAMED])
    more = f" and {len(small) - _NAMED} more" if len(small) > _NAMED else ""
    raise ValueError(
        f"{len(small)} of {len(sizes)} images are smaller than a window of {side} x {side} pixels: {shown}{more}. The "
        f"largest --window-size that fits all is {min(map(min, small.values()))}; or move small images to another "
        "folder, or leave --window-size out."
    )
