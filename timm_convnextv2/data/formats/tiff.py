"""TIFF of every kind: by Pillow if that keeps all bands, bits and signs, else by tifffile, whole or in parts."""

import copy
import io
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ...console import count
from .axes import Layout, Page, choose_axes, count_pages
from .errors import ImageError, MissingPackageError, installed, refuse_page, wrong_channels
from .files import Header, Scene, check_size
from .npy import read_box
from .pillow import from_pil, is_8_bit, no_pillow_messages, open_pillow, pillow_header
from .pixels import Pixels
from .values import largest_value, parse_tag, scaled

_NODATA_TAG = 42113  # GDAL_NODATA
_ORIENTATION, _DESCRIPTION, _SUBFILE_TYPE, _SUB_IFDS = 274, 270, 254, 330
_OFFSETS = (273, 324)  # of strips, and of tiles
_MASK = 4  # in the tag of the subfile type
_ZSTD, _WEBP = 50000, 50001
# Pillow opens these, but the libtiff of most builds does not decode them
_NOT_DECODED = (_WEBP,) if int(PIL.__version__.split(".")[0]) >= 12 else (_ZSTD, _WEBP)
_IMAGES = (7, 33003, 33005, 34712, _WEBP)  # compressions: JPEG, JPEG 2000 and WebP
# LSM, MetaMorph (STK), FluoView, Micro-Manager: only tifffile knows their axes
_MICROSCOPES = (34412, 33628, 33629, 34361, 34362, 51123)
_PALETTE, _CMYK, _YCBCR, _LAB = 3, 5, 6, 8
_COLOURS_OF_PILLOW = (_PALETTE, _CMYK, _YCBCR, _LAB)
_MIN_IS_WHITE, _RGB = 0, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2  # alpha, in the tag of extra samples
_LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def is_tiff(file: BinaryIO, name: str) -> bool:
    """Whether a file begins as TIFF or BigTIFF does."""
    head = file.read(4)
    file.seek(0)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def load_tiff(file: BinaryIO, in_chans: int, pixels: Pixels) -> torch.Tensor:
    """The image `[C, H, W]`, see `load_image`; tifffile is needed only if Pillow would lose something."""
    image = _pillow_image(file)
    if not _pillow_keeps_all(image, in_chans, pixels):
        return TiffScene(file, in_chans, pixels, image).load()
    check_size(image.height, image.width)
    check_size(image.tag_v2.get(323, 0), image.tag_v2.get(322, 0), "tile")
    return _load_by_pillow(image, in_chans, pixels)


def _pillow_image(file: BinaryIO) -> Any:
    """The image as Pillow opens it, of any size; None if the layout or compression is unknown to Pillow, or corrupt."""
    try:
        with no_pillow_messages():
            return TiffImagePlugin.TiffImageFile(file)
    except Exception:  # as varied as the faults; tifffile names them
        return None
    finally:
        file.seek(0)


def _load_by_pillow(image: Any, in_chans: int, pixels: Pixels, masked: np.ndarray | None = None) -> torch.Tensor:
    if image is None:
        raise ImageError("has colours or a compression that Pillow does not read; convert it to RGB")
    return from_pil(image, in_chans, pixels, _nodata_tag(image), masked, scene=True)


def _nodata_tag(image: Image.Image) -> float | None:
    """The nodata tag of a TIFF that Pillow has opened."""
    tag = image.tag_v2.get(_NODATA_TAG)  # type: ignore[attr-defined]
    if tag is not None and image.mode in ("P", "PA", "CMYK", "LAB"):
        raise ImageError(f"has a nodata tag (42113), '{tag}', for {image.mode} values; convert it to RGB")
    return parse_tag(tag)


