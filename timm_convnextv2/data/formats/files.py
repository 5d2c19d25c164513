"""Image files: opened safely, with a size that is safe to decode, and described by their headers."""

import io
import os
import stat
from typing import BinaryIO, NamedTuple

from PIL import Image

from .errors import ImageError

# timm's names for the folder of a split
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


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
    opened = None
    kind = _kind(os.stat(file))
    if not kind:
        # O_NONBLOCK: a FIFO may have taken its place since `stat`
        opened = open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
        kind = _kind(os.fstat(opened.fileno()))
    if opened is None or kind:
        if opened is not None:
            opened.close()
        raise ImageError(f"is a {kind}, expected a regular file")
    return opened


def check_size(height: int, width: int, what: str = "image") -> None:
    """Refuses images of any format above Pillow's limit: twice `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970 pixels)."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise ImageError(
            f"has {height} x {width} pixels in one {what}, more than the limit of {2 * limit} (decompression bomb?); "
            "cut it into tiles, pretrain on windows of it (--window-size), or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
