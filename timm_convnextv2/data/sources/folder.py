"""Image files in a folder, or by their paths."""

import os
from collections.abc import Sequence

from ..formats.decode import check_index
from ..formats.pixels import PLAIN, Pixels
from ..paths.listing import list_folder
from ..paths.lists import FileNames
from ..paths.walk import LeftOut
from .source import FileSource


class FolderSource(FileSource):
    """All images anywhere below a folder, in a fixed order; subfolder names mean nothing.

    Hidden files and folders (leading dot) are skipped, links to folders followed, each folder once. FIFOs, sockets,
    devices and broken links are never opened. The names share one buffer, with 8 bytes per image beside their text.

    Args:
        names: Files to read instead of all below the folder, relative to it (or absolute); skips the listing.
        grows: Whether a file written below `root` may be an image in the next run; by default, if it was listed.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        in_chans: int = 3,
        pixels: Pixels = PLAIN,
        names: FileNames | None = None,
        grows: bool | None = None,
    ) -> None:
        super().__init__(in_chans, pixels)
        self.root = os.fspath(root)
        self.names, self.left = list_folder(self.root) if names is None else (names, LeftOut())
        self.grows = names is None if grows is None else grows

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.row_name(i))

    def row_name(self, i: int) -> str:
        return self.names[check_index(i, len(self))]

    def folders(self) -> list[str]:
        return [self.root] if self.grows else []


class ImageFiles(FileSource):
    """Images by their paths."""

    def __init__(self, paths: Sequence[str], in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        super().__init__(in_chans, pixels)
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        return self.paths[i]
