"""The image files of a command, listed once for all of its processes."""

import os
from dataclasses import replace
from functools import partial

from ...console import say
from ...runs.group import Group, on_primary
from ...runs.progress import ImageProgress
from ..config import ImagePaths
from .index import find_images, open_index
from .listing import Listing, Origin, origins_of


def find_files(
    paths: ImagePaths, max_missing: float | None, group: Group, *, progress: bool = True, copies: bool = True
) -> Listing:
    """The image files that the options name.

    Rank 0 lists them and sends the names to the other processes. With `copies`, each process lists its own folders if
    they differ, as on machines with copies of their own. Rank 0 writes an index, and all processes open it.
    `max_missing` is the largest fraction of the files of a list that may be missing; None skips the check.
    """
    origins = origins_of(paths.data_dir, paths.data_list)
    alone = copies and not paths.index and len({*group.gather([_identity(origins)])}) > 1
    bar = ImageProgress(None, enabled=progress and group.primary)
    find = partial(
        find_images, paths.data_dir, paths.data_list, index=paths.index, max_missing=max_missing, tick=bar.update,
        notify=partial(say, error=True) if progress else lambda text: None,
    )  # fmt: skip
    try:
        if alone:
            return find()
        if not paths.index:
            return replace(on_primary(group, find), origins=origins)  # the paths of this process
        on_primary(group, lambda: find() and None)  # all processes open the file instead of receiving its names
        return open_index(paths.index, origins)
    finally:
        bar.close()


def _identity(origins: list[Origin]) -> tuple:
    """Distinguishes a folder from one of the same name on another machine, by its time of change."""
    return tuple((*origin, os.path.abspath(origin.root), os.stat(origin.root or ".").st_mtime_ns) for origin in origins)
