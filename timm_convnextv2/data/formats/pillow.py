"""Reads images with Pillow, JPEGs also at reduced size, and converts between Pillow's modes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from .errors import ImageError, refuse_page, wrong_channels
from .files import Header
from .pixels import PLAIN, Pixels
from .values import fill_nodata, gaps_stay, note_clear, noting, scaled

_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # documents, videos, records, programs
_GREY = ("1", "L", "LA", "La", "I", "F")


class Reduced(NamedTuple):
    """An image that was decoded at 1/2, 1/4 or 1/8 of its size."""

    pixels: torch.Tensor  # `[C, h, w]` uint8
    size: tuple[int, int]  # `(height, width)` of the image at full size, in pixels
    # `(top, left, height, width)` of the image within `pixels`, in pixels of `pixels`. Fractional: if the reduction
    # does not divide a side, the image ends within the last pixel or, if EXIF turns it, begins within the first
    frame: tuple[float, float, float, float]


# full upright size (height, width) -> the reduction that suffices: 1, 2, 4 or 8
Choose = Callable[[tuple[int, int]], int]


_OPENING: ContextVar[bool] = ContextVar("opening", default=False)
# on its own logger: other messages, and those of other programs that use Pillow, stay
logging.getLogger("PIL.TiffImagePlugin").addFilter(lambda record: not _OPENING.get())


@contextmanager
def no_pillow_messages() -> Iterator[None]:
    """Within it, Pillow logs nothing about TIFFs it cannot read: tifffile reads them, or an error is raised."""
    token = _OPENING.set(True)
    try:
        yield
    finally:
        _OPENING.reset(token)


def pillow_formats() -> list[str]:
    """The formats that are images, of all that Pillow opens."""
    Image.preinit()  # the usual formats come first
    Image.init()
    return [name for name in Image.ID if name not in _NOT_IMAGES]


def open_pillow(file: BinaryIO) -> ImageFile.ImageFile:
    """Opens an image by its content: PostScript by the name x.png would be run by Ghostscript."""
    with no_pillow_messages():
        return Image.open(file, formats=pillow_formats())


def load_pillow(
    file: BinaryIO,
    in_chans: int,
    pixels: Pixels,
    choose: Choose | None = None,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """The image as a tensor, as `Reduced`, or as the result of `convert`; see `decode.decode`."""
    with open_pillow(file) as image:
        if pixels.page is not None and refuse_page(pixels.page, getattr(image, "n_frames", 1)):
            image.seek(int(pixels.page))
        # a reduced pixel is a mean, which would hide nodata
        reduced = None if choose is None or not pixels.plain else _reduce(image, choose)
        if convert is not None and pixels.plain:
            return convert(image, in_chans)
        decoded = from_pil(image, in_chans, pixels)
        return decoded if reduced is None else Reduced(decoded, *reduced)


def _reduce(image: Image.Image, choose: Choose) -> tuple[tuple[int, int], tuple[float, float, float, float]] | None:
    """Makes a JPEG that is not yet decoded decode at reduced size.

    Returns:
        `size` and `frame` of `Reduced`; None if the image stays at full size.
    """
    # not CMYK: its conversion to RGB is not linear, so averaging before it would show
    if not isinstance(image, JpegImageFile) or image.mode not in ("L", "RGB"):
        return None
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation in (5, 6, 7, 8)
    width, height = image.size
    size = (width, height) if turned else (height, width)
    reduction = choose(size)
    # without a mode: Pillow then converts colours to grey as at full size
    drafted = image.draft(None, (width // reduction, height // reduction)) if reduction > 1 else None
    if drafted is None:
        return None
    _, (_, _, frame_width, frame_height) = drafted
    # the part of the last pixel that lies beyond the edge comes first on an axis that EXIF reverses, see `rotate`
    columns, rows = image.size
    beyond_x, beyond_y = columns - frame_width, rows - frame_height
    if turned:
        frame_height, frame_width, beyond_y, beyond_x = frame_width, frame_height, beyond_x, beyond_y
    top = beyond_y if orientation in (3, 4, 7, 8) else 0.0
    left = beyond_x if orientation in (2, 3, 6, 7) else 0.0
    return size, (top, left, frame_height, frame_width)


def pillow_header(file: BinaryIO, page: Any) -> Header:
    """See `decode.read_header`."""
    with open_pillow(file) as image:
        wide = image.mode.startswith("I")
        channels = 1 if image.mode in _GREY or wide else 3
        kind = "float32" if image.mode == "F" else "uint16" if wide else "uint8"
        return Header(image.format or "?", image.height, image.width, channels, kind)


def pillow_pages(file: BinaryIO) -> int:
    """Frames of a GIF or WebP; 1 for others."""
    with open_pillow(file) as image:
        return getattr(image, "n_frames", 1)


def pillow_size(file: BinaryIO) -> tuple[int, int]:
    """Height and width, upright."""
    with open_pillow(file) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def is_8_bit(image: Image.Image) -> bool:
    """Whether a Pillow image has at most 8 bits per channel."""
    return image.mode != "F" and not image.mode.startswith("I")


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """The image, turned upright in place; if 8-bit, in the mode that has `in_chans` channels."""
    ImageOps.exif_transpose(image, in_place=True)  # a copy would add a tenth to the time of decoding
    mode = image.mode
    if in_chans not in (1, 3) and (in_chans, mode) != (4, "RGBA"):
        raise wrong_channels(f"{len(image.getbands())} channels (mode {mode})", in_chans, len(image.getbands()))
    if not is_8_bit(image):
        return image
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning of Pillow
    target = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    return image if image.mode == target else image.convert(target)


def from_pil(
    image: Image.Image,
    in_chans: int,
    pixels: Pixels = PLAIN,
    tag: float | None = None,
    masked: np.ndarray | None = None,
    scene: bool = False,
) -> torch.Tensor:
    """A Pillow image, upright, with the requested channels, see `load_image`.

    Pixels that are `masked`, bool `[H, W]`, or in a scene have alpha 0, are nodata.
    """
    ImageOps.exif_transpose(image, in_place=True)  # a copy would add a tenth to the time of decoding
    if in_chans != 4 and image.mode in ("RGBA", "LA", "PA"):
        if scene:
            clear = np.asarray(image.getchannel("A")) == 0
            masked = clear if masked is None else masked | clear
        else:
            note_clear(image)
    named = pixels.nodata is not None or tag is not None or masked is not None and bool(masked.any())
    if named and in_chans == 1 and is_8_bit(image) and image.mode not in ("1", "L", "LA", "La"):
        image = to_mode(image, 3)  # in grey, another colour could have the same value
        filled, gone = fill_nodata(np.array(image).transpose(2, 0, 1), pixels, tag, masked)
        image = Image.fromarray(np.ascontiguousarray(filled.transpose(1, 2, 0)))
        pixels, tag, named = pixels._replace(nodata=None), None, False
        masked = np.asarray(gone.all(0)) if gaps_stay(pixels) else None
    image = to_mode(image, in_chans)
    if not is_8_bit(image):
        x = np.asarray(image)
        if image.mode == "I":  # 16-bit values in 32-bit words; TIFF of this mode goes to tifffile
            if x.min() < 0 or x.max() > 65535:
                raise ImageError(f"has values {x.min()}..{x.max()}, expected 16 bits; save as 16-bit or float32")
            x = x.astype(np.uint16)
        return pixels.clip(scaled(x[None], pixels, tag, masked=masked).repeat(in_chans, 1, 1))
    x = np.array(image)
    x = x[None] if in_chans == 1 else x.transpose(2, 0, 1)
    plain = not named and masked is None and pixels.divide is None and not noting()
    return pixels.clip(torch.from_numpy(x) if plain else scaled(x, pixels, tag, masked=masked))
