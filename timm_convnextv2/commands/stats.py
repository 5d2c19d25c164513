"""`timm-convnextv2 stats`: measures the pixels of a data set per channel."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import entries, flat, words_of
from ..console import PROGRAM, count, say
from ..data import (
    Pixels,
    Source,
    StreamOrder,
    TimmStream,
    create_source,
    pages_and_windows,
)
from ..data.config import Dirs, as_list, check_limits
from ..data.measure.pixel_statistics import PixelStatistics
from ..data.measure.sample import (
    Measured,
    blank_note,
    find_channels,
    measure_pixels,
    measured_options,
    suggestions,
)
from ..data.paths.find import check_places, find_files
from ..data.paths.listing import base_of
from ..files import check_free, write_json
from ..report.images import FIGURE_OF, save_histograms
from ..runs.group import Processes
from ..runs.progress import with_progress
from .base import run
from .options import StatsConfig

_COLUMNS = ("mean", "std", "min", "p1", "p5", "p50", "p95", "p99", "max", "zeros", "saturated", "missing")
_SHARES = ("zeros", "saturated", "missing")


def measure_images(config: StatsConfig) -> tuple[Measured, Pixels, Path]:
    """Measures the images of the options; the file to write is checked before."""
    paths = config.paths
    opened: list[Source | TimmStream] = []

    def open_source(pixels: Pixels) -> Source | TimmStream:
        order = StreamOrder(seed=config.seed)
        in_chans = opened[0].in_chans if opened else config.in_chans or 3
        unknown = not opened and config.in_chans is None and not config.data_set.dataset
        # limits per channel suit the channels of the files, which are not known yet
        first = pixels._replace(clip_low=None, clip_high=None) if unknown else pixels
        source = create_source(paths, config.data_set, in_chans, first, order=order, listing=listing)
        if opened:  # a stream is read again
            return source
        if config.in_chans is None and isinstance(source, Source):
            page = config.pixels.pages[0] if config.pixels.pages else None
            channels = find_channels(source, config.seed, page) if source.has_files else source.in_chans
            source = source.reading(channels, pixels)
        opened.append(with_progress(partial(pages_and_windows, source, config.pixels, config.windows)))
        return opened[0]

    pixels = config.pixels.to_pixels()
    check_limits(config.pixels)
    check_places(paths, config.data_set.dataset)
    output = check_output("stats", config.output, paths.data_dir, config.overwrite)
    listing = find_files(paths, config.data_set.dataset, 1.0, Processes())
    options = dict(seed=config.seed, error=config.error, max_images=config.max_images, workers=config.workers)
    found = with_progress(
        lambda tick: measure_pixels(open_source, pixels, config.pixels.clip_percentiles, tick=tick, **options)
    )
    if note := str(opened[0].left):
        say(note)
    return *found, output


def made_by(command: str) -> str:
    """What stands in the first line of a command's JSON file."""
    return f"{PROGRAM} {command}"


def check_output(command: str, named: str | None, data_dir: Dirs, overwrite: bool) -> Path:
    """The JSON file to write; refuses one that exists, and a figure that would become an image of the data set.

    What the command wrote to its default file is replaced, but no file that the user named.
    """
    output = Path(named or f"{command}.json")
    figure, marks = output.with_suffix(".png"), () if named else (made_by(command), FIGURE_OF)
    if output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json.")
    for path in (output, figure):
        check_free(path, overwrite=overwrite, marks=marks)
    folders = [Path(base_of(path)) for path in as_list(data_dir) if path]
    if any(folder.is_dir() and folder.resolve() in figure.resolve().parents for folder in folders):
        raise ValueError(f"'{figure}' would lie among the images and be one of them. Choose another --output.")
    return output


def report(found: Measured, pixels: Pixels, config: StatsConfig) -> dict[str, Any]:
    """The content of the JSON file; values are in the units of mean and std."""
    mean, std = measured_options(found.pixels)
    return {
        "made_by": made_by("stats"),
        "images": found.pixels.images,
        "of": found.total,
        "seed": config.seed,
        "standard_error": found.error,
        "standard_error_wanted": config.error,
        "type": found.kind,
        "stored_range": list(found.stored),
        "divided_by": found.unit,
        "pixels": pixels.record(),
        "mean": mean,
        "std": std,
        "suggested": suggestions(found, config.pixels.to_pixels()),
        "channels": [found.pixels.channel(c) for c in range(found.pixels.channels)],
        "left_out": len(found.bad),
        "left_out_because": found.bad[:100],
    }


