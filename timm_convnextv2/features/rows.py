"""The files that `embed` writes: rows with their names, and the table of skipped images."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..config import read_json
from ..data import MissingPackageError
from ..files import check_free, sync, whole_file, write_csv, write_json
from ..runs.lock import LOCK, Lock
from .extract import Embedded

_RUN = "run.json"
SUFFIXES = (".npy", ".safetensors", ".parquet")


class Parts:
    """The folder of the finished parts of a run, beside the file `output` that the run will write."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.parts")
        self.lock: Lock | None = None  # of the process that lists and joins the parts

    def finished(self) -> set[int]:
        return {int(path.stem) for path in self.folder.glob("[0-9]*.safetensors")}

    def claim(self, run: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Reserves the folder for this process and the run whose rows depend on the JSON values `run`.

        `resume` keeps the finished parts, whose `run` must be equal; `overwrite` removes them. With neither flag,
        finished parts are a `ValueError`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.folder)
        # another process may have finished since the first check
        check_output(self.output, overwrite=overwrite or resume and self.joining())
        run = json.loads(json.dumps(run))  # tuples become lists, as in the file
        found = self.finished()
        if found and resume:
            before = self._run()
            if differing := [key for key in run if before.get(key) != run[key]]:
                key = differing[0]
                changed = f"{key} was {before.get(key)!r} and is {run[key]!r}"
                raise ValueError(
                    f"'{self.folder}' belongs to a run with another {', '.join(differing)}; {changed}. Resume with the "
                    "same options, or replace it with --overwrite alone."
                )
            return
        if found and not overwrite:
            what = f"'{self.folder}' holds {len(found)} finished parts of a stopped run"
            raise ValueError(f"{what}. Resume it with --resume, or replace it with --overwrite.")
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        self._write_run(run)

    def close(self) -> None:
        """Lets other processes claim the folder, which disappears if it is empty."""
        if self.lock is not None:
            self.lock.release()
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def drop_corrupt(self) -> int:
        """Removes parts that a crash or the disk has damaged, so that they are computed again; returns their number."""
        corrupt = [number for number in self.finished() if self._content(number) is None]
        for number in corrupt:
            self._path(number).unlink()
        return len(corrupt)

    def joining(self) -> bool:
        """True if a run was stopped while it wrote the output, whose files may then be replaced."""
        return bool(self.finished()) and bool(self._run().get("joining"))

    def mark_joining(self) -> None:
        self._write_run({**self._run(), "joining": True})

    def _run(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / _RUN)
        except (OSError, ValueError) as e:
            raise ValueError(f"'{self.folder / _RUN}' cannot be read: {e}. Replace the run with --overwrite.") from e

    def _write_run(self, run: dict[str, Any]) -> None:
        write_json(self.folder / _RUN, run, indent=2)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def write(self, number: int, part: Embedded) -> None:
        # JSON in ASCII, because names may contain bytes that are not UTF-8
        metadata = {"names": json.dumps(part.names), "skipped": json.dumps(part.skipped)}
        metadata["sha256"] = _checksum(part.rows, metadata)
        with whole_file(self._path(number)) as temporary:
            save_file({"rows": part.rows}, temporary, metadata=metadata)

    def read(self, number: int) -> Embedded:
        if (part := self._content(number)) is None:
            raise ValueError(f"'{self._path(number)}' is corrupt. Run the command again with --resume.")
        return part

    def _content(self, number: int) -> Embedded | None:
        """A part; None if it is corrupt."""
        try:
            with safe_open(self._path(number), framework="np") as file:
                rows, metadata = file.get_tensor("rows"), dict(file.metadata())
            if metadata.pop("sha256") != _checksum(rows, metadata):
                return None
            names, skipped = (json.loads(metadata[key]) for key in ("names", "skipped"))
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None
        return Embedded(rows, names, [tuple(one) for one in skipped])

    def skipped(self) -> Iterator[tuple[int, str, str]]:
        for number in sorted(self.finished()):
            yield from self.read(number).skipped

    def remove(self) -> None:
        """Removes the folder: it disappears at once, so that a crash leaves no half of it."""
        gone = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(gone, ignore_errors=True)  # left by a run that was killed here
        if self.folder.exists():
            os.replace(self.folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _checksum(rows: np.ndarray, metadata: dict[str, str]) -> str:
    sha = hashlib.sha256(np.ascontiguousarray(rows).data)
    sha.update(json.dumps(metadata, sort_keys=True).encode())
    return sha.hexdigest()


def paths_beside(output: Path) -> tuple[Path | None, Path]:
    """Paths of the table of names (None for Parquet, which contains them) and of the skipped images."""
    names = None if output.suffix == ".parquet" else output.with_name(f"{output.name}.csv")
    return names, output.with_name(f"{output.name}.skipped.csv")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses an output that cannot or must not be written."""
    if output.suffix not in SUFFIXES or output.is_dir():
        endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ValueError(f"The output is '{output}', expected a file whose name ends in {endings}.")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingPackageError("Writing .parquet needs the package pyarrow: run `pip install pyarrow`.")
    for file in filter(None, (output, paths_beside(output)[0])):
        check_free(file, overwrite=overwrite)


def write_output(output: Path, parts: Parts, numbers: Sequence[int]) -> tuple[int, dict[int, str]]:
    """Joins the parts `numbers` to the output and its tables, which appear once all of them are complete.

    Returns the number of rows, and the reasons of the skipped images by index.
    """
    names, table = paths_beside(output)
    skipped = [entry for number in numbers for entry in parts.read(number).skipped]
    shapes = [parts.read(number).rows.shape for number in numbers]
    shape = sum(rows for rows, _ in shapes), max(features for _, features in shapes)

    def blocks() -> Iterator[Embedded]:
        return (part for part in map(parts.read, numbers) if len(part.rows))

    new = {output: parts.folder / f"output{output.suffix}"}
    write = {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[output.suffix]
    with whole_file(new[output]) as temporary:
        write(temporary, shape, blocks())
    if names:
        new[names] = parts.folder / "names.csv"
        write_csv(new[names], ("file",), ((name,) for part in blocks() for name in part.names))
    if skipped:
        new[table] = parts.folder / "skipped.csv"
        write_csv(new[table], ("file", "reason"), ((name, reason) for _, name, reason in skipped))

    parts.mark_joining()
    for file in filter(None, (output, names, table)):  # a crash must never leave an old file beside a new one
        file.unlink(missing_ok=True)
    for file, complete in reversed(new.items()):
        os.replace(complete, file)
    sync(output.parent)
    parts.remove()
    return shape[0], {i: reason for i, _, reason in skipped}


def _write_rows(path: Path, header: bytes, blocks: Iterable[Embedded]) -> None:
    """Writes a header and the numbers; the libraries of both formats would need all rows in memory."""
    with open(path, "wb") as file:
        file.write(header)
        for part in blocks:
            part.rows.astype("<f4", copy=False).tofile(file)


def _write_npy(path: Path, shape: tuple[int, int], blocks: Iterable[Embedded]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    _write_rows(path, header.getvalue(), blocks)


def _write_safetensors(path: Path, shape: tuple[int, int], blocks: Iterable[Embedded]) -> None:
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    _write_rows(path, len(header).to_bytes(8, "little") + header, blocks)


def _write_parquet(path: Path, shape: tuple[int, int], blocks: Iterable[Embedded]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("file", pa.string()), ("embedding", pa.list_(pa.float32(), shape[1]))])
    with parquet.ParquetWriter(path, schema) as writer:
        for part in blocks:
            names = [name.encode("utf-8", "backslashreplace").decode() for name in part.names]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(part.rows.reshape(-1)), shape[1])
            writer.write_table(pa.table([pa.array(names, pa.string()), rows], schema=schema))
