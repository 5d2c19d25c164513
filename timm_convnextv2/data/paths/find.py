"""The image files of a command, listed once for all of its processes."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from ...console import count, say
from ...runs.group import Processes, on_primary
from ...runs.progress import ImageProgress
from ..config import ImagePaths
from ..formats.files import printable
from .index import Index, write_index
from .listing import Listing, Origin, list_files, origins_of
from .lists import Tick

_THREADS = 16  # file systems may be remote
_CHUNK = 4096
_BATCH = 64
_NAMED = 5


def check_places(paths: ImagePaths, dataset: str = "") -> None:
    """Refuses folders and lists that do not exist, without looking into them: it takes no time."""
    if not dataset:
        origins_of(paths.data_dir, paths.data_list)


def find_files(
    paths: ImagePaths,
    dataset: str,
    most_missing: float,
    group: Processes,
    *,
    progress: bool = True,
    copies: bool = True,
) -> Listing | None:
    """The image files that the options name; None for a data set.

    Rank 0 lists them and sends the names to the other processes. Rank 0 writes --index if it does not exist, and all
    processes open it.

    Args:
        most_missing: Largest fraction of the files of lists that may be missing.
        progress: Print messages and progress, on rank 0.
        copies: Each process lists its own folders if they differ, as on machines with copies of their own.

    Raises:
        ValueError: A folder or list cannot be read, too many files are missing, or the index cannot be used.
        WriteError: (an OSError) The index cannot be written.
    """
    if dataset and paths.index:
        raise ValueError(f"--index is for image files: leave it out with --dataset {dataset}.")
    if dataset:
        return None
    origins = origins_of(paths.data_dir, paths.data_list)
    alone = copies and not paths.index and len({*group.gather([_identity(origins)])}) > 1
    bar = ImageProgress(None, enabled=progress and group.primary)
    notify = partial(say, error=True) if progress else lambda text: None
    find = partial(_find, origins, paths.index, most_missing, bar.update, notify)
    try:
        if alone:
            return find()
        if not paths.index:
            return replace(on_primary(group, find), origins=origins)  # the paths of this process
        on_primary(group, lambda: find() and None)  # all processes open the file instead of receiving its names
        return Index(paths.index).listing(origins)
    finally:
        bar.close()


def _identity(origins: list[Origin]) -> tuple:
    """Distinguishes a folder from one of the same name on another machine, by its time of change."""
    return tuple((*origin.record(), os.stat(origin.root or ".").st_mtime_ns) for origin in origins)


def _find(origins: list[Origin], index: str | None, share: float, tick: Tick, notify: Callable[[str], Any]) -> Listing:
    tars, sizes = [origin.given for origin in origins if origin.kind == "tar"], np.zeros(0, np.int64)
    if not index:
        listing = list_files(origins, tick)
        if any(origin.kind == "list" for origin in origins):
            sizes = file_sizes(listing, tick, share * listing.count)
    elif tars:
        raise ValueError(f"--index is for files in folders, not for a tar file ({tars[0]}). Leave it out.")
    elif os.path.lexists(index):
        opened = Index(index).verify()
        listing, sizes = opened.listing(origins), opened.read("sizes")
        if changes := opened.changes():
            notify(changes)
    else:
        listing = list_files(origins, tick, stamps=True)
        sizes = file_sizes(listing, tick)
    if missing := _missing(listing, sizes, share):
        notify(missing)
    if index and not os.path.lexists(index):
        write_index(index, listing, sizes)
        notify(f"Written: {index}, an index of {count(listing.count, 'image')}.")
    return listing


def file_sizes(listing: Listing, tick: Tick = lambda count: None, most_missing: float = math.inf) -> np.ndarray:
    """Bytes of each file, int64, -1 if missing; stops early, with fewer sizes, after more than `most_missing`."""
    sizes, done, missing, paths = np.empty(listing.count, np.int64), 0, 0, listing.paths()
    with ThreadPoolExecutor(_THREADS) as pool:
        while missing <= most_missing and (chunk := [*islice(paths, _CHUNK)]):
            # in batches: a task per file costs more than `stat`
            batches = [chunk[i : i + _BATCH] for i in range(0, len(chunk), _BATCH)]
            found = [size for batch in pool.map(lambda paths: [*map(file_size, paths)], batches) for size in batch]
            sizes[done : done + len(chunk)] = found
            done, missing = done + len(chunk), missing + found.count(-1)
            tick(len(chunk))
    return sizes[:done]


def file_size(path: str) -> int:
    """Bytes of a file, -1 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _missing(listing: Listing, sizes: np.ndarray, share: float) -> str:
    """A message about missing files, '' if there are none; a ValueError if they are more than `share` of all."""
    (absent,) = np.nonzero(sizes < 0)
    if not len(absent):
        return ""
    first = "" if len(sizes) == listing.count else f" of the first {len(sizes)}"
    names = ", ".join(printable(listing.path(i)) for i in absent[:_NAMED])
    found = f"{len(absent)}{first} of {listing.count} listed images are missing, for example {names}"
    if len(absent) > share * listing.count:
        raise ValueError(
            f"{found}; --max-bad-images allows a fraction of {share:g}. Names are relative to the list, or to "
            "--data-dir if that is given with --data-list."
        )
    return f"{found}."