def tiff_header(file: BinaryIO, page: Page) -> Header:
    """See `decode.read_header`; by Pillow if tifffile is not installed."""
    if not installed("tifffile"):
        try:
            return pillow_header(file, page)
        except UnidentifiedImageError:
            file.seek(0)  # `_open_tif` names the missing package
    with _open_tif(file) as tif:
        series, frame = tif.series[0], tif.series[0].keyframe
        sizes = dict(zip(series.axes, series.shape, strict=False))
        alphas = sum(extra in (_ASSOCIATED, _UNASSOCIATED) for extra in frame.extrasamples or ())
        unnamed = [size for axis, size in sizes.items() if axis in "IQ"]
        channels = sizes["S"] - alphas if "S" in sizes else sizes.get("C", 0)
        if page == "channels":
            channels = math.prod(sizes.values()) // (sizes["Y"] * sizes["X"])
        elif not channels:
            channels = unnamed[0] if page is None and len(unnamed) == 1 else 1
        bits, kind = frame.bitspersample, str(series.dtype)
        kind += f" ({bits} bits)" if isinstance(bits, int) and bits not in (8, 16, 32, 64) and "uint" in kind else ""
        return Header(
            "TIFF", frame.imagelength, frame.imagewidth, 3 if frame.photometric == _PALETTE else channels, kind
        )


def tiff_pages(file: BinaryIO) -> int:
    """Pages of all series."""
    with _open_tif(file) as tif:
        return sum(_page_counts(tif))


def sparse_values(file: BinaryIO) -> np.ndarray | None:
    """Stored values of the first page of a TIFF that lacks tiles or strips; None for other files.

    Absent pixels are nodata or 0; Pillow would read them from the file's beginning.
    """
    file.seek(0)
    if not is_tiff(file, "") or (image := _pillow_image(file)) is None or not _is_sparse(image.tag_v2):
        return None
    with _open_tif(file) as tif:
        page = tif.pages[0]
        return _read_page(file, tif, page, page, slice(0, page.imagelength), slice(0, page.imagewidth))


