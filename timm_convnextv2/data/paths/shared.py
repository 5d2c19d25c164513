"""The image files of a command, listed once for all of its processes."""

import os
from functools import partial

from ...console import say
from ...runs.group import Group, on_primary
from ...runs.progress import ImageProgress
from ..config import ImagePaths
from .index import find_images, open_index
from .places import Listing, Place, places_of


def find_files(
    paths: ImagePaths, max_missing: float | None, group: Group, *, progress: bool = True, copies: bool = True
) -> Listing:
    """The image files that the options name.

    Rank 0 lists them and sends the names to the other processes. With `copies`, each process lists its own folders if
    they differ, as on machines with copies of their own. Rank 0 writes an index, and all processes open it.
    `max_missing` is the largest fraction of the files of a list that may be missing; None skips the check.
    """
    places = places_of(paths.data_dir, paths.data_list)
    alone = copies and not paths.index and len({*group.gather([_identity(places)])}) > 1
    bar = ImageProgress(None, enabled=progress and group.primary)
    find = partial(
        find_images, paths.data_dir, paths.data_list, index=paths.index, max_missing=max_missing, tick=bar.update,
        tell=partial(say, error=True) if progress else lambda text: None,
    )  # fmt: skip
    try:
        if alone:
            return find()
        if not paths.index:
            return on_primary(group, find).at(places)
        on_primary(group, lambda: find() and None)  # all processes open the file instead of receiving its names
        return open_index(paths.index, places)
    finally:
        bar.close()


def _identity(places: list[Place]) -> tuple:
    """Distinguishes a folder from one of the same name on another machine, by its time of change."""
    return tuple((*place, os.path.abspath(place.root), os.stat(place.root or ".").st_mtime_ns) for place in places)
