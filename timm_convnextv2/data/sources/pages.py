"""Pages of files as images: multi-page TIFF, z-stacks, frames of DICOM and GIF."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from ..formats.decode import count_pages
from ..formats.errors import ImageError, MissingPackageError
from ..formats.pixels import Pixels
from .source import FileSource, Source, locate


class PageSource(FileSource):
    """The pages of another source's files, each an image."""

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
                counts.append(count_pages(source.path(i)) if pages is None else len(pages))
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