class TiffScene(Scene):
    """A TIFF whose stored values tifffile reads; Pillow's conversions are applied part by part."""

    def __init__(self, file: BinaryIO, in_chans: int, pixels: Pixels, image: Any = None) -> None:
        self.file, self.in_chans, self.pixels, self.image = file, in_chans, pixels, image or _pillow_image(file)
        plain, number = _pillow_keeps_all(self.image, in_chans, pixels), 0
        file.seek(0)
        self.tif = _open_tif(file)
        if plain:
            import tifffile

            self.series = tifffile.TiffPageSeries([self.tif.pages[0]])
            self.layout = Layout(self.series.axes, self.series.shape, self.series.axes, {})
        else:
            self.series, self.layout, number = _choose_series(self.tif, in_chans, pixels.page)
        self.frame = frame = self.series.keyframe
        self.mask = None if plain else _mask_of(self.tif, frame, number)
        self.orientation = frame.tags.valueof(_ORIENTATION, 1)
        height, width = frame.imagelength, frame.imagewidth
        self.size = (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)
        # rows and columns of the series must be those of its pages
        self.parts = bool(self.series.dataoffset) or (self.series.axes.endswith(frame.axes) and frame.imagedepth == 1)
        self.by_pillow = plain and is_8_bit(self.image) or _needs_pillow(frame, self.layout, in_chans)
        if self.by_pillow and self.image is not None and isinstance(pixels.page, int):
            page: Any = self.series.pages[number]
            with no_pillow_messages():
                self.image.seek(page.index)
        self.convert = self._converter(self.image) if self.by_pillow and self.image is not None else None
        self.whole = not self.parts or self.by_pillow and self.convert is None

    def load(self) -> torch.Tensor:
        check_size(*self.size)
        rows, columns = slice(0, self.frame.imagelength), slice(0, self.frame.imagewidth)
        if self.by_pillow and (self.image is None or not _is_sparse(self.image.tag_v2)):
            return _load_by_pillow(self.image, self.in_chans, self.pixels, self._masked(rows, columns))
        if self.by_pillow and self.convert is None:
            raise ImageError("lacks tiles, in colours that are only read whole; convert it to RGB")
        return self._decode(rows, columns)

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        if self.whole:
            return self.load()[:, top : top + height, left : left + width].clone()
        return self._decode(*self._stored(top, left, height, width))

    def _decode(self, rows: slice, columns: slice) -> torch.Tensor:
        """Rows and columns as stored; all of them unless `parts`."""
        try:
            if self.parts:
                x = _read_part(self.file, self.tif, self.series, self.layout, rows, columns)
            else:
                x = self.layout.arrange(self.series.asarray()[self.layout.pick()])
        except ImageError:
            raise
        except Exception as error:
            raise _codec_missing(self.frame, error) or error from None
        masked = self._masked(rows, columns)
        if self.convert:
            return self.convert(x, masked)
        return self.pixels.clip(_to_channels(x, self.frame, self.in_chans, self.pixels, masked))

    def _masked(self, rows: slice, columns: slice) -> np.ndarray | None:
        """Pixels that the file's mask leaves out, bool `[h, w]`, upright."""
        if self.mask is None:
            return None
        valid = _read_page(self.file, self.tif, *self.mask, rows, columns)
        return rotate(valid[None] == 0, self.orientation)[0]

    def _converter(self, image: Any) -> Callable[[np.ndarray, np.ndarray | None], torch.Tensor] | None:
        """Converts stored values `[C, h, w]` to the requested channels; None if Pillow does not take them as stored."""
        rawmode = image.tile[0][3][0]
        planar = len(rawmode) == 1 and len(image.getbands()) > 1
        if self.frame._dtype != np.uint8 or self.frame.bitspersample != 8 or planar and image.mode != "RGB":
            return None
        if self.frame.photometric == _YCBCR and rawmode != "RGB":
            return None
        tag, mode = _nodata_tag(image), image.mode
        rawmode = mode if planar else rawmode
        palette = image.palette.getdata() if mode == "P" else None

        def convert(x: np.ndarray, masked: np.ndarray | None) -> torch.Tensor:
            x = np.ascontiguousarray(rotate(x, self.orientation).transpose(1, 2, 0))
            piece = Image.frombytes(mode, (x.shape[1], x.shape[0]), x.tobytes(), "raw", rawmode)
            if palette is not None:
                piece.putpalette(palette[1], palette[0])
            return from_pil(piece, self.in_chans, self.pixels, tag, masked, scene=True)

        return convert

    def _stored(self, top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns as stored, for a part of the upright image."""
        down, across = slice(top, top + height), slice(left, left + width)
        if self.orientation in (3, 4, 7, 8):
            down = slice(self.size[0] - down.stop, self.size[0] - down.start)
        if self.orientation in (2, 3, 6, 7):
            across = slice(self.size[1] - across.stop, self.size[1] - across.start)
        return (across, down) if self.orientation in (5, 6, 7, 8) else (down, across)

    def close(self) -> None:
        self.tif.close()
        super().close()


def _pillow_keeps_all(image: Any, in_chans: int, pixels: Pixels) -> bool:
    """Whether Pillow gives all bands, bits and signs of a TIFF, and drops nothing of meaning.

    It takes 16-bit RGB as 8-bit, leaves out extra bands, reads int8 as uint8, does not invert 16-bit MinIsWhite, and
    ignores axes and sub-IFDs.
    """
    if image is None or pixels.page is not None:
        return False
    tags = image.tag_v2
    # masks first: Pillow opens no file of which it counts such pages
    if _is_sparse(tags) or any(kind & _MASK for kind in _subfile_types(image)):
        return False
    if _names_axes(image) or _SUB_IFDS in tags or tags.get(_SUBFILE_TYPE, 0) & 1 or tags.get(259) in _NOT_DECODED:
        return False
    bits, samples, photometric = tags.get(258, (1,)), tags.get(277, 1), tags.get(262, _MIN_IS_WHITE)
    if in_chans == 4:
        return image.mode == "RGBA" and max(bits) <= 8
    if in_chans not in (1, 3):
        return False
    if photometric in _COLOURS_OF_PILLOW:
        return True
    if any(kind != 1 for kind in tags.get(339, (1,))) and (image.mode != "F" or photometric == _MIN_IS_WHITE):
        return False
    if max(bits) not in (1, 2, 4, 8, 16, 32) or max(bits) > 8 and photometric == _MIN_IS_WHITE:
        return False
    colours = samples - sum(extra in (_ASSOCIATED, _UNASSOCIATED) for extra in tags.get(338, ()))
    if image.mode == "I" or colours not in (1, 3) or samples > 1 and max(bits) > 8:
        return False
    # three grey pages may be the three channels
    return not (in_chans == 3 and colours == 1 and getattr(image, "n_frames", 1) == 3)


def _is_sparse(tags: Any) -> bool:
    """Whether tiles or strips were never written, which have the offset 0."""
    return any(0 in tags.get(tag, ()) for tag in _OFFSETS)


def _subfile_types(image: Any) -> Iterator[int]:
    """Tag 254 of each page after the first."""
    ifd, seen = copy.copy(image.tag_v2), set()
    while ifd.next and ifd.next not in seen:
        seen.add(ifd.next)
        image.fp.seek(ifd.next)
        ifd.load(image.fp)
        yield ifd.get(_SUBFILE_TYPE, 0)


def _names_axes(image: Any) -> bool:
    """Whether a TIFF has several pages whose axes its metadata name."""
    tags, several = image.tag_v2, getattr(image, "n_frames", 1) > 1
    text = str(tags.get(_DESCRIPTION, ""))
    if text.startswith("{"):  # written by tifffile
        try:
            several = math.prod(json.loads(text)["shape"]) != image.width * image.height * tags.get(277, 1)
        except (ValueError, TypeError, KeyError):
            pass
    # an ImageJ file may have one page for all
    named = "<OME" in text or re.match(r"ImageJ=.*\nimages=", text) or any(tag in tags for tag in _MICROSCOPES)
    return bool(named or text and several)


def _open_tif(file: BinaryIO) -> Any:
    """The `TiffFile` of tifffile, which may open no other file that this one names."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF that is multi-band, 16-bit colour or otherwise beyond Pillow; run `pip install tifffile imagecodecs`"
        ) from error
    tif = tifffile.TiffFile(file, _multifile=False)
    if tif.is_ndtiff or tif.is_ome and "FileName=" in (tif.ome_metadata or "") and tif.series[0].kind != "ome":
        raise ImageError("names other files for its pages, which are never opened; save the image as one file")
    return tif


