"""Image files of any kind: decoded whole or in parts, described by their headers, counted in pages.

`_FAMILIES` maps files to readers.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError

from .axes import Page
from .dicom import DICOM_EXTENSIONS, dicom_header, dicom_pages, dicom_size, is_dicom, load_dicom
from .errors import ImageError, MissingPackageError, installed
from .files import Header, Scene, WholeScene, open_image_file, printable
from .npy import NpyScene, is_npy, npy_header
from .pillow import Choose, load_pillow, pillow_formats, pillow_header, pillow_pages, pillow_size
from .pixels import PLAIN, Pixels
from .tiff import TiffScene, is_tiff, load_tiff, tiff_header, tiff_pages
from .values import noting
from .zarr import ZarrScene, is_zarr, zarr_header, zarr_pages

_SLIDES = (".btf", ".ndpi", ".qptiff", ".scn", ".svs")  # TIFF by other names
_NAMED = 5


class _Family(NamedTuple):
    """The reader of a family of formats. `file` is an opened file; for Zarr, the path of the folder."""

    takes: Callable[[Any, str], bool]  # `(file, name)`: whether the family reads this file; leaves it at its beginning
    scene: Callable[[Any, int, Pixels], Scene]  # `(file, in_chans, pixels)`
    header: Callable[[Any, Page], Header]  # `(file, page)`
    pages: Callable[[Any], int]  # `(file)`: number of pages
    load: Callable[..., Any] | None = None  # `(file, in_chans, pixels)`: the image; None: that of `scene`


def _whole(load: Callable[..., Any], size: Callable[[Any], tuple[int, int]]) -> Callable[[Any, int, Pixels], Scene]:
    return lambda file, *args: WholeScene(file, size(file), lambda opened: load(opened, *args))


_ZARR = _Family(lambda file, name: False, ZarrScene, zarr_header, zarr_pages)
_PILLOW = _Family(lambda file, name: True, _whole(load_pillow, pillow_size), pillow_header, pillow_pages, load_pillow)
_FAMILIES = (
    _Family(is_npy, NpyScene, npy_header, lambda file: 1),
    # before TIFF: the first 128 bytes of DICOM are free, and some programs write a TIFF header there
    _Family(is_dicom, _whole(load_dicom, dicom_size), dicom_header, dicom_pages, load_dicom),
    _Family(is_tiff, TiffScene, tiff_header, tiff_pages, load_tiff),
    _PILLOW,
)


def _open(file: str | os.PathLike | bytes, name: str) -> tuple[Any, _Family]:
    """A file, opened, and its family."""
    if is_zarr(file):
        return file, _ZARR
    opened = open_image_file(file)
    return opened, next(family for family in _FAMILIES if family.takes(opened, name))


@contextmanager
def _opened(file: str | os.PathLike | bytes, name: str) -> Iterator[tuple[Any, _Family]]:
    opened, family = _open(file, name)
    with nullcontext() if family is _ZARR else opened:
        yield opened, family


def image_extensions() -> tuple[str, ...]:
    """Sorted lower-case extensions of images: all that Pillow opens, and `.npy`.

    Optional packages add slides (`.svs` and others; tifffile), `.dcm` and `.dicom` (pydicom), and `.zarr` (zarr).
    """
    formats = pillow_formats()
    found = {ext for ext, fmt in Image.registered_extensions().items() if fmt in formats}
    optional = {"tifffile": _SLIDES, "pydicom": DICOM_EXTENSIONS, "zarr": (".zarr",)}
    found |= {".npy", *(ext for package, kinds in optional.items() if installed(package) for ext in kinds)}
    return tuple(sorted(found))


def is_dicom_file(path: str) -> bool:
    """Whether a file without extension, or named by a UID, has DICOM's mark, and pydicom is installed."""
    name, extension = os.path.splitext(os.path.basename(path))
    if extension and not extension[1:].isdigit() or name == "DICOMDIR":  # which lists the files of a medium
        return False
    try:
        with open_image_file(path) as file:
            return installed("pydicom") and is_dicom(file, "")
    except (OSError, ImageError):
        return False


