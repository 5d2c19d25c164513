"""Reads parts of images: of TIFF, `.npy` and OME-Zarr without decoding the rest, of other formats whole."""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin

from ..formats.arrays import read_npy_layout, scaled
from ..formats.axes import Layout, Page
from ..formats.decode import convert_image, decode, faults_named, is_8_bit, printable, tagged_nodata
from ..formats.dicom import dicom_size, is_dicom
from ..formats.errors import ImageError
from ..formats.files import check_size, open_image_file
from ..formats.nodata import Nodata, parse_tag
from ..formats.pixels import Pixels
from ..formats.tiff import (
    NODATA_TAG,
    can_read_part,
    choose_series,
    codec_missing,
    import_tifffile,
    is_tiff,
    needs_pillow,
    pillow_keeps_all,
    read_box,
    read_part,
    rotate,
    to_channels,
)
from ..formats.zarrs import is_zarr, open_zarr

_YCBCR = 6  # photometric interpretation


class Scene(Protocol):
    """An opened image, to read parts of.

    Attributes:
        size: Height and width in pixels, upright.
        whole: Whether reading a part decodes the whole image.
    """

    size: tuple[int, int]
    whole: bool

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        """Reads a part, `[C, height, width]`, equal to the same part of `load_image`.

        Except nodata: it gets the mean of the other pixels of the part, not of the whole image.

        Raises:
            EmptyError: (an ImageError) The part is nodata everywhere.
            ImageError: (a ValueError) It cannot be decoded, or has values that can only be nodata.
        """
        ...

    def close(self) -> None:
        """Closes its file."""
        ...


class _Whole:
    """An image that must be decoded whole."""

    whole = True

    def __init__(self, path: str, in_chans: int, pixels: Pixels, size: tuple[int, int]) -> None:
        check_size(*size)
        self.path, self.in_chans, self.pixels, self.size = path, in_chans, pixels, size

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        image = decode(self.path, self.in_chans, printable(self.path), pixels=self.pixels)
        return image[:, top : top + height, left : left + width].clone()

    def close(self) -> None:
        pass


class _Npy:
    """A `.npy` file."""

    whole = False

    def __init__(self, file: Any, in_chans: int, pixels: Pixels) -> None:
        self.file, self.in_chans, self.pixels = file, in_chans, pixels
        self.layout = read_npy_layout(file, in_chans, Nodata.of(pixels))
        self.size = self.layout.size

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        layout, part = self.layout, (slice(top, top + height), slice(left, left + width))
        single = len(layout.shape) == 2
        box = part if single else (*part, slice(None)) if layout.channels_last else (slice(None), *part)
        shape = layout.shape[::-1] if layout.fortran else layout.shape
        x = read_box(self.file, layout.dtype, layout.offset, shape, box[::-1] if layout.fortran else box)
        x = x.transpose() if layout.fortran else x
        x = x[None] if single else x.transpose(2, 0, 1) if layout.channels_last else x
        return self.pixels.clip(scaled(x, Nodata.of(self.pixels)))

    def close(self) -> None:
        self.file.close()


class _Zarr:
    """An image in a Zarr folder."""

    whole = False

    def __init__(self, path: str, in_chans: int, pixels: Pixels) -> None:
        self.image, self.pixels = open_zarr(path, in_chans, pixels.page), pixels
        self.size = self.image.size

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        part = slice(top, top + height), slice(left, left + width)
        return self.pixels.clip(self.image.read(Nodata.of(self.pixels), *part))

    def close(self) -> None:
        pass


