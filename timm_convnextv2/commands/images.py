"""The options of several commands on which images to read, and how stored values become pixels."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from ..data import Pixels
from ..data.config import PixelOptions, WindowOptions
from ..data.formats.axes import CHANNELS
from ..data.formats.pixels import one_page
from ..data.paths.places import Dirs, as_list
from ..data.sources.open import pages_and_windows


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


def add_source_options(add: Callable[..., Any]) -> None:
    """Adds the options on which images to read, and how stored values become pixels.

    Args:
        add: `add_argument` of a parser or a group.
    """
    add_place_options(add)
    add("--dataset", default="", metavar="NAME", help="timm's hfds/, hfids/, wds/, tfds/, torch/...; or 'embedded'")
    add("--train-split", default="train", metavar="NAME", help="split of --dataset")
    add("--train-num-samples", type=int, metavar="N", help="images per epoch, streamed or embedded")
    add("--dataset-download", action="store_true", help="let --dataset download itself")
    add("--input-key", metavar="NAME", help="image column of --dataset")
    add("--nodata", type=float, metavar="V", help="stored value of pixels without data; they get the others' mean")
    add("--divide", type=float, metavar="X", help="divide stored values by X (default: 255, 65535, floats by 1)")
    add("--clip-percentiles", type=float, nargs=2, metavar=("LO", "HI"),
        help="clip each channel to these percentiles of the pixels, measured, e.g. 1 99")
    add("--clip-low", type=float, nargs="+", metavar="X", help="clip to these limits, per channel, after the division")
    add("--clip-high", type=float, nargs="+", metavar="X", help="likewise")
    add("--dicom-window", type=_centre_or_file, nargs="+", metavar="X",
        help="values of DICOM that become 0 to 1: 'file' for the window that it names, or a centre and a width")
    add("--pages", type=page_word, nargs="+", metavar="P",
        help="of multi-page TIFF, stacks, DICOM: all or numbers from 0 (each an image), first, or channels")
    add("--window-size", type=int, metavar="S", help="read windows of S x S pixels instead of whole images, by area")
    add("--windows-per-image", type=float, metavar="N",
        help="windows of an average image in an epoch (default: as many as cover it)")
    add("--min-content", type=float, default=0.0, metavar="X",
        help="draw windows again, of which a smaller share than X is not flat (default: 0)")
    add("--content-std", type=float, default=0.01, metavar="X",
        help="16 x 16 pixels are flat up to this standard deviation, of the divided pixels (default: 0.01)")
# fmt: on


def one_place(data: list[str], data_dir: Dirs) -> Dirs:
    """What the command's DATA or --data-dir names.

    Raises:
        ValueError: Both are given.
    """
    if data and data_dir:
        named = [" ".join(map(str, as_list(value))) for value in (data, data_dir)]
        raise ValueError(f"DATA ('{named[0]}') and --data-dir ('{named[1]}') both name a folder: leave one out.")
    return (data[0] if len(data) == 1 else data) if data else data_dir


def page_word(word: str) -> int | str:
    """A word of --pages."""
    return word if word in ("all", "first", CHANNELS) else int(word)


def _centre_or_file(word: str) -> float | str:
    return word if word == "file" else float(word)


def pixels_of(args: argparse.Namespace) -> Pixels:
    """The record that the options of `add_source_options` give, without limits that are to be measured.

    Raises:
        ValueError: Words of --pages or --dicom-window that do not go together.
    """
    low, high = (None if values is None else tuple(values) for values in (args.clip_low, args.clip_high))
    window = args.dicom_window
    if window is not None and (len(window) != 2 or "file" in window) and window != ["file"]:
        raise ValueError(f"--dicom-window takes 'file', or a centre and a width, got {' '.join(map(str, window))}.")
    pages = args.pages or []
    if any(page not in ("all", "first", CHANNELS) and int(page) < 0 for page in pages) or (
        len(pages) > 1 and not all(isinstance(page, int) for page in pages)
    ):
        raise ValueError(f"--pages takes all, first, channels, or numbers from 0 up, got {' '.join(map(str, pages))}.")
    window = None if window is None else "file" if window == ["file"] else (window[0], window[1])
    return Pixels(args.nodata, args.divide, low, high, page=one_page(args.pages), dicom_window=window)


def parts_of(args: argparse.Namespace, source: Any, tick: Callable[[int], None] | None = None) -> Any:
    """The pages and the windows of a source's images that the options name; the source itself where they name none.

    Args:
        args: Of the options of `add_source_options`.
        source: As opened.
        tick: Called with 1 for each header that was read.

    Raises:
        ValueError: An option that does not fit the source, or another option.
    """
    windows = WindowOptions(args.window_size, args.windows_per_image, args.min_content, args.content_std)
    return pages_and_windows(source, PixelOptions(pages=tuple(args.pages) if args.pages else None), windows, tick)


def check_percentiles(pair: Sequence[float] | None) -> None:
    """Refuses limits of --clip-percentiles that are none.

    Raises:
        ValueError: They are out of order, or outside 0..100.
    """
    if pair is not None and not 0 <= pair[0] < pair[1] <= 100:
        raise ValueError(
            f"--clip-percentiles {pair[0]:g} {pair[1]:g}: expected two percentages in order, 0 <= LO < HI <= 100, such "
            "as 1 99."
        )