def load_image(path: str | os.PathLike, in_chans: int = 3, pixels: Pixels = PLAIN) -> torch.Tensor:
    """Decodes one image file to exactly `in_chans` channels; EXIF rotation is applied.

    With 1 or 3 channels any Pillow mode is converted as timm does it: grey to RGB and back, palettes and CMYK to
    colours; *alpha is dropped*, which shows the colours stored under transparent pixels. With 4 channels RGBA images
    keep their alpha. Any other number needs multi-band TIFF (tifffile) or `.npy`: `[H, W]`, `[H, W, C]` or `[C, H, W]`,
    whichever axis has `in_chans` entries, channels-last if both do. If a TIFF names its axes, C holds the channels.

    Args:
        path: Image file, or folder of a Zarr image.
        in_chans: Number of channels wanted.
        pixels: How stored values become pixels. Nodata is replaced by the mean of the channel's other pixels; if a
            value is named, so are NaN and infinity. The value of a TIFF's tag 42113 (GDAL_NODATA) is always replaced.

    Returns:
        `[C, H, W]`: uint8 for 8-bit images; otherwise float32, where integers are divided by the largest value of
        their type and floats are kept as stored. 16-bit colour PNG comes as 8-bit, which is all that Pillow gives.
        With a divisor, limits or `standardize`, always float32.

    Raises:
        ImageError: (a ValueError) The file cannot be decoded, is not a regular file, has another number of channels,
            contains nodata that is not named, or more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels.
        MissingPackageError: (a ValueError) The file needs a package that is not installed.
    """
    return decode(path, in_chans, printable(path), pixels=pixels)


def decode(
    file: str | os.PathLike | bytes,
    in_chans: int,
    name: str,
    choose: Choose | None = None,
    pixels: Pixels = PLAIN,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes a path, or the content of a file; every error starts with `name`.

    Args:
        file, in_chans, pixels: See `load_image`.
        name: Of the file; its extension decides about `.npy` and DICOM.
        choose: Picks the reduction of a grey or RGB JPEG, which is then returned as `Reduced`.
        convert: Makes the result from `(image, in_chans)` if Pillow reads the file and it is not TIFF.
    """
    with faults_named(name), _opened(file, name) as (opened, family):
        if family.load is None:
            image = family.scene(opened, in_chans, pixels).load()
        else:
            image = family.load(opened, in_chans, pixels, *((choose, convert) if family is _PILLOW else ()))
        return finished(image, pixels)


def finished(image: Any, pixels: Pixels) -> Any:
    """What a reader decoded, standardised if `pixels` has it; measurements keep the gaps."""
    return image if pixels.standardize is None else pixels.standardized(image, keep_gaps=noting())


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """Makes every error of decoding an ImageError or MissingPackageError that starts with `name`."""
    try:
        yield
    except (ImageError, MissingPackageError) as error:
        raise type(error)(f"{name}: {error}") from error.__cause__
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: cannot be decoded (its content is of no format that Pillow reads)") from error
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def open_scene(path: str, in_chans: int, pixels: Pixels) -> Scene:
    """Opens an image of which parts are to be read, perhaps larger than `load_image` allows; checks its header."""
    with faults_named(printable(path)):
        opened, family = _open(path, path)
        try:
            return family.scene(opened, in_chans, pixels)
        except BaseException:
            if family is not _ZARR:
                opened.close()
            raise


def count_pages(path: str) -> int:
    """Pages of a file by its header; all axes of a stack except Y, X, channels and samples count."""
    with faults_named(printable(path)), _opened(path, path) as (file, family):
        return family.pages(file)


def read_header(path: str | os.PathLike, page: Page = None) -> Header:
    """Reads the header of an image file, or of the folder of a Zarr image."""
    with faults_named(printable(path)), _opened(path, os.fspath(path)) as (file, family):
        return family.header(file, page)


def groups_of(headers: Sequence[tuple[str, Header]]) -> str:
    """Files grouped by channels and type, the largest group first, each with its count and one name."""
    groups = Counter((header.channels, header.kind) for _, header in headers).most_common()
    names = {(header.channels, header.kind): name for name, header in reversed(headers)}
    shown = [
        f"{n} {'has' if n == 1 else 'have'} {chans} channel{'s' * (chans != 1)} of {kind} ({names[chans, kind]})"
        for (chans, kind), n in groups[:_NAMED]
    ]
    return "; ".join(shown) + (f"; and {len(groups) - _NAMED} more groups" if len(groups) > _NAMED else "")


def check_index(i: int, n: int) -> int:
    """Returns an index of `n` images."""
    if not 0 <= i < n:
        raise IndexError(f"index {i} is outside 0..{n - 1}")
    return i
