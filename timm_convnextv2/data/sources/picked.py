"""Images picked from other sources: several sources as one, and those to train on or to hold out."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch

from ..formats.pillow import Choose, Reduced
from ..formats.pixels import Pixels
from ..paths.walk import LeftOut
from .groups import Groups
from .source import Source, locate
from .windows import WindowSource

MOST_HELD_OUT = 2048


class PickedSource(Source):
    """Images of other sources. Subclasses define `__len__` and `at`."""

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__(parts[0].in_chans, parts[0].pixels)
        self.parts, self.has_files = [*parts], all(part.has_files for part in parts)

    def at(self, i: int) -> tuple[Source, int]:
        """The source of image `i`, and its index there."""
        raise NotImplementedError

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        part, j = self.at(i)
        return part.read(j, choose, seed)

    def name(self, i: int) -> str:
        part, j = self.at(i)
        return part.name(j)

    def path(self, i: int) -> str:
        part, j = self.at(i)
        return part.path(j)

    def reading(self: "P", in_chans: int, pixels: Pixels) -> "P":
        other = super().reading(in_chans, pixels)
        other.parts = [part.reading(in_chans, pixels) for part in self.parts]
        return other


P = TypeVar("P", bound=PickedSource)


class JoinedSource(PickedSource):
    """Folders and tar files one after the other. The name of an image includes its folder or tar file."""

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__(parts)
        self.ends, self.left = [*accumulate(map(len, parts))], LeftOut()
        for part in parts:
            if isinstance(part.left, LeftOut):
                self.left.merge(part.left)

    def __len__(self) -> int:
        return self.ends[-1]

    def at(self, i: int) -> tuple[Source, int]:
        part, j, _ = locate(self.ends, i)
        return self.parts[part], j

    def name(self, i: int) -> str:
        part, j = self.at(i)
        return part.full_name(j)

    def folders(self) -> list[str]:
        return [folder for part in self.parts for folder in part.folders()]


class Subset(PickedSource):
    """The images of a source with these sorted indices, or (`inverted`) all others."""

    def __init__(
        self, source: Source, indices: torch.Tensor, inverted: bool = False, groups: Groups | None = None
    ) -> None:
        super().__init__([source])
        self.groups, self.inverted = groups, inverted
        self.size = len(source) - len(indices) if inverted else len(indices)
        # of each index, how many images that remain precede it: millions of remaining indices are never stored
        self.indices = indices - torch.arange(len(indices)) if inverted else indices

    def __len__(self) -> int:
        return self.size

    def at(self, i: int) -> tuple[Source, int]:
        i = i + int(torch.searchsorted(self.indices, i, right=True)) if self.inverted else int(self.indices[i])
        return self.parts[0], i


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source | None]:
    """Splits a source at random. Of windows, whole images are held out, because windows overlap.

    `fraction` is in [0, 0.5]: at least one image and at most 2048 are held out; 0 gives `source` and None. The images
    to train on keep the groups of `source`.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"--holdout is a fraction of the images between 0 and 0.5, got {fraction:g}.")
    if fraction == 0:
        return source, None
    if isinstance(source, WindowSource):
        return source.hold_out(fraction, seed)
    total = len(source)
    count = max(1, min(MOST_HELD_OUT, round(fraction * total)))
    if count >= total:
        raise ValueError(f"--holdout {fraction:g} leaves nothing to train on: the data set has {total} image.")
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    while len(chosen) < count:  # a permutation of all would take gigabytes for the largest sets
        chosen.update(torch.randint(total, (count - len(chosen),), generator=generator).tolist())
    indices = torch.tensor(sorted(chosen))
    groups = source.groups and source.groups.without(indices.numpy())
    return Subset(source, indices, True, groups), Subset(source, indices)
