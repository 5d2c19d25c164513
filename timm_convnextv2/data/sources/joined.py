"""Several places of images as one source."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..formats.decode import Choose, Reduced, check_in_chans, check_index, printable
from ..formats.pixels import Pixels
from ..paths.walk import LeftOut
from .folder import FolderSource
from .groups import Groups
from .timm import TimmSource


class JoinedSource(Dataset):
    """Sources one after the other. The name of an image says in which place it is.

    Args:
        parts: `FolderSource`, or `TimmSource` of a tar.

    Attributes:
        left: What is there besides the images.
        groups: How images are sampled, see `weights.Groups`; None: each once an epoch.
        path: As that of `FolderSource`; only where all parts have it.
    """

    groups: Groups | None = None

    def __init__(self, parts: Sequence[FolderSource | TimmSource]) -> None:
        self.parts = [*parts]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.left = LeftOut()
        for part in parts:
            self.left.merge(part.left)
        if all(isinstance(part, FolderSource) for part in parts):
            self.path: Callable[[int], str] = self._path

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, i: int) -> tuple[Any, int]:
        """The part that has image `i`, and its number there."""
        at = int(np.searchsorted(self.starts, check_index(i, len(self)), side="right")) - 1
        return self.parts[at], i - int(self.starts[at])

    def __getitem__(self, i: int) -> torch.Tensor:
        part, j = self.locate(i)
        return part[j]

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """See `FolderSource.load_reduced`."""
        part, j = self.locate(i)
        return part.load_reduced(j, choose)

    def name(self, i: int) -> str:
        """Path of image `i`, safe to print; of an image in a tar that of the tar and its name there."""
        part, j = self.locate(i)
        name = part.name(j)
        return name if isinstance(part, FolderSource) else f"{printable(part.dataset_name)}/{name}"

    def _path(self, i: int) -> str:
        part, j = self.locate(i)
        return part.path(j)

    @property
    def in_chans(self) -> int:
        """Channels that images are converted to."""
        return self.parts[0].in_chans

    @in_chans.setter
    def in_chans(self, in_chans: int) -> None:
        for part in self.parts:
            part.in_chans = check_in_chans(in_chans)

    @property
    def pixels(self) -> Pixels:
        """See `decode.load_image`."""
        return self.parts[0].pixels

    @pixels.setter
    def pixels(self, pixels: Pixels) -> None:
        for part in self.parts:
            part.pixels = pixels
