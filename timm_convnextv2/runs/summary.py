"""The tables of a run, `summary.csv` and `collapse.csv`; a line that a crash truncated is reported and removed."""

import csv
from pathlib import Path
from typing import Any

from ..files import read_rows, whole_file

_Row = dict[str, object]


def add_row(path: Path, epoch: int, metrics: dict[str, float], measured: dict[str, Any], lr: float) -> list[str]:
    """Adds the row of an epoch, counted from 0: `epoch`, `train_*`, `eval_*`, `lr`. Returns notes on corrupt lines."""
    train = {f"train_{name}": value for name, value in metrics.items()}
    row: _Row = {"epoch": epoch, **train, **{f"eval_{name}": value for name, value in measured.items()}, "lr": lr}
    rows, damaged = read_rows(path)
    write_rows(path, [*rows, row])
    return _notes(path, damaged)


def trim(path: Path, epoch: int) -> list[str]:
    """Removes the rows from `epoch` on, which a resumed run writes again. Returns notes on corrupt lines."""
    rows, damaged = read_rows(path)
    keep = [row for row in rows if int(str(row["epoch"])) < epoch]
    if len(keep) < len(rows) or damaged:
        write_rows(path, keep)
    return _notes(path, damaged)


def _notes(path: Path, damaged: list[str]) -> list[str]:
    return [f"{path}: a corrupt line is left out: {line!r}" for line in damaged]


def latest(path: Path) -> dict[str, tuple[int, float]]:
    """The newest number of each measure, as `{name: (epoch, number)}`; epochs count from 1."""
    found: dict[str, tuple[int, float]] = {}
    for row in read_rows(path)[0]:
        for column, value in row.items():
            if column.startswith("eval_") and value != "":
                found[column.removeprefix("eval_")] = (int(str(row["epoch"])) + 1, float(str(value)))
    return found


def write_rows(path: Path, rows: list[_Row]) -> None:
    """Writes a table with a column for each name, `epoch` first."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    groups = ("epoch", "train_", "eval_")
    names.sort(key=lambda name: next((i for i, group in enumerate(groups) if name.startswith(group)), len(groups)))
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        if rows:
            writer.writeheader()
            writer.writerows(rows)
