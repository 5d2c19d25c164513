"""Images in Zarr folders: OME-Zarr with its series, wells and fields, and plain arrays."""

import io
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ...config import read_json
from .axes import Layout, Page, choose_axes, count_pages
from .errors import ImageError, MissingPackageError, channels_of, wrong_channels
from .files import Header, Scene, check_inflated, check_size
from .pixels import Pixels
from .values import check_dtype, scaled

_MARKERS = ("zarr.json", ".zgroup", ".zarray")
# codecs of numbers; others, such as pickle, may run code, or make objects
_CODECS = set(
    "bytes transpose sharding_indexed blosc zstd gzip zlib lz4 lzma bz2 delta shuffle bitround quantize packbits "
    "astype fixedscaleoffset zfpy pcodec crc32 crc32c adler32 fletcher32 jenkins_lookup3".split()
)


def is_zarr(path: Any) -> bool:
    """Whether this is the path of a folder that holds a Zarr array or group, in or below a folder named `.zarr`."""
    if not isinstance(path, str | os.PathLike) or ".zarr" not in os.fspath(path).lower():
        return False
    inside = any(part.lower().endswith(".zarr") for part in Path(path).parts)
    return inside and any(os.path.isfile(os.path.join(path, name)) for name in _MARKERS)


def zarr_images(path: str) -> list[str]:
    """The images of a Zarr folder by their paths below it, '.' for the folder itself: series, or fields of wells."""
    attributes = _attributes(path)
    try:
        if "multiscales" in attributes:
            found = []
        elif "plate" in attributes:
            wells = [str(well["path"]) for well in attributes["plate"]["wells"]]
            found = [f"{well}/{field['path']}" for well in wells for field in _attributes(path, well)["well"]["images"]]
        else:  # bioformats2raw numbers several images
            found = [name for name in os.listdir(path) if name.isdecimal() and "multiscales" in _attributes(path, name)]
            found.sort(key=int)
    except (OSError, KeyError, TypeError):  # fails again when it is read, where errors are counted and named
        found = []
    return [name for name in found if ".." not in Path(name).parts and not os.path.isabs(name)] or ["."]


def _attributes(*path: str) -> dict[str, Any]:
    """The attributes of an OME-Zarr group, of any version; empty if it has none."""
    for name, key in (("zarr.json", "attributes"), (".zattrs", None)):
        try:
            found = read_json(Path(*path, name))
            found = found.get(key, {}) if key else found
            return found.get("ome", found)
        except (OSError, ValueError, AttributeError):
            continue
    return {}


def _open(path: str | os.PathLike) -> tuple[Any, str, dict[str, Any], str]:
    """The array at full resolution, its axes, '' if they have no names, its metadata, and its folder."""
    try:
        import zarr
    except ImportError as error:
        raise MissingPackageError("is a Zarr folder; run `pip install zarr`") from error
    images = zarr_images(os.fspath(path))
    if len(images) > 1:
        raise ImageError(f"holds {len(images)} images ({', '.join(images[:3])}, ...); name one of these folders")
    folder = os.path.normpath(os.path.join(path, images[0]))
    scales = _attributes(folder).get("multiscales")
    inner = str(scales[0]["datasets"][0]["path"]) if scales else "." if _metadata(folder) else "0"
    folder, about = os.path.normpath(os.path.join(folder, inner)), _metadata(folder, inner)
    if about is None or ".." in Path(inner).parts or os.path.isabs(inner):
        raise ImageError("is a Zarr group without `multiscales` of arrays in it, expected OME-Zarr or one array")
    # before it is opened: zarr 2 decodes the fill value then
    unknown = sorted(name for name in {*_codecs(about)} - _CODECS if not name.startswith("imagecodecs_"))
    if unknown or "O" in str(about.get("dtype")):
        what = f"the codec {', '.join(unknown)}" if unknown else "objects"
        raise ImageError(f"has {what}, which may run code and is never decoded; save it with blosc, zstd or gzip")
    array: Any = zarr.open(folder, mode="r")
    named = (scales[0].get("axes") or [*"tczyx"][-array.ndim :]) if scales else ()
    names = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in named]
    return array, "".join(name[:1].upper() for name in names), about, folder


def _metadata(*folder: str) -> dict[str, Any] | None:
    """The metadata of an array; None if there is none."""
    for name in ("zarr.json", ".zarray"):
        path = Path(*folder, name)
        if path.is_file():
            found = read_json(path)
            return found if found.get("node_type", "array") == "array" else None
    return None


def _codecs(about: dict[str, Any]) -> Iterator[str]:
    """Names of all codecs of an array in the order of decoding, those inside of shards included."""
    waiting = [*(about.get("codecs") or ()), *(about.get("filters") or ()), about.get("compressor")]
    while waiting:
        if codec := waiting.pop():
            yield str(codec.get("id") or codec["name"]).lower().removeprefix("numcodecs.")
            inner = codec.get("configuration") or {}
            waiting += *inner.get("index_codecs", ()), *inner.get("codecs", ())


