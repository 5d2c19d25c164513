"""Picture files of any kind as tensors with the channels asked for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from .arrays import load_npy, scaled
from .axes import Page
from .dicom import DICOM_EXTENSIONS, is_dicom, load_dicom
from .errors import ImageError, MissingPackageError, installed, refuse_page, wrong_channels
from .files import open_image_file
from .nodata import Nodata, fill_nodata, parse_tag
from .pixels import PLAIN, Pixels
from .tiff import NODATA_TAG, is_tiff, pillow_keeps_all, read_tiff
from .zarrs import is_zarr, open_zarr

# what Pillow opens but is no picture: documents, drawings, films, containers of scientific records
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_SLIDES = (".btf", ".ndpi", ".qptiff", ".scn", ".svs")  # TIFF by other names


class Reduced(NamedTuple):
    """A picture that was decoded at 1/2, 1/4 or 1/8 of its size.

    Attributes:
        pixels: `[C, h, w]` uint8.
        size: `(height, width)` of the picture at full size, in pixels.
        frame: `(top, left, height, width)` of the picture in `pixels`, in units of these. Fractional: a side that the
            reduction does not divide ends within the last pixel or, in a picture that EXIF turns, begins within the
            first.
    """

    pixels: torch.Tensor
    size: tuple[int, int]
    frame: tuple[float, float, float, float]


# Told a picture's full size (height, width), upright: the reduction that would do, one of 1, 2, 4, 8
Choose = Callable[[tuple[int, int]], int]


def image_extensions() -> tuple[str, ...]:
    """Sorted lower-case file name extensions that count as pictures: all that Pillow opens, and `.npy`.

    Of optional packages: with tifffile slides (`.svs` and others), with pydicom `.dcm` and `.dicom`, with zarr folders
    named `.zarr`. Formats that are no pictures (eps, mpg, hdf5, wmf, grib, ...) are left out.
    """
    Image.init()
    registered = Image.registered_extensions().items()
    found = {ext for ext, fmt in registered if fmt in Image.OPEN and fmt not in _NOT_PICTURES}
    optional = {"tifffile": _SLIDES, "pydicom": DICOM_EXTENSIONS, "zarr": (".zarr",)}
    found |= {".npy", *(ext for package, kinds in optional.items() if installed(package) for ext in kinds)}
    return tuple(sorted(found))


def load_image(path: str | os.PathLike, in_chans: int = 3, pixels: Pixels = PLAIN) -> torch.Tensor:
    """Decodes one picture file to exactly `in_chans` channels.

    With 1 or 3 channels any Pillow mode is converted as timm does it: grey to RGB and back, palettes and CMYK to
    colours; *alpha is dropped*, which shows the colours stored under transparent pixels. With 4 channels RGBA pictures
    keep their alpha. Any other number comes from multi-band TIFF (needs the package tifffile) or `.npy`: `[H, W]`,
    `[H, W, C]` or `[C, H, W]`, whichever axis has `in_chans` entries, channels-last if both do. Where a TIFF names its
    axes, C is that of the channels, and depth and time never are. Of files that hold several pictures, the first is
    used. EXIF rotation is applied.

    Args:
        path: Picture file.
        in_chans: Number of channels wanted.
        pixels: How stored values become pixels: the value that means "no data", the divisor, limits. Nodata is replaced
            by the mean of the channel's other pixels; if a value is named, so are NaN and infinity. The value of a
            TIFF's tag 42113 (GDAL_NODATA) is always replaced.

    Returns:
        `[C, H, W]`: uint8 for 8-bit pictures; otherwise float32, where integers are divided by the largest value of
        their type (16-bit by 65535: never clipped to 8 bits) and floats are kept as stored. 16-bit colour PNG comes
        as 8-bit, which is all that Pillow gives. With a divisor or limits, always float32.

    Raises:
        ImageError: (a ValueError) The file cannot be decoded, is truncated, is no regular file, has another number of
            channels, contains NaN, infinity or another value that is nodata and not named, or has more pixels than
            twice `PIL.Image.MAX_IMAGE_PIXELS`, in any format (cut such pictures into tiles or raise that limit; from
            once that number Pillow only warns).
        MissingPackageError: (a ValueError) The file needs a package that is not installed.
    """
    return decode(path, in_chans, printable(path), pixels=pixels)  # type: ignore[return-value]  # no `choose`


def printable(path: str | os.PathLike) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def decode(
    file: str | os.PathLike | bytes,
    in_chans: int,
    name: str,
    choose: Choose | None = None,
    pixels: Pixels = PLAIN,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes a file (its path, or its content as bytes); every fault becomes an error that starts with `name`.

    Grey and RGB JPEGs are asked about by `choose`, if given, and come as `Reduced` where it says more than 1. `convert`
    makes of `(image, in_chans)` what is returned for what Pillow reads whole, but TIFF; without, it is a tensor.
    """
    with faults_named(name):
        if is_zarr(file):
            return pixels.clip(open_zarr(file, in_chans, pixels.page).read(Nodata.of(pixels)))
        with open_image_file(file) as opened:
            if name.lower().endswith(".npy"):
                refuse_page(pixels.page, 1)
                return pixels.clip(load_npy(opened, in_chans, Nodata.of(pixels)))
            if is_dicom(opened, name):
                return pixels.clip(load_dicom(opened, in_chans, pixels, from_pil))
            if is_tiff(opened):
                return pixels.clip(_from_tiff(opened, in_chans, Nodata.of(pixels), pixels.page))
            with Image.open(opened) as image:
                if pixels.page is not None:
                    _seek(image, pixels.page)
                # a reduced pixel is a mean, in which nodata would be lost
                place = None if choose is None or not pixels.plain else _reduce(image, choose)
                if convert is not None and pixels.plain:
                    return convert(image, in_chans)
                decoded = from_pil(image, in_chans, pixels)
                return decoded if place is None else Reduced(decoded, *place)


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """Makes every fault of decoding an error that starts with `name`."""
    try:
        yield
    except MissingPackageError as error:
        raise MissingPackageError(f"{name}: {error}") from error
    except ImageError as error:
        raise type(error)(f"{name}: {error}") from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: cannot be decoded (its content is of no format that Pillow reads)") from error
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _seek(image: Image.Image, page: int | str) -> None:
    """Goes to a page of an image of several, as of GIF and WebP."""
    if refuse_page(page, getattr(image, "n_frames", 1)):
        image.seek(int(page))


