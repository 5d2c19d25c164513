"""Where the pictures come from: folders, and the data sets that timm opens."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..formats.decode import (
    Choose,
    Reduced,
    check_in_chans,
    check_index,
    decode,
    load_image,
    printable,
)
from ..formats.pixels import PLAIN, Pixels
from ..paths.lists import FileNames
from ..paths.places import list_folder
from ..paths.walk import LeftOut
from .groups import Groups


class FolderSource(Dataset):
    """All pictures anywhere below a folder, in a fixed order; folder names mean nothing.

    Hidden files and folders (leading dot) are skipped. Links to folders are followed, each folder once. What is no
    regular file (FIFOs, sockets, devices, broken links) is never opened. The names live in one block of bytes: about 8
    bytes each more than their length below `root`.

    Args:
        root: The folder.
        in_chans: Channels that pictures are converted to, see `load_image`.
        pixels: How stored values become pixels, see `Pixels`.
        names: Files to read instead of all below the folder, relative to it (or absolute); nothing is listed then.

    Attributes:
        left: What is there besides the pictures.
        groups: How images are sampled, see `weights.Groups`; None: each once an epoch.
        grows: Whether a file that is written below `root` may be an image of it the next time.

    Raises:
        ValueError: The folder is missing, is no folder, cannot be listed, or has no picture below it.
    """

    groups: Groups | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        in_chans: int = 3,
        pixels: Pixels = PLAIN,
        names: FileNames | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.in_chans, self.pixels = check_in_chans(in_chans), pixels
        self.names, self.left = list_folder(self.root) if names is None else (names, LeftOut())
        self.grows = names is None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> torch.Tensor:
        return load_image(self.path(i), self.in_chans, self.pixels)

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """Picture `i`, `Reduced` if it is a JPEG whose size makes `choose` answer more than 1."""
        path = self.path(i)
        return decode(path, self.in_chans, printable(path), choose, self.pixels)

    def path(self, i: int) -> str:
        """Path of picture `i`, as the file system knows it."""
        return os.path.join(self.root, self.short_name(i))

    def short_name(self, i: int) -> str:
        """Path of picture `i` below the folder, as the file system knows it."""
        return self.names[check_index(i, len(self))]

    def name(self, i: int) -> str:
        """Path of picture `i`, safe to print."""
        return printable(self.path(i))


def left_out(source: Any) -> str:
    """What a folder or tar holds besides the pictures, in one line, see `listing.LeftOut`; '' for other sources."""
    return str(getattr(source, "left", None) or "")


class ImageFiles(Dataset):
    """Images by their paths, decoded as in pretraining.

    Args:
        paths: Of the files.
        in_chans: Channels, see `timm_convnextv2.data.load_image`.
        pixels: How stored values become pixels, see `Pixels`.
    """

    def __init__(self, paths: Sequence[str], in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        self.paths, self.in_chans, self.pixels = list(paths), in_chans, pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return load_image(self.paths[i], self.in_chans, self.pixels)

    def path(self, i: int) -> str:
        """Path of image `i`."""
        return self.paths[i]

    def name(self, i: int) -> str:
        """Path of image `i`, safe to print."""
        return printable(self.paths[i])
