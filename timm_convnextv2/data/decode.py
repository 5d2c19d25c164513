"""Picture files of any kind as tensors with the channels asked for."""

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

__all__ = ["ImageError", "MissingPackageError", "image_extensions", "load_image"]

# what Pillow opens but is no picture: documents, drawings, films, containers of scientific records
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class ImageError(ValueError):
    """One picture cannot be used. Pretraining replaces it by another one and reports it."""


class MissingPackageError(ValueError):
    """An optional package that the data needs is not installed. Never skipped: this is not the picture's fault."""


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

    Formats that are no pictures (eps, mpg, hdf5, wmf, grib, ...) are left out.
    """
    Image.init()
    registered = Image.registered_extensions().items()
    found = {ext for ext, fmt in registered if fmt in Image.OPEN and fmt not in _NOT_PICTURES}
    return tuple(sorted(found | {".npy"}))


def load_image(path: str | os.PathLike, in_chans: int = 3) -> torch.Tensor:
    """Decodes one picture file to exactly `in_chans` channels.

    With 1 or 3 channels any Pillow mode is converted as timm does it: grey to RGB and back, palettes and CMYK to
    colours; *alpha is dropped*, which shows the colours stored under transparent pixels. With 4 channels RGBA pictures
    keep their alpha. Any other number comes from multi-band TIFF (needs the package tifffile) or `.npy`: `[H, W]`,
    `[H, W, C]` or `[C, H, W]`, whichever axis has `in_chans` entries, channels-last if both do. Of files that hold
    several pictures, the first is used. EXIF rotation is applied.

    Args:
        path: Picture file.
        in_chans: Number of channels wanted.

    Returns:
        `[C, H, W]`: uint8 for 8-bit pictures; otherwise float32, where integers are divided by the largest value of
        their type (16-bit by 65535: never clipped to 8 bits) and floats are kept as stored. 16-bit colour PNG comes
        as 8-bit, which is all that Pillow gives.

    Raises:
        ImageError: (a ValueError) The file cannot be decoded, is truncated, has another number of channels, contains
            NaN or infinity, or has more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS` (cut such pictures into tiles
            or raise that limit; from once that number Pillow only warns).
        MissingPackageError: (a ValueError) The file needs a package that is not installed.
    """
    return decode(path, in_chans, printable(path))


def printable(path: str | os.PathLike) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def decode(
    file: str | os.PathLike | bytes,
    in_chans: int,
    name: str,
    choose: Choose | None = None,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes a file (its path, or its content as bytes); every fault becomes an error that starts with `name`.

    Grey and RGB JPEGs are asked about by `choose`, if given, and come as `Reduced` where it says more than 1.
    `convert` makes of `(image, in_chans)` what is returned for what Pillow reads whole: `from_pil` if None, a tensor.
    """
    convert = convert or from_pil
    try:
        if name.lower().endswith(".npy"):
            return _from_array(np.load(_open(file), allow_pickle=False), in_chans)
        try:
            image = Image.open(_open(file))
        except UnidentifiedImageError:
            if not _is_tiff(file):
                raise
            return _from_tiff(_open(file), in_chans)
        with image:
            if image.format == "TIFF" and not _pillow_keeps_all(image, in_chans):
                return _from_tiff(_open(file), in_chans)
            place = None if choose is None else _reduce(image, choose)
            pixels = convert(image, in_chans)
            return pixels if place is None else Reduced(pixels, *place)
    except MissingPackageError as error:
        raise MissingPackageError(f"{name}: {error}") from error
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


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


def _open(file: str | os.PathLike | bytes) -> Any:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _is_tiff(file: str | os.PathLike | bytes) -> bool:
    if isinstance(file, bytes):
        head = file[:4]
    else:
        with open(file, "rb") as f:
            head = f.read(4)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _to_float(x: np.ndarray) -> torch.Tensor:
    """uint8 as it is, other numbers as float32 in the units that `load_image` promises."""
    if 0 in x.shape:
        raise ImageError(f"is empty, shape {x.shape}")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.array(x))
    if x.dtype.kind == "b":
        return torch.from_numpy(x.astype(np.float32))
    if x.dtype.kind in "iu" and x.dtype.itemsize <= 2:
        return torch.from_numpy(x.astype(np.float32) / np.float32(np.iinfo(x.dtype).max))
    if x.dtype.kind != "f":
        # 32 and 64-bit integers rarely use their range, and dividing by it would give black pictures
        raise ImageError(
            f"holds {x.dtype}, expected uint8, int16, uint16, bool or a float type; divide by the largest value of "
            "your data and save as float32"
        )
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ImageError("contains NaN or infinite values; replace them (for example by the mean) and save again")
    return torch.from_numpy(x)


def _wrong_channels(found: str, in_chans: int) -> ImageError:
    return ImageError(
        f"has {found}, expected {in_chans} channel{'s' * (in_chans != 1)}; set --in-chans to what the pictures have, "
        "or convert them (more than 3 channels: multi-band TIFF or .npy)"
    )


def is_8_bit(image: Image.Image) -> bool:
    """Whether an image of Pillow has 8 bits or less a channel."""
    return image.mode != "F" and not image.mode.startswith("I")


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """The image, turned upright in place; if 8-bit, in the mode that has `in_chans` channels."""
    ImageOps.exif_transpose(image, in_place=True)  # a copy would cost a tenth of the decoding
    mode = image.mode
    if in_chans not in (1, 3) and (in_chans, mode) != (4, "RGBA"):
        raise _wrong_channels(f"{len(image.getbands())} channels (mode {mode})", in_chans)
    if not is_8_bit(image):
        return image
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow asks for; straight to RGB gives the same colours and a warning
    target = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    return image if image.mode == target else image.convert(target)


def from_pil(image: Image.Image, in_chans: int) -> torch.Tensor:
    image = to_mode(image, in_chans)
    if not is_8_bit(image):
        x = np.asarray(image)
        if image.mode == "I":  # 16-bit values in 32-bit words, except for TIFF, which does not come here with this mode
            if x.min() < 0 or x.max() > 65535:
                raise ImageError(f"has values {x.min()}..{x.max()}, expected 16 bits; save as 16-bit or float32")
            x = x.astype(np.uint16)
        x = _to_float(x)
        return x[None].repeat(in_chans, 1, 1)
    x = torch.from_numpy(np.array(image))
    return x[None] if in_chans == 1 else x.permute(2, 0, 1)


def _from_array(x: np.ndarray, in_chans: int) -> torch.Tensor:
    if x.ndim == 2 and in_chans == 1:
        x = x[None]
    elif x.ndim == 3 and x.shape[2] == in_chans:
        x = x.transpose(2, 0, 1)
    elif x.ndim != 3 or x.shape[0] != in_chans:
        raise _wrong_channels(f"shape {x.shape}", in_chans)
    return _to_float(x)


def _pillow_keeps_all(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow gives all bands and bits of a TIFF: it takes 16-bit RGB as 8-bit, and leaves out extra bands."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, samples, photometric = tags.get(258, (1,)), tags.get(277, 1), tags.get(262)
    if in_chans == 4:
        return image.mode == "RGBA" and max(bits) <= 8
    if in_chans not in (1, 3):
        return False
    if photometric in (3, 5, 6, 8):  # palette, CMYK, YCbCr, Lab: colours that only Pillow converts
        return True
    colours = samples - sum(extra in (1, 2) for extra in tags.get(338, ()))
    return image.mode != "I" and colours in (1, 3) and (samples == 1 or max(bits) <= 8)


def _from_tiff(file: Any, in_chans: int) -> torch.Tensor:
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF that is multi-band, 16-bit colour or otherwise beyond Pillow; run `pip install tifffile`"
        ) from error
    with tifffile.TiffFile(file) as tif:
        page, axes, x = tif.pages[0], tif.series[0].axes, tif.series[0].asarray()
        orientation = page.tags.valueof(274, 1)
    others = [axis for axis in axes if axis not in "YX"]
    channel = next((axis for axis in "SC" if axis in others), others[-1] if others else None)
    x = x[tuple(0 if axis in others and axis != channel else slice(None) for axis in axes)]
    axes = "".join(axis for axis in axes if axis in "YX" or axis == channel)
    x = x[None] if channel is None else np.moveaxis(x, axes.index(channel), 0)
    if axes.replace(channel or "", "") != "YX":
        raise ImageError(f"has axes {axes}, expected pictures with axes Y and X")
    extras = tuple(page.extrasamples or ())
    if len(x) != in_chans and extras and len(x) > len(extras):
        first = len(x) - len(extras)
        x = x[[*range(first), *(first + k for k, extra in enumerate(extras) if extra not in (1, 2))]]
    x = _to_float(_rotate(x, orientation))
    # the conversions that 8-bit pictures get
    if len(x) == 1 and in_chans == 3:
        x = x.repeat(3, 1, 1)
    elif len(x) == 3 and in_chans == 1 and page.photometric == 2:
        x = (
            x.float() / (255 if x.dtype == torch.uint8 else 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        ).sum(0, keepdim=True)
    if len(x) != in_chans:
        raise _wrong_channels(f"{len(x)} channels", in_chans)
    return x


def _rotate(x: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the TIFF / EXIF orientation 1..8 to `[C, H, W]`."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        x = x[:, ::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, :, ::-1]
    return x


def check_in_chans(in_chans: int) -> int:
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
    return in_chans


def check_index(i: int, n: int) -> int:
    if not 0 <= i < n:
        raise IndexError(f"index {i} is outside 0..{n - 1}")
    return i
