"""Reads DICOM on a scale that does not depend on the file."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from ...console import count
from .errors import ImageError, MissingPackageError, refuse_page, wrong_channels
from .files import Header, check_inflated, check_size
from .pillow import from_pil
from .pixels import Pixels
from .values import note_stored, scaled

DICOM_EXTENSIONS = (".dcm", ".dicom")


def is_dicom(file: BinaryIO, name: str) -> bool:
    """Whether a file has DICOM's mark or extension."""
    head = file.read(132)
    file.seek(0)
    return head[128:] == b"DICM" or name.lower().endswith(DICOM_EXTENSIONS)


def _read(file: BinaryIO, header: bool = True) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise MissingPackageError("is DICOM; run `pip install pydicom`") from error
    head = file.read(1024)
    if b"1.2.840.10008.1.2.1.99" in head:  # deflated, after the file's meta information
        file.seek(144 + int.from_bytes(head[140:144], "little"))
        check_inflated(file, "deflate", 2)
    file.seek(0)
    found = pydicom.dcmread(file, force=True, stop_before_pixels=header)
    if "Rows" not in found or "Columns" not in found or not header and "PixelData" not in found:
        raise ImageError(f"is DICOM without an image ({found.get('Modality') or 'modality not stated'})")
    check_size(found.Rows, found.Columns)
    return found


def _frames(found: Any) -> int:
    return int(found.get("NumberOfFrames") or 1)


def _coloured(found: Any) -> bool:
    return found.get("SamplesPerPixel", 1) > 1 or found.get("PhotometricInterpretation") == "PALETTE COLOR"


def dicom_size(file: BinaryIO) -> tuple[int, int]:
    """Height and width."""
    found = _read(file)
    return int(found.Rows), int(found.Columns)


def dicom_header(file: BinaryIO, page: int | str | None) -> Header:
    """See `decode.read_header`."""
    found = _read(file)
    channels = 3 if _coloured(found) else _frames(found) if page == "channels" else 1
    allocated = found.get("BitsAllocated", 16)
    kind = f"{'int' if found.get('PixelRepresentation') else 'uint'}{allocated}"
    kind += f" ({found.BitsStored} bits)" if found.get("BitsStored", allocated) != allocated else ""
    return Header("DICOM", int(found.Rows), int(found.Columns), channels, kind)


def dicom_pages(file: BinaryIO) -> int:
    """Number of frames."""
    return _frames(_read(file))


def load_dicom(file: BinaryIO, in_chans: int, pixels: Pixels) -> torch.Tensor:
    """The image `[C, H, W]` of a DICOM file.

    Grey values are rescaled by the slope and intercept of their frame, and MONOCHROME1 is inverted. Without
    `dicom_window`, values that the file does not rescale are divided by the largest one that their bits hold (12 bits:
    4095), and rescaled ones, such as Hounsfield units, stay as they are: their scale is the same in all files. A window
    gives 0 to 1. Pixel padding is nodata. Colours are 8-bit RGB.
    """
    found = _read(file, header=False)
    total = _frames(found)
    if total > 1 and pixels.page is None:
        raise ImageError(
            f"has {total} frames; read them with --pages: all (each is an image), channels, first or a number"
        )
    stack = pixels.page == "channels" and total > 1
    if not stack:
        refuse_page(pixels.page, total)
    frames = range(total) if stack else [int(pixels.page or 0) if total > 1 else 0]
    index = None if stack else frames[0]
    if _coloured(found):
        return from_pil(_colours(found, _stored(found, index)), in_chans, pixels)
    if found.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(f"has the photometric interpretation {found.PhotometricInterpretation}, expected grey or RGB")
    if len(frames) not in (1, in_chans) or len(frames) == 1 and in_chans not in (1, 3):
        raise wrong_channels(count(len(frames), "channel"), in_chans, len(frames))
    x = _stored(found, index)
    return pixels.clip(_grey(found, x.reshape(-1, *x.shape[-2:]), frames, pixels).expand(in_chans, -1, -1).contiguous())


def _stored(found: Any, index: int | None) -> np.ndarray:
    """Stored values of one frame, or of all."""
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(found, index=index)
    except Exception as error:  # decoders raise nearly anything
        text = str(error)
        if isinstance(error, ImportError) or "missing dependencies" in text or "missing required dep" in text:
            kind = getattr(getattr(found, "file_meta", None), "TransferSyntaxUID", None)
            raise MissingPackageError(
                f"DICOM with compression {getattr(kind, 'name', kind)}; run `pip install pylibjpeg pylibjpeg-openjpeg "
                "pylibjpeg-libjpeg` (the last is GPL), or decompress the files with dcmdjpeg or gdcmconv"
            ) from error
        raise


