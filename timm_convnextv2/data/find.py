"""Finds the image files that options name: lists folders, or opens an index of them, and looks for what is missing."""

import os
from collections.abc import Callable
from typing import Any

from .file_index import index_sizes, open_index, stale, write_index
from .places import Dirs, Listing, list_files, places_of
from .sizes import check_missing, file_sizes

__all__ = ["check_index_option", "find_images"]


def check_index_option(dataset: str, index: str | os.PathLike | None) -> None:
    """Refuses an index of what is no folder or list.

    Raises:
        ValueError: A data set is named beside it.
    """
    if dataset and index:
        raise ValueError(f"--index is of images in files: leave it out with --dataset {dataset}.")


def find_images(
    data_dir: Dirs,
    data_list: Dirs = None,
    *,
    index: str | os.PathLike | None = None,
    max_missing: float | None = None,
    tick: Callable[[int], Any] | None = None,
    tell: Callable[[str], Any] = lambda text: None,
) -> Listing:
    """The image files of folders, patterns and lists; one process calls it for all.

    Args:
        data_dir, data_list: See `places.places_of`.
        index: Index to open, or to write where it is not there.
        max_missing: Share of the files of lists that may be missing; None: nobody looks.
        tick: Called now and then with the number of files that were just found or looked at.
        tell: Called with what the user should know.

    Raises:
        ValueError: A place cannot be listed, too many files are missing, or the index cannot be used.
        WriteError: (an OSError) The index cannot be written.
    """
    places = places_of(data_dir, data_list)
    if index is None:
        listing = list_files(places, tick)
        if max_missing is not None and any(place.kind == "list" for place in places):
            most = max_missing * len(listing.names)
            if found := check_missing(listing, file_sizes(listing, tick, most), max_missing):
                tell(found)
        return listing
    tars = [place.given for place in places if place.kind == "tar"]
    if tars:
        raise ValueError(f"--index is of files in folders, not of a tar file ({tars[0]}). Leave it out.")
    if os.path.lexists(index):
        listing = open_index(index, places)
        if found := stale(index):
            tell(found)
    else:
        listing = list_files(places, tick, stamps=True)
        sizes = file_sizes(listing, tick)
        if max_missing is not None:
            check_missing(listing, sizes, max_missing)
        write_index(index, listing, sizes)
        tell(f"Written: {os.fspath(index)}, an index of {len(listing.names)} images.")
        listing = open_index(index, places)
    if max_missing is not None and (found := check_missing(listing, index_sizes(index), max_missing)):
        tell(found)
    return listing
