"""The image files of a run, found once for all of its processes."""

import argparse
import os
from functools import partial

from ..command import say
from ..data.file_index import open_index
from ..data.find import check_index_option, find_images
from ..data.places import Listing, Place, places_of
from ..report import ImageProgress
from .distributed import World

__all__ = ["find_files"]


def find_files(args: argparse.Namespace, world: World) -> Listing | None:
    """The files that the options name; None where the images are those of a data set.

    The first process lists them, and the others receive the names. Where another process has another folder, as
    machines with copies of their own may, each lists what it has. An index is written by the first and opened by all.

    Args:
        args: The options.
        world: The processes of the run.

    Raises:
        ValueError: A folder or list cannot be read, too many files are missing, or the index cannot be used.
    """
    check_index_option(args.dataset, args.index)
    if args.dataset:
        return None
    places = places_of(args.data_dir, args.data_list)
    alone = not args.index and len({*world.gather([_identity(places)])}) > 1
    found = error = None
    if world.primary or alone:
        bar = ImageProgress(None, enabled=world.primary)
        try:
            found = find_images(
                args.data_dir, args.data_list, index=args.index, max_missing=args.max_bad_images, tick=bar.update,
                tell=partial(say, error=True),
            )  # fmt: skip
        except (ValueError, OSError) as e:
            if alone:
                raise
            error = str(e)  # the others must not wait
        finally:
            bar.close()
    if alone:
        return found
    found, error = world.share((None if args.index else found, error))
    if error is not None:
        raise ValueError(error)
    return open_index(args.index, places) if args.index else found.at(places)


def _identity(places: list[Place]) -> tuple:
    """What tells a folder from another of the same name on another machine: when it had last changed."""
    return tuple((*place, os.path.abspath(place.root), os.stat(place.root or ".").st_mtime_ns) for place in places)
