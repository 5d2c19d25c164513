"""Splits a source into images to train on and images that are held out."""

import torch

from ..formats.pillow import Choose, Reduced
from ..formats.pixels import Pixels
from .groups import Groups
from .source import Source
from .windows import WindowSource

MOST_HELD_OUT = 2048


class Subset(Source):
    """The images of a source with these sorted indices, or (`inverted`) all others."""

    def __init__(
        self, source: Source, indices: torch.Tensor, inverted: bool = False, groups: Groups | None = None
    ) -> None:
        super().__init__(source.in_chans, source.pixels)
        self.source, self.groups, self.inverted = source, groups, inverted
        self.size = len(source) - len(indices) if inverted else len(indices)
        # of each index, how many images that remain precede it: millions of remaining indices are never stored
        self.indices = indices - torch.arange(len(indices)) if inverted else indices

    def __len__(self) -> int:
        return self.size

    def index(self, i: int) -> int:
        """Index of image `i` in the whole source."""
        return i + int(torch.searchsorted(self.indices, i, right=True)) if self.inverted else int(self.indices[i])

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        return self.source.read(self.index(i), choose, seed)

    def name(self, i: int) -> str:
        return self.source.name(self.index(i))

    def reading(self, in_chans: int, pixels: Pixels) -> "Subset":
        other = super().reading(in_chans, pixels)
        other.source = self.source.reading(in_chans, pixels)
        return other


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source | None]:
    """Splits a source at random. Of windows, whole images are held out, because windows overlap.

    Args:
        source: The source.
        fraction: Fraction of the images to hold out, in [0, 0.5]; at least one image, at most 2048.
        seed: Seed of the choice.

    Returns:
        The images to train on, in the groups of `source`, and those held out; `source` and None for a fraction of 0.
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