def _choose_series(tif: Any, in_chans: int, page: Page) -> tuple[Any, Layout, int]:
    """The series of an opened TIFF to read, the part of it, and the number of the page within it."""
    number = 0
    if isinstance(page, int):
        ends = [*accumulate(_page_counts(tif))]
        refuse_page(page, ends[-1])
        number = bisect_right(ends, page)
        page -= ends[number - 1] if number else 0
    series = _image_series(tif)[number]
    _refuse_parts(series, series.keyframe)
    return series, choose_axes(series.axes, series.shape, in_chans, page), page if isinstance(page, int) else 0


def _page_counts(tif: Any) -> list[int]:
    """Pages of each series of an opened TIFF."""
    return [count_pages(series.axes, series.shape) for series in _image_series(tif)]


def _image_series(tif: Any) -> list[Any]:
    """The series that are not masks of others."""
    return [series for series in tif.series if not series.keyframe.subfiletype & _MASK]


def _mask_of(tif: Any, frame: Any, number: int) -> tuple[Any, Any] | None:
    """Keyframe and page of the mask of a page, as GDAL writes it."""
    for series in tif.series:
        page, size = series.keyframe, (frame.imagelength, frame.imagewidth)
        if page.subfiletype & _MASK and (page.imagelength, page.imagewidth) == size and number < len(series.pages):
            return page, series.pages[number]
    return None


