"""The options of several commands on which images to read, and how stored values become pixels."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .data import Pixels

__all__ = ["add_source_options", "check_percentiles", "pixels_of"]


# fmt: off
def add_source_options(add: Callable[..., Any]) -> None:
    """Adds the options on which images to read, and how stored values become pixels.

    Args:
        add: `add_argument` of a parser or a group.
    """
    add("--data-dir", metavar="DIR", help="images anywhere below it; the root of --dataset where that is given")
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
# fmt: on


def pixels_of(args: argparse.Namespace) -> Pixels:
    """The record that the options of `add_source_options` give, without limits that are to be measured."""
    low, high = (None if values is None else tuple(values) for values in (args.clip_low, args.clip_high))
    return Pixels(args.nodata, args.divide, low, high)


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
