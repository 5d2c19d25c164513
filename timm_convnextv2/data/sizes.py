"""Asks the file system for files that are listed: their sizes, and which are missing."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from .decode import printable
from .places import Listing

__all__ = ["check_missing", "file_sizes"]

_THREADS = 16  # that ask a file system, which may be far away
_CHUNK = 4096
_BATCH = 64
_NAMED = 5


def file_sizes(
    listing: Listing, tick: Callable[[int], Any] | None = None, most_missing: float = math.inf
) -> np.ndarray:
    """Bytes of each file, int64; -1 where there is none. Asks the file system for each, several at a time.

    Args:
        listing: The files.
        tick: Called now and then with the number of files that were just asked for.
        most_missing: Stops where more are missing; then there are fewer sizes than files.
    """
    sizes, done, missing = np.empty(len(listing.names), np.int64), 0, 0
    paths = (os.path.join(place.root, name) for place, names in listing.parts() for name in names)
    with ThreadPoolExecutor(_THREADS) as pool:
        while missing <= most_missing and (chunk := [*islice(paths, _CHUNK)]):
            # in batches, as a task a file costs more than the question
            batches = [chunk[i : i + _BATCH] for i in range(0, len(chunk), _BATCH)]
            found = [size for batch in pool.map(_sizes, batches) for size in batch]
            sizes[done : done + len(chunk)] = found
            done, missing = done + len(chunk), missing + found.count(-1)
            if tick is not None:
                tick(len(chunk))
    return sizes[:done]


def _sizes(paths: list[str]) -> list[int]:
    return [_size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def check_missing(listing: Listing, sizes: np.ndarray, share: float) -> str:
    """What to say of files that are not there; '' where all are.

    Args:
        listing: The files.
        sizes: Of `file_sizes`.
        share: How many may be missing.

    Raises:
        ValueError: More are.
    """
    (absent,) = np.nonzero(sizes < 0)
    if not len(absent):
        return ""
    looked = "" if len(sizes) == len(listing.names) else f" of the first {len(sizes)}"
    found = (
        f"{len(absent)}{looked} of {len(listing.names)} images that are listed are missing, for example "
        f"{', '.join(printable(listing.path(i)) for i in absent[:_NAMED])}"
    )
    if len(absent) > share * len(listing.names):
        raise ValueError(
            f"{found}; --max-bad-images allows a share of {share:g}. Names are relative to the folder of their list, "
            "or to --data-dir where that is given beside --data-list."
        )
    return f"{found}; others stand in for them."