def _needs_pillow(page: Any, layout: Layout, in_chans: int) -> bool:
    """Whether a page of tifffile has colours that only Pillow converts."""
    if page.photometric not in _COLOURS_OF_PILLOW or in_chans not in (1, 3):
        return False
    if "C" in layout.kept:
        raise ImageError("has channels in palette, CMYK, YCbCr or Lab colours; save them as MinIsBlack")
    return True


def _refuse_parts(series: Any, page: Any) -> None:
    """Refuses files whose first page is a thumbnail, or that are one of several files of an image."""
    if page.subfiletype & 1:
        raise ImageError(
            "has a thumbnail as its first page, the image itself is another page or sub-IFD, as in raw files of "
            "cameras; convert it to a plain TIFF"
        )
    if series.is_multifile or series.transform is not None:
        raise ImageError(f"is one of several files of an image, or of a kind ({series.kind}) to be converted first")
    for sub in page.pages or ():
        if sub.imagewidth * sub.imagelength > page.imagewidth * page.imagelength:
            raise ImageError(
                f"has a larger image in a sub-IFD ({sub.imagelength} x {sub.imagewidth}) than in its first page "
                f"({page.imagelength} x {page.imagewidth}); convert it to a plain TIFF"
            )


def _codec_missing(page: Any, error: Exception) -> MissingPackageError | None:
    """The error of a compression that only imagecodecs decodes; None if imagecodecs is not the cause."""
    if not isinstance(error, ImportError) and "imagecodecs" not in str(error) or installed("imagecodecs"):
        return None
    name = getattr(page.compression, "name", page.compression)
    return MissingPackageError(f"TIFF with compression {name}; run `pip install imagecodecs`")


def _to_channels(x: np.ndarray, page: Any, in_chans: int, pixels: Pixels, masked: np.ndarray | None) -> torch.Tensor:
    """Stored values `[C, H, W]` as the requested channels, upright; `masked`, upright, is nodata."""
    x = rotate(x, page.tags.valueof(_ORIENTATION, 1))
    x, clear = _without_alpha(x, tuple(page.extrasamples or ()), in_chans)
    masked = clear if masked is None else masked | clear
    bits = page.bitspersample if x.dtype.kind == "u" else None
    inverted = page.photometric == _MIN_IS_WHITE
    if inverted and x.dtype.kind not in "bu":
        raise ImageError(f"holds {x.dtype} with MinIsWhite, which is undefined; save as MinIsBlack")
    tag = parse_tag(page.tags.valueof(_NODATA_TAG))
    image = scaled(x, pixels, tag, bits, masked)
    white = 255 if image.dtype == torch.uint8 else 1
    if inverted:
        image = ((largest_value(x.dtype, bits) or 1) / pixels.divide if pixels.divide else white) - image
    # the conversions of 8-bit images
    if len(image) == 1 and in_chans == 3:
        image = image.repeat(3, 1, 1)
    elif len(image) == 3 and in_chans == 1 and page.photometric == _RGB:
        image = (image.float() / white * _LUMA).sum(0, keepdim=True)
    if len(image) != in_chans:
        raise wrong_channels(count(len(image), "channel"), in_chans, len(image))
    return image


def _without_alpha(x: np.ndarray, extras: tuple[int, ...], in_chans: int) -> tuple[np.ndarray, np.ndarray]:
    """Drops surplus alpha, and divides colours by alpha if they were multiplied by it; where dropped alpha is 0."""
    first, clear = len(x) - len(extras), np.zeros(x.shape[1:], bool)
    if first < 1:
        return x, clear
    if _ASSOCIATED in extras:
        largest = largest_value(x.dtype) or 1
        with np.errstate(divide="ignore", invalid="ignore"):
            alpha = x[first + extras.index(_ASSOCIATED)].astype(np.float64)
            colours = np.where(alpha > 0, x[:first] * (largest / alpha), 0)
        if x.dtype.kind in "iu":
            colours = np.rint(colours).clip(0, largest)
        x = np.concatenate([colours.astype(x.dtype), x[first:]])
    if len(x) == in_chans:
        return x, clear
    alphas = [first + k for k, extra in enumerate(extras) if extra in (_ASSOCIATED, _UNASSOCIATED)]
    return np.delete(x, alphas, 0), (x[alphas] == 0).any(0)


