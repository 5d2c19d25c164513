"""Image files: opened safely, with a size that is safe to decode; the base class of readers."""

import bz2
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image

from .errors import ImageError

# timm's names for the folder of a split
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")

_PIECE = 2**20  # bytes
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
_KINDS |= {stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


class Header(NamedTuple):
    """An image file's description of itself."""

    format: str  # such as 'PNG', 'TIFF', 'npy'
    height: int  # in pixels, as stored: before a rotation by EXIF
    width: int  # as stored
    channels: int  # channels that `load_image` can give without conversion: without alpha; palettes count as three
    kind: str  # type of the stored values, such as 'uint16'


def printable(path: str | os.PathLike) -> str:
    """A path for messages; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def kind_of_file(path: str | os.PathLike) -> str:
    """'' for a regular file, or a link to one; else its kind, such as 'FIFO' or 'broken link'.

    Opens nothing: opening would block on a FIFO and has side effects on some devices.
    """
    try:
        return _kind(os.stat(path))
    except OSError:
        if os.path.islink(path):  # to nothing, to itself, or without permission
            return "broken link"
        raise


def _kind(info: os.stat_result) -> str:
    return "" if stat.S_ISREG(info.st_mode) else _KINDS.get(stat.S_IFMT(info.st_mode), "special file")


def open_image_file(file: str | os.PathLike | bytes) -> BinaryIO:
    """Opens a path, or the content of a file, for reading; never blocks."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if not (kind := _kind(os.stat(file))):
        # O_NONBLOCK: a FIFO may have taken its place since `stat`
        opened = open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
        if not (kind := _kind(os.fstat(opened.fileno()))):
            return opened
        opened.close()
    raise ImageError(f"is a {kind}, expected a regular file")


def check_size(height: int, width: int, what: str = "image") -> None:
    """Refuses images of any format above Pillow's limit: twice `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970 pixels)."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise ImageError(
            f"has {height} x {width} pixels in one {what}, more than the limit of {2 * limit} (decompression bomb?); "
            "cut it into tiles, pretrain on windows of it (--window-size), or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


def check_inflated(file: BinaryIO, codec: str, itemsize: int) -> None:
    """Refuses compressed data that inflate to more than the pixels of `check_size`; inflates no more than these.

    `codec` is 'deflate', 'zlib', 'gzip', 'bz2', 'lzma', or one whose header states the size: 'blosc', 'lz4', 'zstd'.
    """
    most, size = 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize) * itemsize, 0
    if codec in ("deflate", "zlib", "gzip"):
        inflater, data = zlib.decompressobj(-15 if codec == "deflate" else 47), file.read()
        # deflate's largest ratio: smaller data need no look
        while len(data) * 1032 > most - size and size <= most:
            size += len(inflater.decompress(data, _PIECE))
            data = inflater.unconsumed_tail
    elif codec in ("bz2", "lzma"):
        with (bz2 if codec == "bz2" else lzma).open(file) as inflated:
            while size <= most and (piece := inflated.read(_PIECE)):
                size += len(piece)
    elif codec in ("blosc", "lz4"):
        size = int.from_bytes(file.read(8)[4 if codec == "blosc" else 0 :][:4], "little")
    elif codec == "zstd":
        head = file.read(18).ljust(18, b"\0")
        single, length = head[4] >> 5 & 1, head[4] >> 6
        begin = 6 - single + (0, 1, 2, 4)[head[4] & 3]
        size = int.from_bytes(head[begin : begin + (single, 2, 4, 8)[length]], "little")
    if size > most:
        raise ImageError(
            f"inflates to more than {most} bytes in one piece, the limit of its type (decompression bomb?); raise "
            "PIL.Image.MAX_IMAGE_PIXELS if it is sound"
        )


class Scene:
    """An image of which parts are read. Subclasses set `size` and `file`, and define `read`.

    Attributes:
        size: Height and width in pixels, upright.
        whole: Whether each part costs decoding the whole image.
    """

    whole = False
    size: tuple[int, int]
    file: BinaryIO

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        """A part as `[C, height, width]`, as `load_image` decodes it; nodata gets the mean of this part.

        It is not standardised yet: if the record of pixels says so, nodata is NaN.

        Raises:
            EmptyError: (an ImageError) The part is nodata everywhere.
        """
        raise NotImplementedError

    def load(self) -> torch.Tensor:
        """The whole image, if it has no more pixels than `check_size` allows."""
        check_size(*self.size)
        return self.read(0, 0, *self.size)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class WholeScene(Scene):
    """An image that `load(file, in_chans, pixels)` decodes whole for each part."""

    whole = True

    def __init__(self, file: BinaryIO, size: tuple[int, int], load: Callable[[BinaryIO], Any]) -> None:
        check_size(*size)
        self.file, self.size, self._load = file, size, load

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        self.file.seek(0)
        return self._load(self.file)[:, top : top + height, left : left + width].clone()
