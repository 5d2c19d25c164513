"""Files that are safe to open, and sizes that are safe to decode."""

import io
import os
import stat
from typing import BinaryIO

from PIL import Image

from .errors import ImageError

# timm's names of a split's folder
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def kind_of_file(path: str | os.PathLike) -> str:
    """'' for a regular file, or a link to one; else what it is, such as 'FIFO' or 'broken link'.

    Nothing is opened: this would hang at a FIFO, and has effects on some devices.
    """
    try:
        return _kind(os.stat(path))
    except OSError:
        if os.path.islink(path):  # to nothing, to itself, or to what must not be read
            return "broken link"
        raise


def _kind(info: os.stat_result) -> str:
    return "" if stat.S_ISREG(info.st_mode) else _KINDS.get(stat.S_IFMT(info.st_mode), "special file")


def open_image_file(file: str | os.PathLike | bytes) -> BinaryIO:
    """Opens a path, or the content of a file, to read; never waits.

    Raises:
        ImageError: (a ValueError) The path is no regular file.
        OSError: It cannot be opened.
    """
    if isinstance(file, bytes):
        return io.BytesIO(file)
    opened = None
    kind = _kind(os.stat(file))
    if not kind:
        # not to wait, should a FIFO have come in its place since
        opened = open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
        kind = _kind(os.fstat(opened.fileno()))
    if opened is None or kind:
        if opened is not None:
            opened.close()
        raise ImageError(f"is a {kind}, expected a regular file")
    return opened


def check_size(height: int, width: int, what: str = "image") -> None:
    """Refuses images that are too large, before any of their pixels is read.

    The limit is Pillow's own, twice `PIL.Image.MAX_IMAGE_PIXELS` (178,956,970 pixels), for all formats.

    Raises:
        ImageError: (a ValueError) There are more pixels.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise ImageError(
            f"has {height} x {width} pixels in one {what}, more than the limit of {2 * limit} (decompression bomb?); "
            "cut it into tiles, pretrain on windows of it (--window-size), or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