def rotate(x: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the TIFF / EXIF orientation 1..8 to `[C, H, W]`."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        x = x[:, ::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, :, ::-1]
    return x


def _read_part(file: BinaryIO, tif: Any, series: Any, layout: Layout, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a series: `[C, h, w]` of stored values."""
    page = series.keyframe
    if series.dataoffset:
        dtype, box = np.dtype(tif.byteorder + series.dtype.char), layout.pick(rows, columns)
        return layout.arrange(read_box(file, dtype, series.dataoffset, layout.shape, box))
    leading = len(layout.axes) - len(page.axes)
    numbers = np.arange(math.prod(layout.shape[:leading])).reshape(layout.shape[:leading])
    chosen = numbers[layout.pick(axes=layout.axes[:leading])]
    parts = [_read_page(file, tif, page, series.pages[k], rows, columns) for k in np.ravel(chosen).tolist()]
    x = np.stack(parts).reshape(*np.shape(chosen), *parts[0].shape)
    # rows and columns are already those asked for
    inner = layout.pick(axes=layout.axes[leading:])
    return layout.arrange(x[(slice(None),) * np.ndim(chosen) + inner])


def _read_page(file: BinaryIO, tif: Any, page: Any, frame: Any, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a page like `page`, with its axes."""
    samples, _, height, width, contiguous = page.shaped  # planes, depth, rows, columns, samples of a pixel
    if frame is not None and frame.is_final and frame.dataoffsets[0]:
        dtype, shape = np.dtype(tif.byteorder + page._dtype.char), (samples, height, width, contiguous)
        x = read_box(file, dtype, frame.dataoffsets[0], shape, (slice(None), rows, columns, slice(None)))
    else:
        x = _decode_segments(tif, frame, page, rows, columns)
    if page.axes.startswith("S"):
        return x[..., 0]
    return x[0] if "S" in page.axes else x[0, ..., 0]


def _decode_segments(tif: Any, frame: Any, page: Any, rows: slice, columns: slice) -> np.ndarray:
    """Decodes the tiles or strips that the part touches: `[planes, h, w, samples]`."""
    planes, _, height, width, samples = page.shaped
    high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    check_size(high, wide, "tile" if page.is_tiled else "strip")
    down, across = -(-height // high), -(-width // wide)
    touched_rows = range(rows.start // high, (rows.stop - 1) // high + 1)
    touched_columns = range(columns.start // wide, (columns.stop - 1) // wide + 1)
    indices = [(p * down + r) * across + c for p in range(planes) for r in touched_rows for c in touched_columns]
    y0, x0 = touched_rows.start * high, touched_columns.start * wide
    x = np.full((planes, len(touched_rows) * high, len(touched_columns) * wide, samples), page.nodata, page._dtype)
    if frame is not None:  # else a page that was never written
        options: dict[str, Any] = {"_fullsize": False}
        if page.compression in (6, 7, 34892, 33007):  # JPEG, as TiffPage.segments does
            options.update(jpegtables=frame.jpegtables, jpegheader=page.jpegheader)
        offsets, counts = ([values[i] for i in indices] for values in (frame.dataoffsets, frame.databytecounts))
        # its argument `indices` fails for a single segment before tifffile 2026
        for data, k in tif.filehandle.read_segments(offsets, counts, flat=True):
            if data and page.compression in _IMAGES:  # which may be larger than its tile
                with suppress(UnidentifiedImageError), open_pillow(io.BytesIO(data)) as image:
                    check_size(image.height, image.width, "tile")
            part, (plane, _, top, left, _), shape = page.decode(data, indices[k], **options)
            if part is not None:  # else a tile that was never written
                top, left = top - y0, left - x0
                x[plane, top : top + part.shape[1], left : left + part.shape[2]] = part[0]
    return x[:, rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0]
