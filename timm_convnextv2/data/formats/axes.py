"""The axes of a stored array: rows, columns, channels, pages; and the part of them that is read."""

import math
from typing import NamedTuple

import numpy as np

from .errors import ImageError, refuse_page, wrong_channels
from .pixels import CHANNELS

Page = int | str | None
_NO_PAGES = "YXSC"  # rows, columns, samples of a pixel, channels; entries of other axes are pages
_NAMES = {"Z": "depth", "T": "time"}


class Layout(NamedTuple):
    """The part to read of an array whose axes have names of one letter, as in tifffile."""

    axes: str  # all axes, in the order of the array
    shape: tuple[int, ...]  # their sizes
    kept: str  # axes that are read whole, in this order; Y and X are among them
    index: dict[str, int]  # the entry that is read of each other axis

    def pick(self, rows: slice = slice(None), columns: slice = slice(None), axes: str | None = None) -> tuple:
        """The index of rows and columns of the kept part, in an array with these axes (default: all)."""
        part = {"Y": rows, "X": columns} | dict.fromkeys(set(self.kept) - {"Y", "X"}, slice(None)) | self.index
        return tuple(part[axis] for axis in (self.axes if axes is None else axes))

    def arrange(self, x: np.ndarray) -> np.ndarray:
        """An array with the axes `kept` as `[C, Y, X]`."""
        axes = [axis for axis in self.axes if axis in self.kept]
        # some instruments write X before Y
        order = [*(i for i, axis in enumerate(axes) if axis not in "YX"), axes.index("Y"), axes.index("X")]
        x = x.transpose(order)
        return x.reshape(-1, *x.shape[-2:])


def count_pages(axes: str, shape: tuple[int, ...]) -> int:
    """Pages of an array with these axes."""
    return math.prod(size for axis, size in zip(axes, shape, strict=True) if axis not in _NO_PAGES)


def choose_axes(axes: str, shape: tuple[int, ...], in_chans: int, page: Page = None) -> Layout:
    """The part to read of an array: Y and X, the axis of the channels if there is one, and one entry of others.

    Args:
        axes: One letter per axis.
        shape: Their sizes.
        in_chans: Channels wanted.
        page: None: the first entry of axes without a name; named ones (depth, time) are refused. A number: that page,
            counted over all axes except Y, X, C and S. 'channels': all pages, as channels.
    """
    sizes = dict(zip(axes, shape, strict=True))
    if not {"Y", "X"} <= set(axes) or len(sizes) != len(axes):
        raise ImageError(f"has axes {axes}, expected images with axes Y and X")
    kept = _unpaged(axes, sizes, in_chans) if page is None else "".join(axis for axis in axes if axis in _NO_PAGES)
    if page == CHANNELS:
        channels = math.prod(size for axis, size in sizes.items() if axis not in "YX")
        if channels != in_chans:
            raise wrong_channels(f"{channels} pages and channels (axes {axes})", in_chans, channels)
        return Layout(axes, shape, axes, {})
    index = {axis: 0 for axis in axes if axis not in kept}
    if page is not None:
        _check_colours(axes, sizes, in_chans)
        pages = [axis for axis in axes if axis not in _NO_PAGES]
        total = math.prod(sizes[axis] for axis in pages)
        refuse_page(page, total)
        found = np.unravel_index(int(page), [sizes[axis] for axis in pages]) if pages else ()
        index = {axis: int(i) for axis, i in zip(pages, found, strict=True)}
    return Layout(axes, shape, kept, index)


def _check_colours(axes: str, sizes: dict[str, int], in_chans: int) -> None:
    if "S" in axes and "C" in axes:
        raise ImageError(f"has axes {axes}, colours in each of {sizes['C']} channels; save it as .npy with one axis")
    if "C" in axes and sizes["C"] != in_chans:
        raise wrong_channels(f"{sizes['C']} channels (axes {axes})", in_chans, sizes["C"])


def _unpaged(axes: str, sizes: dict[str, int], in_chans: int) -> str:
    """The axes to read if no page is named: C and the samples of a pixel (S).

    Without these, an axis without meaning (Q, or I: plain pages) that has `in_chans` entries; never depth, time or
    another axis that has a name.
    """
    named = [axis for axis in axes if axis not in "YXSCIQ"]
    if named:
        names = ", ".join(f"{_NAMES.get(axis, axis)} ({axis}: {sizes[axis]})" for axis in named)
        raise ImageError(
            f"is a stack with axes {axes}, its axis {names} is not a channel; read its slices with --pages "
            "(all, channels, first or a number), save each slice as an image of its own or, if the slices are the "
            "channels, name that axis C: tifffile.imwrite(FILE, stack, imagej=True, metadata={'axes': 'CYX'})"
        )
    _check_colours(axes, sizes, in_chans)
    if "S" in axes or "C" in axes:
        return "".join(axis for axis in axes if axis in _NO_PAGES)
    unnamed = [axis for axis in axes if axis in "IQ"]
    if len(unnamed) == 1 and sizes[unnamed[0]] == in_chans:
        if unnamed == ["I"] and in_chans == 3:
            raise ImageError(
                "has 3 pages of one channel and does not say whether they are channels; save it with axes CYX "
                "(tifffile.imwrite(FILE, x, imagej=True, metadata={'axes': 'CYX'})), or each page as a file of its own;"
                " or state it with --pages (channels, all, first or a number)"
            )
        return axes
    if "Q" in unnamed:
        raise wrong_channels(f"axes {axes} of {tuple(sizes.values())}, the first without a name", in_chans, sizes["Q"])
    return "YX"
