"""Measure the pixels of a data set, per channel: what --mean and --std of pretraining are to be, and what is odd.

    timm-convnextv2 stats IMAGES
    timm-convnextv2 stats SCENES --in-chans 12 --divide 10000 --nodata 0 --clip-percentiles 1 99

Writes FILE.json and, beside it, FILE.png with the histograms; FILE is stats.json by default. Each pixel of the sample
counts the same; the sample is drawn by --seed and as large as --error asks for. NaN, infinity and nodata are left out.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from ..console import PROGRAM, CommandParser, refused, say
from ..data import DataSet, ImagePaths, Pixels, StreamOrder, TimmStream, create_source
from ..data.measure.sample import ERROR, Measured, find_channels, measure_pixels, measured_options
from ..data.paths.index import check_index_option, find_images
from ..data.paths.places import Dirs, Listing, as_list, base_of
from ..files import whole_file
from ..report.images import save_histograms
from ..runs.progress import ImageProgress, with_progress
from .images import add_source_options, check_percentiles, one_place, parts_of, pixels_of

_COLUMNS = ("mean", "std", "min", "p1", "p5", "p50", "p95", "p99", "max", "zeros", "saturated", "missing")
_SHARES = ("zeros", "saturated", "missing")


# fmt: off
def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog=f"{PROGRAM} stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="*", metavar="DATA", help="the same as --data-dir")
    add_source_options(add)
    add("--in-chans", type=int, metavar="N", help="channels of the images (default: what the files have)")
    add("--error", type=float, default=ERROR, metavar="X",
        help=f"standard error of the mean to reach, in standard deviations of the pixels (default: {ERROR})")
    add("--max-images", type=int, default=2000, metavar="N", help="read no more images than these (default: 2000)")
    add("--seed", type=int, default=42, metavar="N", help="of the sample; that of pretraining gives the same numbers")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that decode images (default: 4)")
    add("--output", default="stats.json", metavar="FILE", help="JSON to write; the figure has its name and .png")
    add("--overwrite", action="store_true", help="replace --output and its figure")
    return parser
# fmt: on


def measure_options(args: argparse.Namespace) -> tuple[Measured, Pixels]:
    """Measures what the options name.

    Raises:
        ValueError: A mistake in options or data.
    """
    data_dir = one_place(args.data, args.data_dir)
    check_percentiles(args.clip_percentiles)
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}.")
    pixels = pixels_of(args)
    opened: dict[str, Any] = {}

    def open_source(pixels: Pixels) -> Any:
        data_set = DataSet(
            args.dataset, args.train_split, args.train_num_samples, args.dataset_download, args.input_key
        )
        source = partial(
            create_source, ImagePaths.of(data_dir, args.data_list), data_set, pixels=pixels,
            order=StreamOrder(seed=args.seed), listing=listing,
        )  # fmt: skip
        if "source" not in opened:
            first = source(in_chans=args.in_chans or 3)
            if args.in_chans is None and not isinstance(first, TimmStream) and first.has_files:
                first = first.reading(find_channels(first, args.seed, (args.pages or [None])[0]), pixels)
            opened["source"] = with_progress(lambda tick: parts_of(args, first, tick))
            return opened["source"]
        return source(in_chans=opened["source"].in_chans)

    check_output(Path(args.output), data_dir, args.overwrite)
    bar = ImageProgress(None)
    try:
        listing = listed(args, data_dir) if args.index else None
        found, pixels = measure_pixels(
            open_source, pixels, tuple(args.clip_percentiles) if args.clip_percentiles else None, seed=args.seed,
            error=args.error, max_images=args.max_images, workers=args.workers, tick=bar.update,
        )  # fmt: skip
    finally:
        bar.close()
    if note := str(opened["source"].left):
        say(note)
    return found, pixels


def listed(args: argparse.Namespace, data_dir: Dirs) -> Listing:
    """The images of --index, which is written first where it is not there.

    Raises:
        ValueError: It cannot be used.
    """
    check_index_option(args.dataset, args.index)
    bar = ImageProgress(None)
    try:
        return find_images(data_dir, args.data_list, index=args.index, tick=bar.update, tell=partial(say, error=True))
    finally:
        bar.close()


def check_output(output: Path, data_dir: Dirs, overwrite: bool) -> None:
    """Refuses an output that exists, or whose figure would be an image of the data set."""
    figure = output.with_suffix(".png")
    if output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json.")
    for path in (output, figure):
        if path.exists() and not overwrite:
            raise ValueError(f"'{path}' exists. Replace it with --overwrite, or choose another --output.")
    folders = [Path(base_of(place)) for place in as_list(data_dir) if place]
    if any(folder.is_dir() and folder.resolve() in figure.resolve().parents for folder in folders):
        raise ValueError(f"'{figure}' would lie among the images and be one of them. Choose another --output.")


def report(found: Measured, pixels: Pixels, seed: int) -> dict[str, Any]:
    """All that was found, for the JSON file; values are in units of the pixels that mean and std are of."""
    mean, std = measured_options(found.pixels)
    return {
        "images": found.pixels.images,
        "of": found.total,
        "seed": seed,
        "standard_error": found.error,
        "standard_error_wanted": found.wanted,
        "type": found.kind,
        "stored_range": list(found.stored),
        "divided_by": found.unit,
        "pixels": pixels.record(),
        "mean": mean,
        "std": std,
        "channels": [found.pixels.channel(c) for c in range(found.pixels.channels)],
        "left_out": len(found.bad),
        "left_out_because": found.bad[:100],
    }


def table(content: dict[str, Any]) -> str:
    """The statistics as text, a row a channel."""
    rows = [["channel", *_COLUMNS]]
    for c, channel in enumerate(content["channels"], 1):
        values = [f"{channel[k]:.1%}" if k in _SHARES else f"{channel[k]:.4g}" for k in _COLUMNS]
        rows.append([str(c), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def option_line(found: Measured, pixels: Pixels) -> str:
    """The options of pretraining that say the same."""
    mean, std = measured_options(found.pixels)
    words = ["--in-chans", str(found.pixels.channels)]
    words += [] if pixels.nodata is None else [f"--nodata={pixels.nodata:g}"]
    words += [] if pixels.divide is None else ["--divide", f"{pixels.divide:g}"]
    for name, values in (("clip-low", pixels.clip_low), ("clip-high", pixels.clip_high)):
        words += [] if values is None else [f"--{name}", *(f"{v:g}" for v in values)]
    return " ".join([*words, "--mean", *(f"{v:g}" for v in mean), "--std", *(f"{v:g}" for v in std)])


def main(argv: list[str] | None = None) -> int:
    """The command; whatever is wrong is one message and exit status 2."""
    try:
        args = build_parser().parse_args(argv)
        found, pixels = measure_options(args)
        content = report(found, pixels, args.seed)
        output = Path(args.output)
        with whole_file(output) as part:
            part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        figure = output.with_suffix(".png")
        title = f"{found.pixels.images} images, {found.kind}; pixels divided by {found.unit:g}"
        save_histograms(found.pixels, figure, title)
    except (ValueError, RuntimeError, OSError) as e:
        return refused("stats", e)
    except KeyboardInterrupt:
        say("Stopped; nothing was written.", error=True)
        return 130
    low, high = found.stored
    say(f"{found.kind}, stored values {low:g} to {high:g}, divided by {found.unit:g}; {found.source}")
    if found.bad:
        say(f"{len(found.bad)} images left out, for example: {found.bad[0]}")
    if found.error > args.error:
        say(f"warning: the standard error is above --error {args.error:g}: read more with --max-images.", error=True)
    if missing := max(channel["missing"] for channel in content["channels"]):
        hint = "" if pixels.nodata is not None else "; pretraining refuses NaN and infinity without --nodata nan"
        say(f"Up to {missing:.2%} of a channel's pixels are nodata, NaN or infinite{hint}.")
    say(table(content))
    say(f"Options of pretraining (or --mean auto --std auto):\n  {option_line(found, pixels)}")
    say(f"Written: {output}, {figure}")
    return 0
