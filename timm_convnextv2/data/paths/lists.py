"""Names of image files, and lists that hold them: text, CSV and Parquet."""

import codecs
import csv
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np

from ..formats.errors import MissingPackageError
from ..formats.files import printable

PATH_COLUMNS = ("path", "file_name", "filename", "name")
WEIGHT_COLUMN = "weight"
_TICK = 4096
_CHUNK = 65536

Tick = Callable[[int], Any]  # receives the number of files that were just found or checked


class FileNames:
    """Names of files in one block of bytes, so that forked workers share the memory; 8 bytes per name are added."""

    def __init__(self, block: Any = b"", ends: np.ndarray | None = None) -> None:
        self.block, self.ends = block, np.zeros(1, np.int64) if ends is None else ends

    @classmethod
    def collect(cls, names: Iterable[bytes], tick: Tick = lambda count: None) -> "FileNames":
        """Collects names into one block."""
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name
            ends.append(len(block))
            if len(ends) % _TICK == 1:
                tick(_TICK)
        tick((len(ends) - 1) % _TICK)
        return cls(block, np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(bytes(self.block[self.ends[i] : self.ends[i + 1]]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


Rows = Iterator[tuple]  # the name, and the weight if the list has weights


def read_list(path: str, tick: Tick = lambda count: None) -> tuple[FileNames, np.ndarray | None]:
    """The names of image files in a list, in its order, and their float64 weights, None in a list without weights.

    `.txt` has one name per line; empty lines are skipped. `.csv`, with a line of column names, and `.parquet` have
    names in the first of the columns path, file_name, filename and name, and weights in the column weight.

    Raises:
        ValueError: The list cannot be read, has no name or no column of names, or a weight is not above 0.
        MissingPackageError: (a ValueError) Parquet is not installed.
    """
    shown, weights = f"--data-list {printable(path)}", array("d")

    def checked() -> Iterator[bytes]:
        for number, (name, *weight) in enumerate(rows_of_list(path), 1):
            if not name or "\0" in name:
                wrong = "a NUL in its name (UTF-16? save the list as UTF-8)" if name else "no name"
                raise ValueError(f"{shown}: image {number} has {wrong}.")
            if weight:
                weights.append(_weight(weight[0], name, shown))
            yield os.fsencode(name)

    try:
        names = FileNames.collect(checked(), tick)
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{shown} cannot be read: {error}") from error
    if not len(names):
        raise ValueError(f"{shown} is empty.")
    return names, np.frombuffer(weights, dtype=np.float64) if weights else None


def open_text(path: str | os.PathLike, newline: str | None = None, errors: str = "strict") -> IO[str]:
    """Opens a text file: UTF-8 with or without a mark, or UTF-16 with one, as some shells write a redirect."""
    with open(path, "rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    how: Any = {"encoding": "utf-16"} if marked else {"encoding": "utf-8-sig", "errors": errors}
    return open(path, newline=newline, **how)


def rows_of_list(path: str) -> Rows:
    """The rows of a list, read as they are needed."""
    readers = {".txt": _read_text, ".csv": _read_csv, ".parquet": _read_parquet}
    shown = f"--data-list {printable(path)}"
    reader = readers.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise ValueError(f"{shown}: expected a file that ends in {', '.join(readers)}.")
    return reader(path, shown)


def _weight(value: Any, name: str, shown: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise ValueError(
            f"{shown}: the weight of {printable(name)} is {value!r}, expected a number above 0 (to leave an image out, "
            "remove its row)."
        )
    return weight


def _read_text(path: str, shown: str) -> Rows:
    with open_text(path, "\n", "surrogateescape") as file:
        for line in file:
            if name := line.removesuffix("\n").removesuffix("\r"):
                yield (name,)


def _read_csv(path: str, shown: str) -> Rows:
    with open_text(path, "", "surrogateescape") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        at = [header.index(column) for column in _columns(header, shown)]
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{shown}, line {rows.line_num}: has {len(row)} cells, expected {len(header)} as in the first line."
                )
            if row:
                yield tuple(row[i] for i in at)


def _read_parquet(path: str, shown: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(f"{shown} needs pyarrow: `pip install pyarrow`, or give a .csv.") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, shown)
            for batch in file.iter_batches(_CHUNK, columns=columns):
                names, *weights = (batch.column(column).to_pylist() for column in columns)
                yield from zip(("" if name is None else str(name) for name in names), *weights, strict=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shown} cannot be read: {error}") from error


def _columns(header: list[str], shown: str) -> list[str]:
    """The column of names, and that of weights if there is one."""
    found = [name for name in PATH_COLUMNS if name in header][:1]
    if not found:
        raise ValueError(
            f"{shown} has no column of names: expected one of {', '.join(PATH_COLUMNS)}, it has "
            f"{', '.join(map(printable, header)) or 'none'}."
        )
    return found + [WEIGHT_COLUMN] * (WEIGHT_COLUMN in header)