def _colours(found: Any, x: np.ndarray) -> Image.Image:
    """Colours as 8-bit RGB."""
    if found.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        x = apply_color_lut(x, found)
    if x.dtype == np.uint16:
        x = (x >> 8).astype(np.uint8)  # palettes have 16 bits, of which the upper 8 count
    if x.dtype != np.uint8 or x.ndim != 3:
        raise ImageError(f"has colours of {x.dtype} with shape {x.shape}, expected 8 bits")
    return Image.fromarray(x)


def _of_frame(found: Any, frame: int, sequence: str, *names: str) -> list[Any]:
    """Values of a frame: from its functional group, else from the group that all frames share, else from the file."""
    for kind, i in (("PerFrame", frame), ("Shared", 0)):
        groups = found.get(f"{kind}FunctionalGroupsSequence") or ()
        if i < len(groups) and (inner := groups[i].get(sequence)):
            return [inner[0].get(name) for name in names]
    return [found.get(name) for name in names]


def _rescaling(found: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept."""
    slope, intercept = _of_frame(found, frame, "PixelValueTransformationSequence", "RescaleSlope", "RescaleIntercept")
    return 1.0 if slope is None else float(slope), float(intercept or 0)


def _grey(found: Any, x: np.ndarray, frames: Sequence[int], pixels: Pixels) -> torch.Tensor:
    """Stored values `[C, H, W]` of these frames on their scale, as float32."""
    if "ModalityLUTSequence" in found:
        raise ImageError("has a modality LUT, a table instead of slope and intercept; convert it")
    bits, signed = int(found.BitsStored), bool(found.PixelRepresentation)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    # of the whole file, so that all its frames are on one scale
    rescales = any(_rescaling(found, frame) != (1, 0) for frame in range(_frames(found)))
    padding = found.get("PixelPaddingValue")
    if padding is not None:
        # some files write these with the other sign than the pixels: 63536 for -2000
        ends = np.array([padding, found.get("PixelPaddingRangeLimit", padding)], np.int64).astype(x.dtype)
        padding = int(ends[0])
        x = np.where((x >= ends.min()) & (x <= ends.max()), ends[0], x)
    # notes a type and unit, which `note_stored` below corrects
    values = scaled(x, pixels._replace(divide=1.0), padding).numpy().astype(np.float64)
    inverted = found.PhotometricInterpretation == "MONOCHROME1"
    unit, largest = (1.0, None) if rescales or pixels.dicom_window else (float(high), high)
    unit = pixels.divide or unit
    for i, frame in enumerate(frames):
        slope, intercept = _rescaling(found, frame)
        values[i] = values[i] * slope + intercept
        if pixels.dicom_window is not None:
            values[i] = _windowed(values[i], found, frame, pixels.dicom_window)
            values[i] = 1 - values[i] if inverted else values[i]
        elif inverted:
            values[i] = (low + high) * slope + 2 * intercept - values[i]
    # a window, or a divisor, puts files with other bits on one scale
    kind = "DICOM (rescaled)" if rescales else "DICOM" if pixels.divide else f"DICOM ({bits} bits)"
    kind = "DICOM (window)" if pixels.dicom_window else kind
    note_stored(kind, unit, largest)
    return torch.from_numpy((values / unit).astype(np.float32))


def _windowed(x: np.ndarray, found: Any, frame: int, window: str | tuple[float, float]) -> np.ndarray:
    """Values in 0..1 by the formulas of the standard, PS3.3 C.11.2.1."""
    function = "LINEAR"
    if isinstance(window, str):
        names = "WindowCenter", "WindowWidth", "VOILUTFunction"
        *stored, function = _of_frame(found, frame, "FrameVOILUTSequence", *names)
        if None in stored:
            raise ImageError("names no window (centre and width); give one with --dicom-window CENTRE WIDTH")
        # the first of several views
        centre, width = (float(v if isinstance(v, int | float | str) else v[0]) for v in stored)
        function = str(function or "LINEAR").upper()
    else:
        centre, width = window
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - centre) / width))
    if function == "LINEAR_EXACT":
        return ((x - centre) / width + 0.5).clip(0, 1)
    if width <= 1:
        return (x > centre - 0.5).astype(x.dtype)
    return ((x - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
