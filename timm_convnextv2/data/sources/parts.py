"""Images that are held out of training: a source as two sources."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from .groups import Groups
from .windows import WindowSource

MOST_HELD_OUT = 2048


class Part(Dataset):
    """Some of a map-style source's images; as a source, it is read like the whole.

    Args:
        source: With `name(i)`, perhaps with `load_reduced`.
        size: Number of images.
        locate: The index in `source` of the part's image `i`.
        groups: How its images are sampled, see `weights.Groups`; None: each once an epoch.
    """

    def __init__(self, source: Any, size: int, locate: Callable[[int], int], groups: Groups | None = None) -> None:
        self.source, self.size, self.locate, self.groups = source, size, locate, groups
        if hasattr(source, "load_reduced"):
            self.load_reduced = self._load_reduced

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return self.source[self.locate(i)]

    def _load_reduced(self, i: int, choose: Any) -> Any:
        return self.source.load_reduced(self.locate(i), choose)

    def name(self, i: int) -> str:
        """Name of image `i`."""
        return self.source.name(self.locate(i))


class _Only:
    """The index of the i-th of these."""

    def __init__(self, indices: torch.Tensor) -> None:
        self.indices = indices

    def __call__(self, i: int) -> int:
        return int(self.indices[i])


class _Without:
    """The index of the i-th of the others, by a search: a list of millions of them is never made."""

    def __init__(self, indices: torch.Tensor) -> None:
        self.before = indices - torch.arange(len(indices))  # others before each of these

    def __call__(self, i: int) -> int:
        return i + int(torch.searchsorted(self.before, i, right=True))


def hold_out(source: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Splits a map-style source by chance: images to train on, and images that are never trained on.

    Of windows, whole images are held out: windows overlap.

    Args:
        source: The source.
        share: Of its images to hold out, in [0, 0.5]; at least one, at most 2048 of them.
        seed: Of the choice.

    Returns:
        The images to train on, in the groups of `source`, and those held out; `source` itself and None for a share of
        0.

    Raises:
        ValueError: The share is out of range, or nothing would be left.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"--holdout is a share of the images between 0 and 0.5, got {share:g}.")
    if share == 0:
        return source, None
    if isinstance(source, WindowSource):
        return source.hold_out(share, seed)
    total = len(source)
    count = max(1, min(MOST_HELD_OUT, round(share * total)))
    if count >= total:
        raise ValueError(f"--holdout {share:g} leaves nothing to train on: the data set has {total} image.")
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    while len(chosen) < count:  # a permutation of all would take gigabytes for the largest sets
        chosen.update(torch.randint(total, (count - len(chosen),), generator=generator).tolist())
    indices = torch.tensor(sorted(chosen))
    groups: Groups | None = getattr(source, "groups", None)
    groups = groups and groups.without(indices.numpy())
    return Part(source, total - count, _Without(indices), groups), Part(source, count, _Only(indices))