def table(content: dict[str, Any]) -> str:
    """The statistics as text, one row per channel."""
    rows = [["channel", *_COLUMNS]]
    for c, channel in enumerate(content["channels"], 1):
        rows.append([str(c), *(f"{channel[k]:.1%}" if k in _SHARES else f"{channel[k]:.4g}" for k in _COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def option_lines(found: Measured, pixels: Pixels, config: StatsConfig, suggested: dict[str, str]) -> list[str]:
    """The options of pretraining, to paste, and the reason of each.

    They contain every option that changed the pixels. Suggestions change them once more: nothing that was measured
    without them is then pasted as a number.
    """
    mean, std = measured_options(found.pixels)
    reasons = {f"--in-chans {found.pixels.channels}": "channels of the images"}
    percentiles = config.pixels.clip_percentiles
    for name, value in _given(config):
        if name == "clip_percentiles" and not suggested:
            why = "percentiles {:g} and {:g} of the pixels".format(*value)
            reasons |= {_words("clip_low", pixels.clip_low): why, _words("clip_high", pixels.clip_high): why}
        else:
            reasons[_words(name, value)] = "as given; measured at the start" if value is percentiles else "as given"
    reasons |= suggested
    numbers = " ".join(["--mean", *(f"{v:g}" for v in mean), "--std", *(f"{v:g}" for v in std)])
    if pixels.standardize is not None:
        reasons[_words("standardize", pixels.standardize)] = "as given; mean and std are then 0 and 1"
    elif suggested:
        reasons["--mean auto --std auto"] = "measured at the start"
    else:
        reasons[numbers] = found.source
    longest = min(24, max(map(len, reasons)))
    lines = [
        f"  {option:{longest}}  {reason}" if len(option) <= 24 else f"  {option}\n  {'':{longest}}  {reason}"
        for option, reason in reasons.items()
    ]
    return ["Options of pretraining, and why:", *lines, "In one line, to paste:", f"  {' '.join(reasons)}"]


def _given(config: StatsConfig) -> Iterator[tuple[str, Any]]:
    """The options that change the pixels, as far as they are set."""
    for part in (config.pixels, config.windows):
        for name, value in flat(part, recorded_only=False).items():
            if value != entries(type(part))[name].default:
                yield name, value


def _words(name: str, value: Any) -> str:
    """An option as it is typed, with all digits of its numbers."""
    flag, *values = (word.removesuffix(".0") for word in words_of(StatsConfig, {name: value}))
    return f"{flag}={values[0]}" if len(values) == 1 and values[0].startswith("-") else " ".join([flag, *values])


def spread_note(found: PixelStatistics, pixels: Pixels) -> str:
    """Advice if images differ more between each other than within and are not standardised; else ''."""
    between, within = (float(np.sqrt(np.square(std).mean())) for std in (found.between, found.within))
    if pixels.standardize is not None or found.images < 2 or between <= within:
        return ""
    return (
        f"Images differ more between each other (standard deviation of their means {between:.2g}) than within (of "
        f"pixels around the mean of their image {within:.2g}). If light and contrast mean nothing in your images, "
        "pretrain with --standardize channel (or image, which keeps the ratios of channels) instead of --mean and "
        "--std."
    )


def stats(config: StatsConfig) -> None:
    """Measures, writes and prints."""
    found, pixels, output = measure_images(config)
    content = report(found, pixels, config)
    write_json(output, content, indent=2)
    figure, (low, high) = output.with_suffix(".png"), found.stored
    save_histograms(
        found.pixels, figure, f"{count(found.pixels.images, 'image')}, {found.kind}; pixels divided by {found.unit:g}"
    )
    values = "stored values" if config.pixels.clip_low is None else "values, clipped,"
    say(f"{found.kind}, {values} {low:g} to {high:g}, divided by {found.unit:g}; {found.source}")
    if found.bad:
        say(f"{count(len(found.bad), 'image')} left out, for example: {found.bad[0]}")
    if found.error > config.error:
        say(f"warning: the standard error is above --error {config.error:g}: read more with --max-images.", error=True)
    if missing := max(channel["missing"] for channel in content["channels"]):
        hint = "" if pixels.nodata is not None else "; pretraining refuses NaN and infinity without --nodata nan"
        say(f"Up to {missing:.2%} of a channel's pixels are nodata, NaN or infinite{hint}.")
    say(table(content))
    say(f"Written: {output}, {figure}")
    for note in filter(None, (spread_note(found.pixels, pixels), blank_note(found, pixels))):
        say(note)
    say("\n".join(option_lines(found, pixels, config, content["suggested"])))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run("stats", stats, argv)
