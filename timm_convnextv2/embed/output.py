"""The files that embedding writes: the rows with their names, and the images that have none."""

import csv
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ..data import MissingPackageError
from .parts import Part, Parts

__all__ = ["SUFFIXES", "check_output", "write_output"]

SUFFIXES = (".npy", ".safetensors", ".parquet")


def _beside(output: Path) -> tuple[Path | None, Path]:
    """Table of the names (Parquet has them within), table of the skipped images."""
    names = None if output.suffix == ".parquet" else output.with_name(f"{output.name}.csv")
    return names, output.with_name(f"{output.name}.skipped.csv")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses an output that cannot or must not be written, before any work.

    Raises:
        ValueError: Another suffix than `SUFFIXES`, a folder, or something that exists.
        MissingPackageError: (a ValueError) `.parquet` without the package pyarrow.
    """
    if output.suffix not in SUFFIXES or output.is_dir():
        raise ValueError(
            f"The output is '{output}', expected a file whose name ends in "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
        )
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingPackageError("Writing .parquet needs the package pyarrow: run `pip install pyarrow`.")
    names, _ = _beside(output)
    if not overwrite and (output.exists() or (names and names.exists())):
        what, which = (f"'{output}' or its .csv exists", "both") if names else (f"'{output}' exists", "it")
        raise ValueError(f"{what}. Choose another --output, or replace {which} with --overwrite.")


def write_output(output: Path, parts: Parts, numbers: Sequence[int]) -> tuple[int, dict[int, str]]:
    """Joins finished parts to the output and its tables, which appear when all of them are complete.

    Args:
        output: The file; what is there goes.
        parts: Where the parts are, and new files until they are complete.
        numbers: The parts, in order.

    Returns:
        Number of rows; the reasons of the skipped images by their number.
    """
    names, table = _beside(output)
    skipped = [entry for number in numbers for entry in parts.read(number).skipped]
    shape = _shape(parts, numbers)

    def blocks() -> Iterator[Part]:
        return (part for part in map(parts.read, numbers) if len(part.rows))

    new = {output: parts.folder / f"output{output.suffix}"}
    {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[output.suffix](
        new[output], shape, blocks()
    )
    if names:
        new[names] = parts.folder / "names.csv"
        _write_csv(new[names], ("file",), ((name,) for part in blocks() for name in part.names))
    if skipped:
        new[table] = parts.folder / "skipped.csv"
        _write_csv(new[table], ("file", "reason"), ((name, reason) for _, name, reason in skipped))

    parts.mark_joining()
    for file in (output, names, table):  # nothing old beside something new, whenever this is cut off
        if file:
            file.unlink(missing_ok=True)
    for file, complete in reversed(new.items()):
        os.replace(complete, file)
    parts.remove()
    return shape[0], {i: reason for i, _, reason in skipped}


def _shape(parts: Parts, numbers: Sequence[int]) -> tuple[int, int]:
    shapes = [parts.read(number).rows.shape for number in numbers]
    return sum(rows for rows, _ in shapes), max(features for _, features in shapes)


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    # file names may have bytes that are not UTF-8
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(chain([header], rows))


def _write_rows(path: Path, header: bytes, blocks: Iterable[Part]) -> None:
    """Both formats are a header and the numbers; their own writers want all of them in memory."""
    with open(path, "wb") as file:
        file.write(header)
        for part in blocks:
            part.rows.astype("<f4", copy=False).tofile(file)


def _write_npy(path: Path, shape: tuple[int, int], blocks: Iterable[Part]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    _write_rows(path, header.getvalue(), blocks)


def _write_safetensors(path: Path, shape: tuple[int, int], blocks: Iterable[Part]) -> None:
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    _write_rows(path, len(header).to_bytes(8, "little") + header, blocks)


def _write_parquet(path: Path, shape: tuple[int, int], blocks: Iterable[Part]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("file", pa.string()), ("embedding", pa.list_(pa.float32(), shape[1]))])
    with parquet.ParquetWriter(path, schema) as writer:
        for part in blocks:
            names = [name.encode("utf-8", "backslashreplace").decode() for name in part.names]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(part.rows.reshape(-1)), shape[1])
            writer.write_table(pa.table([pa.array(names, pa.string()), rows], schema=schema))
