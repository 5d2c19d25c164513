"""What finetunings tell: a table, a verdict with an interval over seeds, and a picture."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import read_json
from ..console import duration
from ..files import read_rows
from ..report.images import new_figure, save_figure
from .figures import label_counts

SCRATCH, OWN = "from scratch", "own encoder"
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 %, 1 to 9 degrees of freedom


class Curve(NamedTuple):
    """One finetuning of a candidate: top-1 in % on the validation images, by the number of epochs before it.

    `images` is the number of training images, `seed` that of the order of images, augmentation and new weights, `rate`
    the --lr-base that was chosen, by the accuracy of those `tried`; `seconds` is 0 if the run had finished before.
    """

    name: str
    images: int
    seed: int
    accuracy: dict[int, float]
    rate: float
    tried: Mapping[float, float]
    seconds: float


Last = dict[int, dict[str, dict[int, float]]]  # accuracy after the last epoch, by images, candidate and seed


def last_of(curves: Sequence[Curve]) -> Last:
    """Accuracy after the last epoch, by number of images, candidate and seed."""
    found: Last = {}
    for curve in curves:
        found.setdefault(curve.images, {}).setdefault(curve.name, {})[curve.seed] = curve.accuracy[max(curve.accuracy)]
    return dict(sorted(found.items()))


def table(curves: Sequence[Curve]) -> str:
    """Accuracy after the last epoch per number of images: one row per candidate, one column per seed."""
    seeds, lines = sorted({c.seed for c in curves}), []
    rates = {(c.images, c.name): c.rate for c in curves}
    width = max(len(c.name) for c in curves)
    for images, last in last_of(curves).items():
        head = "  ".join(f"seed {s:<3}" for s in seeds)
        lines.append(f"{f'{images} images, top-1 in %':{max(width, 26)}}  {head}    mean  lr-base")
        for name, values in last.items():
            cells = "  ".join(f"{values[s]:8.1f}" if s in values else " " * 8 for s in seeds)
            mean = statistics.fmean(values.values())
            lines.append(f"{name:{max(width, 26)}}  {cells}  {mean:6.1f}  {rates[images, name]:.2g}")
    return "\n".join(lines)


class Gain(NamedTuple):
    """The mean difference of two candidates in points, and its paired 95 % interval over seeds (NaN for one seed)."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def text(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:+.1f} points with one seed, which gives no interval"
        return f"{self.mean:+.1f} points, 95 % interval over {self.seeds} seeds {self.low:+.1f} to {self.high:+.1f}"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or more values, and its 95 % interval by Student's t."""
    mean, n = statistics.fmean(values), len(values)
    half = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def gain_of(values: Mapping[int, float], others: Mapping[int, float]) -> Gain | None:
    """The gain over other results of the same seeds; None if they have no seed in common."""
    gains = [value - others[seed] for seed, value in values.items() if seed in others]
    if not gains:
        return None
    if len(gains) == 1:
        return Gain(gains[0], math.nan, math.nan, 1)
    return Gain(*mean_interval(gains), len(gains))


def verdict(last: Last) -> list[str]:
    """A sentence per number of images: whether the own encoder is better than the best of the other candidates."""
    lines = []
    for images, values in last.items():
        others = {name: statistics.fmean(of.values()) for name, of in values.items() if name != OWN}
        if OWN not in values or not others:
            continue
        best = max(others, key=lambda name: others[name])
        gain = gain_of(values[OWN], values[best])
        if gain is None:
            continue
        what = "whether pretraining pays cannot be told at this size"
        if gain.low > 0 or gain.high < 0:
            what = "pretraining pays" if gain.low > 0 else "pretraining does not pay"
        lines.append(
            f"With {images} labelled images, {what}: {OWN} has {statistics.fmean(values[OWN].values()):.1f} %, "
            f"the best baseline, {best}, {others[best]:.1f} % ({gain.text})."
        )
    return lines


def pretraining_cost(encoder: str) -> str:
    """Epochs, updates and duration of the pretraining of an encoder in its run's folder; '' for others."""
    folder = Path(encoder.removeprefix("local-dir:"))
    try:
        rows = read_rows(folder.parent / "summary.csv")[0]
        epochs = [(float(str(row["train_seconds"])), float(str(row["train_images_per_s"]))) for row in rows]
        card = read_json(folder / "config.json")["training"]["table"]["Optimizer"]
        batch = int(re.search(r"for (\d+) images per update", card)[1])  # pyright: ignore[reportOptionalSubscript]
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    seconds, updates = sum(time for time, _ in epochs), sum(round(time * speed / batch) for time, speed in epochs)
    return (
        f"Pretraining took {duration(seconds)} for {len(epochs)} epochs, {updates:,} updates of {batch} images. "
        "It comes on top, once for all tasks."
    )


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draws accuracy over the number of labelled images, or over epochs if there is one, as a PNG.

    Lines are means over seeds, bands their range.
    """
    figure, last = new_figure((6.4, 4)), last_of(curves)
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(c.name for c in curves)):
        if len(last) > 1:
            points = [(images, [*of[name].values()]) for images, of in last.items() if name in of]
        else:
            own = [c.accuracy for c in curves if c.name == name]
            points = [(epoch, [of[epoch] for of in own]) for epoch in own[0] if all(epoch in of for of in own)]
        x, values = [point[0] for point in points], [point[1] for point in points]
        axes.plot(
            x, [*map(statistics.fmean, values)], "o-" if len(x) < 12 else "-", color=f"C{i}", linewidth=2, label=name
        )
        axes.fill_between(x, [*map(min, values)], [*map(max, values)], color=f"C{i}", alpha=0.2, linewidth=0)
    if len(last) > 1:
        label_counts(axes, [*last])
    xlabel = "labelled training images" if len(last) > 1 else "epoch of finetuning"
    title = "Finetuning from different weights, each at its own learning rate"
    axes.set(xlabel=xlabel, ylabel="validation top-1, %", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
