"""The options of embed on where images are."""

import argparse
from collections.abc import Callable
from typing import Any


class OneOrMore(argparse.Action):
    """One value as it is, several as a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Stores them."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


# fmt: off
def add_place_options(add: Callable[..., Any]) -> None:
    """Adds the options on where image files are: --data-dir, --data-list and --index.

    Args:
        add: `add_argument` of a parser or a group.
    """
    add("--data-dir", metavar="DIR", nargs="+", action=OneOrMore,
        help="images anywhere below these folders, in .tar files, or that match 'scans/*/**/*.png' (quoted); or the "
        "root of --dataset")
    add("--data-list", metavar="FILE", nargs="+", action=OneOrMore,
        help="images that a .txt (a path a line), .csv or .parquet names (column path, perhaps weight); paths are "
        "relative to it, or to --data-dir")
    add("--index", metavar="FILE", help="names of the images: written if it is not there, shared by all processes")
# fmt: on
