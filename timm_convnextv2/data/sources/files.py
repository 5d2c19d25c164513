"""Images that are files: by their paths, in a folder, and the pages of files."""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from ...console import count
from ..formats.decode import check_index, count_pages, decode
from ..formats.files import printable
from ..formats.pillow import Choose, Reduced
from ..formats.pixels import PLAIN, Pixels
from ..paths.listing import list_folder
from ..paths.lists import FileNames
from ..paths.walk import LeftOut
from .source import Source, locate, of_each_file


class ImageFiles(Source):
    """Images that are files, by their paths; subclasses define `__len__` and `path` in another way."""

    has_files = True

    def __init__(self, paths: Sequence[str], in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        super().__init__(in_chans, pixels)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        path = self.path(i)
        return decode(path, self.in_chans, printable(path), choose, self.pixels_of(i))

    def name(self, i: int) -> str:
        return printable(self.path(i))


class FolderSource(ImageFiles):
    """All images anywhere below a folder, in a fixed order; subfolder names mean nothing.

    Hidden files and folders (leading dot) are skipped, links to folders followed, each folder once. FIFOs, sockets,
    devices and broken links are never opened. `names`, relative to the folder (or absolute), replace the listing.
    `grows` tells whether a file written below `root` may be an image in the next run.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        in_chans: int = 3,
        pixels: Pixels = PLAIN,
        names: FileNames | None = None,
        grows: bool = True,
    ) -> None:
        super().__init__((), in_chans, pixels)
        self.root, self.grows = os.fspath(root), grows
        self.names, self.left = list_folder(self.root) if names is None else (names, LeftOut())

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.row_name(i))

    def row_name(self, i: int) -> str:
        return self.names[check_index(i, len(self))]

    def folders(self) -> list[str]:
        return [self.root] if self.grows else []


class PageSource(ImageFiles):
    """The pages of another source's files, each an image."""

    def __init__(
        self, source: Source, pages: Sequence[int] | None = None, tick: Callable[[int], None] | None = None
    ) -> None:
        if not source.has_files:
            raise ValueError("--pages needs image files; this data set has none. Give a folder, or leave it out.")
        super().__init__((), source.in_chans, source.pixels)
        self.source, self.pages = source, pages
        counts = of_each_file(
            source, lambda i: count_pages(source.path(i)) if pages is None else len(pages), default=1, tick=tick
        )
        self.ends = [*accumulate(counts)]
        self.left = "; ".join(
            filter(None, [f"{count(len(self), 'page')} of {count(len(source), 'file')}", str(source.left)])
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def path(self, i: int) -> str:
        return self.source.path(locate(self.ends, i)[0])

    def pixels_of(self, i: int) -> Pixels:
        _, number, count = locate(self.ends, i)
        if self.pages is None:
            return self.pixels._replace(page=number if count > 1 else None)
        return self.pixels._replace(page=self.pages[number])

    def name(self, i: int) -> str:
        page = self.pixels_of(i).page
        return self.source.name(locate(self.ends, i)[0]) + ("" if page is None else f", page {page}")
