"""Images in Zarr folders: OME-Zarr, and plain arrays."""

import os
from typing import Any, NamedTuple

import torch

from .arrays import check_dtype, scaled
from .axes import Layout, Page, choose_axes, count_pages
from .errors import ImageError, MissingPackageError, wrong_channels
from .files import check_size
from .nodata import Nodata

_MARKERS = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: Any) -> bool:
    """Whether this is the path of a folder that holds a Zarr array or group."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).lower().rstrip("/\\").endswith(".zarr"):
        return False
    return any(os.path.isfile(os.path.join(path, name)) for name in _MARKERS)


class ZarrImage(NamedTuple):
    """An opened image.

    Attributes:
        array: Of zarr.
        layout: What of it is the image.
    """

    array: Any
    layout: Layout

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        sizes = dict(zip(self.layout.axes, self.layout.shape, strict=True))
        return sizes["Y"], sizes["X"]

    def read(self, nodata: Nodata, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """The image, or rows and columns of it: `[C, H, W]` as `load_image` gives it; only their chunks are read.

        Raises:
            ImageError: (a ValueError) It is too large, or has values that can only be nodata.
        """
        height, width = (len(range(*part.indices(n))) for part, n in zip((rows, columns), self.size, strict=True))
        check_size(height, width)
        return scaled(self.layout.arrange(self.array[self.layout.pick(rows, columns)]), nodata)


def zarr_axes(path: str | os.PathLike) -> tuple[Any, str]:
    """The array at full resolution of a folder, and its axes, '' where they have no names.

    Raises:
        ImageError: (a ValueError) It holds no image.
        MissingPackageError: (a ValueError) zarr is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise MissingPackageError("is a Zarr folder; run `pip install zarr`") from error
    node: Any = zarr.open(os.fspath(path), mode="r")
    if isinstance(node, zarr.Array):
        return node, ""
    scales = _multiscales(node)
    if not scales and "0" in node:  # as bioformats2raw writes several images
        node = node["0"]
        if isinstance(node, zarr.Array):
            return node, ""
        scales = _multiscales(node)
    if not scales:
        raise ImageError("is a Zarr group without `multiscales`, expected OME-Zarr or one array")
    array = node[scales[0]["datasets"][0]["path"]]
    named = scales[0].get("axes") or [*"tczyx"][-array.ndim :]
    names = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in named]
    return array, "".join(name[:1].upper() for name in names)


def _multiscales(node: Any) -> list[dict[str, Any]]:
    attributes = dict(node.attrs)
    return attributes.get("ome", attributes).get("multiscales") or []


def open_zarr(path: Any, in_chans: int, page: Page = None) -> ZarrImage:
    """Opens the image of a Zarr folder; axes with one entry do not count.

    Args:
        path: The folder.
        in_chans: Channels wanted.
        page: As of `choose_axes`.

    Raises:
        ImageError: (a ValueError) It holds no image, or one with other axes or of another type.
        MissingPackageError: (a ValueError) zarr is not installed.
    """
    array, axes = zarr_axes(path)
    check_dtype(array.dtype)
    shape = tuple(array.shape)
    if not axes:
        if len(shape) == 2:
            axes = "YX"
        elif len(shape) == 3 and in_chans in (shape[2], shape[0]):
            axes = "YXC" if shape[2] == in_chans else "CYX"
        else:
            raise wrong_channels(f"shape {shape}", in_chans)
    single = [axis for axis, size in zip(axes, shape, strict=True) if size == 1 and axis not in "YX"]
    rest = [(axis, size) for axis, size in zip(axes, shape, strict=True) if axis not in single]
    layout = choose_axes("".join(a for a, _ in rest), tuple(s for _, s in rest), in_chans, page)
    if "C" not in layout.kept and not set(layout.kept) - set("YX") and in_chans != 1:
        raise wrong_channels(f"1 channel (axes {axes})", in_chans)
    index = {**layout.index, **dict.fromkeys(single, 0)}
    return ZarrImage(array, Layout(axes, shape, layout.kept, index))


def zarr_pages(path: Any) -> int:
    """Pages of the image of a Zarr folder, see `choose_axes`."""
    array, axes = zarr_axes(path)
    return count_pages(axes, tuple(array.shape)) if axes else 1
