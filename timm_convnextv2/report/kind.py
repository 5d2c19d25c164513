"""What a report says of a task, and what it says of all of them: `pretraining` and `transfer` have the rest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .next_steps import Step
from .run import RunRecord

__all__ = ["COST", "COST_CHARTS", "Chart", "Kind", "batch_of", "cost_of", "device_of", "last_of"]


class Chart(NamedTuple):
    """A chart over epochs.

    Attributes:
        title: Above it.
        columns: Of summary.csv, and whether their lines are dashed.
        note: What its lines are.
        scale: Factor of the values, for shares, whose axis begins at 0; 0 for none.
        baseline: Measure of the probe whose baselines are drawn.
        dashed: What dashed lines are, in words.
    """

    title: str
    columns: dict[str, bool]
    note: str = ""
    scale: float = 0
    baseline: str = ""
    dashed: str = "held out"


class Kind(NamedTuple):
    """What differs between the tasks.

    Attributes:
        title: Of the page.
        heading: Above the names of the runs.
        model: Folder of what the run exports.
        predictions: What its images show, in a sentence or two.
        alt: The same of one image, before ", after epoch N".
        columns: Of summary.csv in the table of numbers: heading and format.
        facts: What was trained on what.
        about: The run in a line.
        numbers: How it went, in the last numbers that were measured.
        charts: What may be drawn of runs.
        findings: What the numbers say, in sentences.
        next_steps: What to do with what it exports.
    """

    title: str
    heading: str
    model: str
    predictions: str
    alt: str
    columns: dict[str, tuple[str, str]]
    facts: Callable[[RunRecord], dict[str, str]]
    about: Callable[[RunRecord], str]
    numbers: Callable[[RunRecord], dict[str, str]]
    charts: Callable[[Sequence[RunRecord]], list[Chart]]
    findings: Callable[[RunRecord], list[str]]
    next_steps: Callable[[dict[str, Any], Path], list[Step]]


# ------------------------------------------------------------------------------------------------------ of every task

COST = {
    "train_images_per_s": ("images/s", "{:.1f}"),
    "train_data_wait": ("data wait", "{:.0%}"),
    "train_memory_gib": ("memory GiB", "{:.2f}"),
    "lr": ("learning rate", "{:.2e}"),
}
COST_CHARTS = [
    Chart("Speed, images/s", {"train_images_per_s": False}, scale=1),
    Chart("Waiting for data, % of the time", {"train_data_wait": False}, "More than a few %: add data workers.", 100),
    Chart("Learning rate", {"lr": False}),
]


def cost_of(run: RunRecord) -> dict[str, str]:
    """Time, speed and memory."""
    rows = run.rows.values()
    seconds = sum(row.get("train_seconds", 0.0) for row in rows)
    speeds, waits, memory = (
        [row[name] for row in rows if name in row]
        for name in ("train_images_per_s", "train_data_wait", "train_memory_gib")
    )
    return {
        "Training time": duration(seconds) if seconds else "",
        "Speed": f"{median(speeds):.1f} images/s" if speeds else "",
        "Waiting for data": f"{100 * median(waits):.0f} % of the time" if waits else "",
        "Peak memory": f"{max(memory):.2f} GiB" if memory else "",
    }


def last_of(run: RunRecord, column: str, form: str) -> str:
    values = run.column(column)
    return form.format(values[max(values)]).replace("%", " %") if values else ""


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def batch_of(of: dict[str, Any], processes: int) -> str:
    accum = f" x {of['grad_accum_steps']} steps" if of["grad_accum_steps"] > 1 else ""
    return f"{of['batch_size']}{accum}" + (f" x {processes} processes" if processes > 1 else "")


def device_of(of: dict[str, Any]) -> str:
    return f"{of.get('device', '')}{', ' + str(of.get('amp_dtype')) if of.get('amp') else ''}"
