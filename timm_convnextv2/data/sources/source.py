"""The base classes of every source of images."""

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Dataset

from ..formats.decode import check_index
from ..formats.errors import ImageError, MissingPackageError
from ..formats.pillow import Choose, Reduced
from ..formats.pixels import PLAIN, Pixels
from ..paths.walk import LeftOut
from .groups import Groups

S = TypeVar("S", bound="Source")
T = TypeVar("T")
Bad = list[tuple[int, str]]  # index and message of images that cannot be read


def locate(ends: Sequence[int], i: int) -> tuple[int, int, int]:
    """Finds entry `i` in groups with these cumulative sizes: its group, its index there, and the group's size."""
    group = bisect_right(ends, check_index(i, ends[-1]))
    first = ends[group - 1] if group else 0
    return group, i - first, ends[group] - first


def of_each_file(
    source: "Source", read: Callable[[int], T], default: T, tick: Callable[[int], None] | None = None
) -> list[T]:
    """`read(i)` of each image; the default if it fails, as it will again in training, where errors are counted."""
    found = []
    for i in range(len(source)):
        try:
            found.append(read(i))
        except MissingPackageError:
            raise
        except (ImageError, OSError):
            found.append(default)
        if tick is not None:
            tick(1)
    return found


class Source(Dataset):
    """Images by index. Subclasses define `__len__`, `read` and `name`.

    Attributes:
        in_chans: Channels that images are converted to.
        pixels: How stored values become pixels.
        has_files: Whether `path` works: pages, windows and headers need files.
        left: Files that are not images, or other notes for the user; '' (or false) if there are none.
        groups: How images are sampled; None: each once per epoch.
    """

    has_files = False
    left: LeftOut | str = ""
    groups: Groups | None = None

    def __init__(self, in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        self.in_chans, self.pixels = in_chans, pixels.check(in_chans)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.read(i)  # pyright: ignore[reportReturnType]  # Reduced only with `choose`

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        """Decodes image `i` to `[C, H, W]`: uint8, or float32 that is already scaled.

        `choose` lets a large JPEG be decoded at reduced size, see `decode.decode`. `seed` sets the position of a
        window; other sources ignore it. An image that cannot be read is an ImageError or OSError.
        """
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Name of image `i`, printable."""
        raise NotImplementedError

    def full_name(self, i: int) -> str:
        """Name of image `i` among other sources: with the path of its tar file."""
        return self.name(i)

    def row_name(self, i: int) -> str:
        """Name of image `i` in tables: the path below the folder if there is one."""
        return self.name(i)

    def path(self, i: int) -> str:
        """Path of the file of image `i`."""
        raise NotImplementedError

    def pixels_of(self, i: int) -> Pixels:
        """`pixels` for image `i`, which may be one page of its file."""
        return self.pixels

    def folders(self) -> list[str]:
        """Folders in which a new image file would belong to this source in the next run."""
        return []

    def reading(self: S, in_chans: int, pixels: Pixels) -> S:
        """The same images, converted in another way, without listing or scanning again."""
        other = copy.copy(self)
        other.in_chans, other.pixels = in_chans, pixels.check(in_chans)
        return other

    def reason(self, i: int, error: Exception) -> str:
        """The message of an error of image `i`, with its name."""
        name, message = self.name(i), str(error)
        return message if name in message else f"{name}: {message}"
