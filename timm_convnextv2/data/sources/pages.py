"""Pages of files as images of their own: multi-page TIFF, z-stacks, frames of DICOM and GIF."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..formats.decode import Choose, Reduced, decode, faults_named, printable
from ..formats.dicom import dicom_pages, is_dicom
from ..formats.errors import ImageError, MissingPackageError
from ..formats.files import open_image_file
from ..formats.pixels import Pixels
from ..formats.tiff import import_tifffile, is_tiff, page_counts
from ..formats.zarrs import is_zarr, zarr_pages


class DerivedSource(Dataset):
    """Parts of another source's images: channels, and how stored values become pixels, are that source's.

    Attributes:
        source: The other source.
    """

    source: Any

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.source.in_chans

    @in_chans.setter
    def in_chans(self, value: int) -> None:
        self.source.in_chans = value

    @property
    def pixels(self) -> Pixels:
        """How stored values become pixels."""
        return self.source.pixels

    @pixels.setter
    def pixels(self, value: Pixels) -> None:
        self.source.pixels = value


def pages_in(path: str) -> int:
    """Pages of a file by its header; all axes of a stack but Y, X, channels and samples count.

    Raises:
        ImageError: (a ValueError) It is no image that is known.
        MissingPackageError: (a ValueError) A package is not installed.
    """
    with faults_named(printable(path)):
        if is_zarr(path):
            return zarr_pages(path)
        with open_image_file(path) as file:
            if path.lower().endswith(".npy"):
                return 1
            if is_dicom(file, path):
                return dicom_pages(file)
            if is_tiff(file):
                with import_tifffile().TiffFile(file) as tif:
                    return sum(page_counts(tif))
            with Image.open(file) as image:
                return getattr(image, "n_frames", 1)


class PageSource(DerivedSource):
    """The pages of another source's files, each an image.

    Args:
        source: With `path(i)`, `name(i)`, `in_chans` and `pixels`: a `FolderSource`, or one like it.
        pages: Their numbers, from 0, the same of each file; None: all.
        tick: Called with 1 after each header that was read.

    Attributes:
        left: What the source leaves out, and how many pages there are.

    Raises:
        ValueError: The source has no files.
        MissingPackageError: (a ValueError) A package that reads the files is not installed.
    """

    def __init__(
        self, source: Any, pages: Sequence[int] | None = None, tick: Callable[[int], None] | None = None
    ) -> None:
        if not hasattr(source, "path") or not hasattr(source, "in_chans"):
            raise ValueError(
                "--pages reads pages of files, which this data set has not: give a folder with --data-dir, or leave it "
                "out."
            )
        self.source, self.pages = source, pages
        counts = []
        for i in range(len(source)):
            try:
                counts.append(pages_in(source.path(i)) if pages is None else len(pages))
            except MissingPackageError:
                raise
            except (ImageError, OSError):
                counts.append(1)  # fails where it can be counted and named
            if tick is not None:
                tick(1)
        self.ends = [*accumulate(counts)]
        self.left = f"{self.ends[-1]} pages of {len(source)} files"
        if inner := str(getattr(source, "left", None) or ""):
            self.left += f"; {inner}"

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> torch.Tensor:
        path = self.path(i)
        return decode(path, self.in_chans, printable(path), pixels=self.page_pixels(i))

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """Page `i`, `Reduced` if it is a JPEG whose size makes `choose` answer more than 1."""
        path = self.path(i)
        return decode(path, self.in_chans, printable(path), choose, self.page_pixels(i))

    def path(self, i: int) -> str:
        """Path of the file of page `i`."""
        return self.source.path(self._place(i)[0])

    def page_pixels(self, i: int) -> Pixels:
        """How stored values of page `i` become pixels, and which page of its file it is."""
        file, number, count = self._place(i)
        single = self.pages is None and count == 1
        page = None if single else number if self.pages is None else self.pages[number]
        return self.pixels._replace(page=page)

    def name(self, i: int) -> str:
        """Path of the file, and which of its pages."""
        page = self.page_pixels(i).page
        return self.source.name(self._place(i)[0]) + ("" if page is None else f", page {page}")

    def _place(self, i: int) -> tuple[int, int, int]:
        """File, number among its pages, and how many these are."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        file = bisect_right(self.ends, i)
        first = self.ends[file - 1] if file else 0
        return file, i - first, self.ends[file] - first
