"""Images in Zarr folders: OME-Zarr, and plain arrays."""

import os
from typing import Any

import torch

from .axes import Layout, Page, choose_axes, count_pages
from .errors import ImageError, MissingPackageError, wrong_channels
from .files import Header, Scene, check_size
from .pixels import Pixels
from .values import check_dtype, scaled

_MARKERS = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: Any) -> bool:
    """Whether this is the path of a folder that holds a Zarr array or group."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).lower().rstrip("/\\").endswith(".zarr"):
        return False
    return any(os.path.isfile(os.path.join(path, name)) for name in _MARKERS)


def _open(path: str | os.PathLike) -> tuple[Any, str]:
    """The array at full resolution, and its axes, '' if they have no names."""
    try:
        import zarr
    except ImportError as error:
        raise MissingPackageError("is a Zarr folder; run `pip install zarr`") from error
    node: Any = zarr.open(os.fspath(path), mode="r")
    if not isinstance(node, zarr.Array) and not _multiscales(node) and "0" in node:
        node = node["0"]  # bioformats2raw numbers several images
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


class ZarrScene(Scene):
    """A Zarr image, of which only the chunks of a part are decoded."""

    def __init__(self, path: str | os.PathLike, in_chans: int, pixels: Pixels) -> None:
        self.array, axes = _open(path)
        self.pixels = pixels
        check_dtype(self.array.dtype, pixels.divide)
        shape = tuple(self.array.shape)
        if not axes:
            if len(shape) == 2:
                axes = "YX"
            elif len(shape) == 3 and in_chans in (shape[2], shape[0]):
                axes = "YXC" if shape[2] == in_chans else "CYX"
            else:
                raise wrong_channels(f"shape {shape}", in_chans)
        sizes = dict(zip(axes, shape, strict=True))
        single = [axis for axis, size in sizes.items() if size == 1 and axis not in "YX"]  # such axes do not count
        rest = [axis for axis in axes if axis not in single]
        layout = choose_axes("".join(rest), tuple(sizes[axis] for axis in rest), in_chans, pixels.page)
        if "C" not in layout.kept and not set(layout.kept) - set("YX") and in_chans != 1:
            raise wrong_channels(f"1 channel (axes {axes})", in_chans)
        self.layout = Layout(axes, shape, layout.kept, {**layout.index, **dict.fromkeys(single, 0)})
        self.size = sizes["Y"], sizes["X"]

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        check_size(height, width)
        box = self.layout.pick(slice(top, top + height), slice(left, left + width))
        return self.pixels.clip(scaled(self.layout.arrange(self.array[box]), self.pixels))

    def close(self) -> None:
        pass


def zarr_header(path: str | os.PathLike, page: Page) -> Header:
    """See `decode.read_header`."""
    array, axes = _open(path)
    axes = axes or {2: "YX"}.get(array.ndim) or ("YXC" if array.shape[2] <= array.shape[0] else "CYX")
    sizes = dict(zip(axes, array.shape, strict=True))
    channels = array.size // (sizes["Y"] * sizes["X"]) if page == "channels" else sizes.get("C", 1)
    return Header("Zarr", sizes["Y"], sizes["X"], channels, str(array.dtype))


def zarr_pages(path: str | os.PathLike) -> int:
    """Pages of the image, see `axes.choose_axes`."""
    array, axes = _open(path)
    return count_pages(axes, tuple(array.shape)) if axes else 1