def _from_tiff(file: BinaryIO, in_chans: int, nodata: Nodata, page: Page = None) -> torch.Tensor:
    """By Pillow where it keeps all, else by tifffile."""
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:
        raise
    except Exception:  # a layout or compression that Pillow does not know, or a damaged file: tifffile says which
        file.seek(0)
        return read_tiff(file, in_chans, nodata, partial(_unconvertible, in_chans), page)
    with image:
        by_pillow = partial(_tiff_by_pillow, image, in_chans, nodata, page)
        if page is None and pillow_keeps_all(image, in_chans):
            return by_pillow()
        file.seek(0)
        return read_tiff(file, in_chans, nodata, by_pillow, page)


def _tiff_by_pillow(image: Image.Image, in_chans: int, nodata: Nodata, page: Page = None) -> torch.Tensor:
    if isinstance(page, int):
        image.seek(page)
    return convert_image(image, in_chans, tagged_nodata(image, nodata))


def tagged_nodata(image: Image.Image, nodata: Nodata) -> Nodata:
    """Adds the value of the nodata tag of a TIFF that Pillow has opened.

    Raises:
        ImageError: (a ValueError) Its values are no measurements.
    """
    tag = image.tag_v2.get(NODATA_TAG)  # type: ignore[attr-defined]
    if tag is not None and image.mode in ("P", "PA", "CMYK", "LAB"):
        raise ImageError(f"has a nodata tag (42113), '{tag}', for {image.mode} values; convert it to RGB")
    return parse_tag(nodata, tag)


