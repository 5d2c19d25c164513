"""Pages of files as images: multi-page TIFF, z-stacks, frames of DICOM and GIF."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from PIL import Image

from ..formats.decode import faults_named, printable
from ..formats.dicom import dicom_pages, is_dicom
from ..formats.errors import ImageError, MissingPackageError
from ..formats.files import open_image_file
from ..formats.pixels import Pixels
from ..formats.tiff import import_tifffile, is_tiff, page_counts
from ..formats.zarrs import is_zarr, zarr_pages
from .source import FileSource, Source, locate


def pages_in(path: str) -> int:
    """Number of pages of a file by its header; axes other than Y, X, channels and samples multiply."""
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


class PageSource(FileSource):
    """The pages of another source's files, each an image.

    Args:
        source: With files, else a ValueError.
        pages: Numbers of the pages of each file, from 0; None: all.
        tick: Called with 1 after each header is read.
    """

    def __init__(
        self, source: Source, pages: Sequence[int] | None = None, tick: Callable[[int], None] | None = None
    ) -> None:
        if not source.has_files:
            raise ValueError("--pages needs image files; this data set has none. Give a folder, or leave it out.")
        super().__init__(source.in_chans, source.pixels)
        self.source, self.pages = source, pages
        counts = []
        for i in range(len(source)):
            try:
                counts.append(pages_in(source.path(i)) if pages is None else len(pages))
            except MissingPackageError:
                raise
            except (ImageError, OSError):
                counts.append(1)  # fails again when it is read, where errors are counted and named
            if tick is not None:
                tick(1)
        self.ends = [*accumulate(counts)]
        self.left = "; ".join(filter(None, [f"{len(self)} pages of {len(source)} files", str(source.left)]))

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