class ZarrScene(Scene):
    """A Zarr image, of which only the chunks of a part are decoded."""

    def __init__(self, path: str | os.PathLike, in_chans: int, pixels: Pixels) -> None:
        self.array, axes, self.about, self.folder = _open(path)
        self.pixels = pixels
        check_dtype(self.array.dtype, pixels.divide)
        shape = tuple(self.array.shape)
        if not axes:
            if len(shape) == 2:
                axes = "YX"
            elif len(shape) == 3 and in_chans in (shape[2], shape[0]):
                axes = "YXC" if shape[2] == in_chans else "CYX"
            else:
                raise wrong_channels(f"shape {shape}", in_chans, channels_of(shape))
        sizes = dict(zip(axes, shape, strict=True))
        single = [axis for axis, size in sizes.items() if size == 1 and axis not in "YX"]  # such axes do not count
        rest = [axis for axis in axes if axis not in single]
        layout = choose_axes("".join(rest), tuple(sizes[axis] for axis in rest), in_chans, pixels.page)
        if "C" not in layout.kept and not set(layout.kept) - set("YX") and in_chans != 1:
            raise wrong_channels(f"1 channel (axes {axes})", in_chans, 1)
        self.layout = Layout(axes, shape, layout.kept, {**layout.index, **dict.fromkeys(single, 0)})
        self.size = sizes["Y"], sizes["X"]
        chunk = dict(zip(axes, self.array.chunks, strict=True))
        self.chunk = math.prod(n for axis, n in chunk.items() if axis in "YX" or axis not in layout.kept)
        check_size(self.chunk // chunk["X"], chunk["X"], "chunk")

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        check_size(height, width)
        box = self.layout.pick(slice(top, top + height), slice(left, left + width))
        self._check_inflated(box)
        return self.pixels.clip(scaled(self.layout.arrange(self.array[box]), self.pixels))

    def _check_inflated(self, box: tuple[slice | int, ...]) -> None:
        """Refuses chunks of a part that inflate beyond the limit."""
        array, itemsize = self.array, self.array.dtype.itemsize * math.prod(self.array.chunks) // self.chunk
        codec = next((name for name in _codecs(self.about) if name != "sharding_indexed"), "")
        ends = (i.indices(n)[:2] if isinstance(i, slice) else (i, i + 1) for i, n in zip(box, array.shape, strict=True))
        cells = (range(a // n, (b - 1) // n + 1) for (a, b), n in zip(ends, array.chunks, strict=True))
        for cell in itertools.product(*cells):
            with suppress(OSError), self._open_chunk(cell) as file:  # an absent chunk has the fill value
                check_inflated(file, codec, itemsize)

    def _open_chunk(self, cell: tuple[int, ...]) -> BinaryIO:
        """The stored bytes of a chunk, which may be a part of a shard."""
        array, shards = self.array, getattr(self.array, "shards", None)
        per_shard = [m // n for m, n in zip(shards or array.chunks, array.chunks, strict=True)]
        outer = tuple(i // n for i, n in zip(cell, per_shard, strict=True))
        new = hasattr(array, "metadata")  # else zarr 2
        key = array.metadata.encode_chunk_key(outer) if new else array._dimension_separator.join(map(str, outer))
        file = open(os.path.join(self.folder, key), "rb")  # noqa: SIM115
        if shards is None:
            return file
        with file:
            # offset and size of each chunk, and a checksum
            index = 16 * math.prod(per_shard)
            at_start = self.about["codecs"][0]["configuration"].get("index_location") == "start"
            file.seek(0 if at_start else -index - 4, os.SEEK_SET if at_start else os.SEEK_END)
            number = np.ravel_multi_index([i % n for i, n in zip(cell, per_shard, strict=True)], per_shard)
            offset, size = np.frombuffer(file.read(index), "<u8").reshape(-1, 2)[number].tolist()
            if offset == 2**64 - 1:
                raise FileNotFoundError(key)
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def close(self) -> None:
        pass


def zarr_header(path: str | os.PathLike, page: Page) -> Header:
    """See `decode.read_header`."""
    array, axes, *_ = _open(path)
    axes = axes or {2: "YX"}.get(array.ndim) or ("YXC" if array.shape[2] <= array.shape[0] else "CYX")
    sizes = dict(zip(axes, array.shape, strict=True))
    channels = array.size // (sizes["Y"] * sizes["X"]) if page == "channels" else sizes.get("C", 1)
    return Header("Zarr", sizes["Y"], sizes["X"], channels, str(array.dtype))


def zarr_pages(path: str | os.PathLike) -> int:
    """Pages of the image, see `axes.choose_axes`."""
    array, axes, *_ = _open(path)
    return count_pages(axes, tuple(array.shape)) if axes else 1