def _unconvertible(in_chans: int) -> torch.Tensor:
    raise ImageError("has colours or a compression that Pillow does not read; convert it to RGB")


def _reduce(image: Image.Image, choose: Choose) -> tuple[tuple[int, int], tuple[float, float, float, float]] | None:
    """Sets a JPEG that is not yet decoded to be so at reduced size.

    Returns:
        `size` and `frame` of `Reduced`; None where the picture stays as it is.
    """
    # CMYK is left out: its conversion to colours is not linear, so the order of averaging and conversion would show
    if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation in (5, 6, 7, 8)
    width, height = image.size
    size = (width, height) if turned else (height, width)
    reduction = choose(size)
    # no mode: greys of a colour JPEG come from its colours, as at full size
    drafted = image.draft(None, (width // reduction, height // reduction)) if reduction > 1 else None
    if drafted is None:
        return None
    _, (_, _, frame_width, frame_height) = drafted
    # what the last pixel has beyond the picture's edge comes first where the axis is reversed, see _rotate
    columns, rows = image.size
    beyond_x, beyond_y = columns - frame_width, rows - frame_height
    if turned:
        frame_height, frame_width, beyond_y, beyond_x = frame_width, frame_height, beyond_x, beyond_y
    top = beyond_y if orientation in (3, 4, 7, 8) else 0.0
    left = beyond_x if orientation in (2, 3, 6, 7) else 0.0
    return size, (top, left, frame_height, frame_width)


def from_pil(image: Image.Image, in_chans: int, pixels: Pixels = PLAIN) -> torch.Tensor:
    """A Pillow image, upright, with the channels asked for, see `load_image`."""
    return pixels.clip(convert_image(image, in_chans, Nodata.of(pixels)))


def is_8_bit(image: Image.Image) -> bool:
    """Whether an image of Pillow has 8 bits or less a channel."""
    return image.mode != "F" and not image.mode.startswith("I")


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """The image, turned upright in place; if 8-bit, in the mode that has `in_chans` channels."""
    ImageOps.exif_transpose(image, in_place=True)  # a copy would cost a tenth of the decoding
    mode = image.mode
    if in_chans not in (1, 3) and (in_chans, mode) != (4, "RGBA"):
        raise wrong_channels(f"{len(image.getbands())} channels (mode {mode})", in_chans)
    if not is_8_bit(image):
        return image
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow asks for; straight to RGB gives the same colours and a warning
    target = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    return image if image.mode == target else image.convert(target)


def convert_image(image: Image.Image, in_chans: int, nodata: Nodata) -> torch.Tensor:
    """An image of Pillow, upright, with the channels asked for, see `load_image`."""
    if nodata.values and in_chans == 1 and is_8_bit(image) and image.mode not in ("1", "L", "LA", "La"):
        image = to_mode(image, 3)  # a grey of this value may be that of another colour
        filled = fill_nodata(np.array(image).transpose(2, 0, 1), nodata)
        image, nodata = Image.fromarray(np.ascontiguousarray(filled.transpose(1, 2, 0))), nodata._replace(values=())
    image = to_mode(image, in_chans)
    if not is_8_bit(image):
        x = np.asarray(image)
        if image.mode == "I":  # 16-bit values in 32-bit words, except for TIFF, which does not come here with this mode
            if x.min() < 0 or x.max() > 65535:
                raise ImageError(f"has values {x.min()}..{x.max()}, expected 16 bits; save as 16-bit or float32")
            x = x.astype(np.uint16)
        return scaled(x[None], nodata).repeat(in_chans, 1, 1)
    x = np.array(image)
    x = x[None] if in_chans == 1 else x.transpose(2, 0, 1)
    as_read = not nodata.values and nodata.divide is None and nodata.stored is None
    return torch.from_numpy(x) if as_read else scaled(x, nodata)


def check_in_chans(in_chans: int) -> int:
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
    return in_chans


def check_index(i: int, n: int) -> int:
    if not 0 <= i < n:
        raise IndexError(f"index {i} is outside 0..{n - 1}")
    return i
