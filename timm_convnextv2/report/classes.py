"""Results per class, kept as `classes.json` in a run's folder: which classes the model knows, and its mistakes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import read_json
from ..files import write_json

FILE = "classes.json"
MAX_CONFUSION = 20  # classes of a matrix that is kept


class ClassResult(NamedTuple):
    """A class on the validation images."""

    name: str
    count: int  # of its images, objects or pixels
    value: float | None  # the measure, 0 to 1; None if nothing was to be found
    mistake: str = ""  # the most frequent wrong prediction, with its share
    precision: list[float] | None = None  # at equally spaced recalls from 0 to 1, of a detector at IoU 0.5


class ClassResults(NamedTuple):
    """All classes; `measure` and `unit` (of the counts) are words for a table."""

    measure: str
    unit: str
    classes: list[ClassResult]
    confusion: list[list[int]] | None = None  # counts [true class][predicted class] of few classes


def of_confusion(
    measure: str, unit: str, counts: Tensor, names: Sequence[str], values: Sequence[float | None]
) -> ClassResults:
    """Classes with their most frequent mistake, from counts `[true class, predicted class]`."""
    found = []
    for i, (name, row, value) in enumerate(zip(names, counts.tolist(), values, strict=True)):
        total, wrong = sum(row), [*row[:i], 0, *row[i + 1 :]]
        most = max(range(len(wrong)), key=wrong.__getitem__)
        mistake = f"{names[most]} ({100 * wrong[most] / total:.0f} %)" if wrong[most] else ""
        found.append(ClassResult(name, total, value, mistake))
    return ClassResults(measure, unit, found, counts.tolist() if len(found) <= MAX_CONFUSION else None)


def write_classes(folder: Path, results: ClassResults) -> None:
    """Writes them as JSON."""
    rows = [result._asdict() for result in results.classes]
    write_json(folder / FILE, results._asdict() | {"classes": rows})


def read_classes(folder: Path) -> ClassResults | None:
    """What `write_classes` wrote; None if there is no file, and a `ValueError` if it holds something else."""
    try:
        content = read_json(folder / FILE)
    except FileNotFoundError:
        return None
    try:
        rows = [ClassResult(**row) for row in content["classes"]]
        results = ClassResults(content["measure"], content["unit"], rows, content["confusion"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"it does not hold results per class ({type(e).__name__})") from e
    texts = (results.measure, results.unit, *(text for row in rows for text in (row.name, row.mistake)))
    if not all(isinstance(text, str) for text in texts) or not all(map(_has_numbers, rows)):
        raise ValueError("it does not hold results per class")
    if (counts := results.confusion) is not None and not _square(counts, len(rows)):
        raise ValueError("its confusion is not a square of counts")
    return results


def _square(counts: Any, size: int) -> bool:
    rows = [counts, *counts] if isinstance(counts, list) else [None]
    whole = all(isinstance(row, list) and len(row) == size for row in rows)
    return whole and all(type(n) is int and n >= 0 for row in counts for n in row)


def _has_numbers(row: ClassResult) -> bool:
    curve: Any = [] if row.precision is None else row.precision
    shares: Any = [row.value, *curve] if isinstance(curve, list) else ["no list"]
    return type(row.count) is int and all(v is None or type(v) in (int, float) and 0 <= v <= 1 for v in shares)
