"""Several sources as one."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from ..formats.pillow import Choose, Reduced
from ..formats.pixels import Pixels
from ..paths.walk import LeftOut
from .source import Source, locate


class JoinedSource(Source):
    """Folders and tar files one after the other. The name of an image includes its folder or tar file."""

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__(parts[0].in_chans, parts[0].pixels)
        self.parts, self.ends = [*parts], [*accumulate(map(len, parts))]
        self.has_files = all(part.has_files for part in parts)
        self.left = LeftOut()
        for part in parts:
            if isinstance(part.left, LeftOut):
                self.left.merge(part.left)

    def __len__(self) -> int:
        return self.ends[-1]

    def _part(self, i: int) -> tuple[Source, int]:
        """The source of image `i`, and its index there."""
        part, j, _ = locate(self.ends, i)
        return self.parts[part], j

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        part, j = self._part(i)
        return part.read(j, choose, seed)

    def name(self, i: int) -> str:
        part, j = self._part(i)
        return part.full_name(j)

    def path(self, i: int) -> str:
        part, j = self._part(i)
        return part.path(j)

    def folders(self) -> list[str]:
        return [folder for part in self.parts for folder in part.folders()]

    def reading(self, in_chans: int, pixels: Pixels) -> "JoinedSource":
        other = super().reading(in_chans, pixels)
        other.parts = [part.reading(in_chans, pixels) for part in self.parts]
        return other
