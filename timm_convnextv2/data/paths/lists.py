"""Lists of image files: text, CSV and Parquet."""

import csv
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..formats.errors import MissingPackageError
from ..formats.files import printable


class FileNames:
    """Names of files in one block of bytes, so that forked workers share the memory; 8 bytes per name are added."""

    def __init__(self, block: Any, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def collect(cls, names: Iterable[bytes]) -> "FileNames":
        """Collects names into one block."""
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name
            ends.append(len(block))
        return cls(block, np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.raw(i))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def raw(self, i: int) -> bytes:
        """Name `i` as bytes."""
        return bytes(self.block[self.ends[i] : self.ends[i + 1]])

    def part(self, first: int, count: int) -> "FileNames":
        """`count` names from `first` on, without a copy."""
        return FileNames(self.block, self.ends[first : first + count + 1])


PATH_COLUMNS = ("path", "file_name", "filename", "name")
WEIGHT_COLUMN = "weight"
_CHUNK = 65536


def read_list(path: str, tick: Callable[[int], Any] | None = None) -> tuple[FileNames, np.ndarray | None]:
    """The names of image files in a list, in its order, and their weights.

    - `.txt`: one name per line; empty lines are skipped.
    - `.csv`: with a line of column names; names are in the first of the columns path, file_name, filename and name,
      weights in the column weight.
    - `.parquet`: the same columns.

    Returns:
        The names; float64 weights, one per name, or None without such a column.

    Raises:
        ValueError: The list cannot be read, has no name or no column of names, or a weight is not above 0.
        MissingPackageError: (a ValueError) Parquet is not installed.
    """
    readers = {".txt": _read_text, ".csv": _read_csv, ".parquet": _read_parquet}
    shown = printable(path)
    reader = readers.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise ValueError(f"--data-list {shown}: expected a file that ends in {', '.join(readers)}.")
    weights = array("d")
    try:
        names = FileNames.collect(_checked(reader(path), shown, weights, tick))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"--data-list {shown} cannot be read: {error}") from error
    if not len(names):
        raise ValueError(f"--data-list {shown} is empty.")
    return names, np.frombuffer(weights, dtype=np.float64) if weights else None


Rows = Iterable[tuple[str, Any]]  # name and weight, `_NONE` in a list without weights


def _checked(rows: Rows, shown: str, weights: array, tick: Callable[[int], Any] | None) -> Iterator[bytes]:
    """The names as bytes; fills `weights`."""
    rows, number = iter(rows), 0
    while chunk := [*islice(rows, _CHUNK)]:
        for name, weight in chunk:
            number += 1
            if not name or "\0" in name:
                raise ValueError(f"--data-list {shown}: image {number} has {'no name' if not name else 'a NUL in it'}.")
            if weight is not _NONE:
                weights.append(_weight(weight, name, shown))
            yield os.fsencode(name)
        if tick is not None:
            tick(len(chunk))


_NONE: Any = object()


def _weight(value: Any, name: str, shown: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise ValueError(
            f"--data-list {shown}: the weight of {printable(name)} is {value!r}, expected a number above 0. Remove the "
            "row to leave an image out."
        )
    return weight


def _read_text(path: str) -> Rows:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            if name := line.removesuffix("\n").removesuffix("\r"):
                yield name, _NONE


def _read_csv(path: str) -> Rows:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        columns = next(rows, [])
        at, weighted = columns.index(_path_column(columns, path)), WEIGHT_COLUMN in columns
        weight_at = columns.index(WEIGHT_COLUMN) if weighted else 0
        for row in rows:
            if not row:
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"--data-list {printable(path)}, line {rows.line_num}: has {len(row)} cells, expected "
                    f"{len(columns)} as in the first line."
                )
            yield row[at], row[weight_at] if weighted else _NONE


def _read_parquet(path: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(
            f"--data-list {printable(path)} needs the package pyarrow: `pip install pyarrow`, or give a .csv."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [_path_column(names, path)] + [WEIGHT_COLUMN] * (WEIGHT_COLUMN in names)
            for batch in file.iter_batches(_CHUNK, columns=columns):
                found = [batch.column(column).to_pylist() for column in columns]
                texts = ("" if name is None else str(name) for name in found[0])
                yield from zip(texts, found[1] if len(found) > 1 else [_NONE] * len(batch), strict=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--data-list {printable(path)} cannot be read: {error}") from error


def _path_column(columns: list[str], path: str) -> str:
    for name in PATH_COLUMNS:
        if name in columns:
            return name
    raise ValueError(
        f"--data-list {printable(path)} has no column of names: expected one of {', '.join(PATH_COLUMNS)}, it has "
        f"{', '.join(map(printable, columns)) or 'none'}."
    )