class _Tiff:
    """A TIFF, read by tifffile; if `load_image` uses Pillow's conversion, each part goes through it."""

    whole = False

    def __init__(self, file: Any, in_chans: int, pixels: Pixels) -> None:
        self.file, self.in_chans, self.pixels, self.convert = file, in_chans, pixels, None
        tifffile = import_tifffile()
        try:
            image: Any = TiffImagePlugin.TiffImageFile(file)  # not Image.open, which refuses large ones
            by_pillow = pixels.page is None and pillow_keeps_all(image, in_chans)
        except Exception:  # a layout unknown to Pillow
            image, by_pillow = None, False
        file.seek(0)
        self.tif = tifffile.TiffFile(file)
        if by_pillow:
            self.series = tifffile.TiffPageSeries([self.tif.pages[0]])
            self.layout = Layout(self.series.axes, self.series.shape, self.series.axes, {})
        else:
            number, self.layout = choose_series(self.tif, in_chans, pixels.page)
            self.series = self.tif.series[number]
        self.page = self.series.keyframe
        self.orientation = self.page.tags.valueof(274, 1)
        self.partial = can_read_part(self.series)
        if by_pillow and is_8_bit(image) or needs_pillow(self.page, self.layout, in_chans):
            self.convert = None if image is None else self._converter(image, pixels.page)
            self.partial = self.partial and self.convert is not None
        self.nodata = parse_tag(Nodata.of(pixels), self.page.tags.valueof(NODATA_TAG))
        height, width = self.page.imagelength, self.page.imagewidth
        self.size = (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)

    def _converter(self, image: Any, page: Page) -> Callable[[np.ndarray], torch.Tensor] | None:
        """Converts stored values `[C, h, w]` to the requested channels; None if Pillow cannot take them as stored."""
        if isinstance(page, int):
            image.seek(page)
        rawmode = image.tile[0][3][0]
        planar = len(rawmode) == 1 and len(image.getbands()) > 1
        if self.page._dtype != np.uint8 or self.page.bitspersample != 8 or planar and image.mode != "RGB":
            return None
        if self.page.photometric == _YCBCR and rawmode != "RGB":
            return None
        nodata = tagged_nodata(image, Nodata.of(self.pixels))
        mode, rawmode = image.mode, image.mode if planar else rawmode
        palette = image.palette.getdata() if mode == "P" else None

        def convert(x: np.ndarray) -> torch.Tensor:
            x = np.ascontiguousarray(rotate(x, self.orientation).transpose(1, 2, 0))
            piece = Image.frombytes(mode, (x.shape[1], x.shape[0]), x.tobytes(), "raw", rawmode)
            if palette is not None:
                piece.putpalette(palette[1], palette[0])
            return convert_image(piece, self.in_chans, nodata)

        return convert

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        rows, columns = self._stored(top, left, height, width)
        try:
            x = read_part(self.file, self.tif, self.series, self.layout, rows, columns)
        except ImageError:
            raise
        except Exception as error:
            raise codec_missing(self.page, error) or error from None
        x = self.convert(x) if self.convert else to_channels(x, self.page, self.in_chans, self.nodata)
        return self.pixels.clip(x)

    def _stored(self, top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
        """Stored rows and columns of a part of the upright image."""
        turned, upright = self.orientation in (5, 6, 7, 8), self.size
        down, across = (top, top + height), (left, left + width)
        if self.orientation in (3, 4, 7, 8):
            down = upright[0] - down[1], upright[0] - down[0]
        if self.orientation in (2, 3, 6, 7):
            across = upright[1] - across[1], upright[1] - across[0]
        rows, columns = (across, down) if turned else (down, across)
        return slice(*rows), slice(*columns)

    def close(self) -> None:
        self.tif.close()
        self.file.close()


def open_scene(path: str, in_chans: int, pixels: Pixels) -> Scene:
    """Opens an image to read parts of it, and checks its header.

    Args:
        path: Path of the file, or of the folder of a Zarr image.
        in_chans: Channels wanted.
        pixels: How stored values become pixels.

    Raises:
        ImageError: (a ValueError) As `load_image`, except for the size of images that are read in parts.
        MissingPackageError: (a ValueError) A package is not installed.
    """
    with faults_named(printable(path)):
        if is_zarr(path):
            return _Zarr(path, in_chans, pixels)
        file = open_image_file(path)
        try:
            if path.lower().endswith(".npy"):
                return _Npy(file, in_chans, pixels)
            if is_dicom(file, path):
                size = dicom_size(file)
            elif is_tiff(file):
                scene = _Tiff(file, in_chans, pixels)
                if scene.partial:
                    return scene
                size = scene.size
            else:
                size = _size_by_pillow(file)
            file.close()
            return _Whole(path, in_chans, pixels, size)
        except BaseException:
            file.close()
            raise


def _size_by_pillow(file: Any) -> tuple[int, int]:
    with Image.open(file) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


class Scenes:
    """Keeps the last few images of this process open, because opening a large TIFF reads thousands of offsets.

    Args:
        most: Largest number of open images.
    """

    def __init__(self, most: int = 16) -> None:
        self.most, self._process = most, os.getpid()
        self._open: OrderedDict[tuple, Scene] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "_process": 0, "_open": OrderedDict()}

    def get(self, path: str, in_chans: int, pixels: Pixels) -> Scene:
        """Opens the image if it is not open yet; see `open_scene`."""
        if self._process != os.getpid():  # a forked worker must not share file positions with its parent
            self._open, self._process = OrderedDict(), os.getpid()
        key = path, in_chans, pixels
        if key not in self._open:
            self._open[key] = open_scene(path, in_chans, pixels)
        self._open.move_to_end(key)
        scene = self._open[key]
        while len(self._open) > self.most:
            self._open.popitem(last=False)[1].close()
        return scene
