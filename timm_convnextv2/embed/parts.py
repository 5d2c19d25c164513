"""Finished rows of a run, in a folder beside its output: what a run that was stopped resumes from.

`OUTPUT.parts/` holds `run.json`, which says what computes the rows, and a file for each finished part of the data set.
A file appears under its name when it is complete, so a run that is killed loses the parts that it was at, no more.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

__all__ = ["Part", "Parts"]

_RUN = "run.json"
_SUFFIX = ".safetensors"


class Part(NamedTuple):
    """Some images of the data set, one after the other.

    Attributes:
        rows: float32 `[n, num_features]`.
        names: Of the rows, `[n]`.
        skipped: Images without a row: number in the data set, name, reason.
    """

    rows: np.ndarray
    names: list[str]
    skipped: list[tuple[int, str, str]]


class Parts:
    """The folder of the finished parts of a run.

    Args:
        output: The file that the run will write; the folder is beside it.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.parts")

    def finished(self) -> set[int]:
        """Numbers of the parts that are there."""
        return {int(path.stem) for path in self.folder.glob(f"[0-9]*{_SUFFIX}")}

    def claim(self, run: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Makes the folder this run's.

        Args:
            run: What decides about the rows, for JSON.
            resume: Keep the parts of a run with the same `run`.
            overwrite: Remove those of any other.

        Raises:
            ValueError: There are finished parts, and neither was asked for; or they are of another run.
        """
        run = json.loads(json.dumps(run))  # as it is read
        found = self.finished()
        if found and resume:
            before = self._run()
            differing = [key for key in run if before.get(key) != run[key]]
            if differing:
                key = differing[0]
                raise ValueError(
                    f"'{self.folder}' is of a run with another {', '.join(differing)}; {key} was {before.get(key)!r} "
                    f"and is {run[key]!r}. Give the same options to resume it, or replace it with --overwrite alone."
                )
            return
        if found and not overwrite:
            raise ValueError(
                f"'{self.folder}' holds {len(found)} finished parts of a run that was stopped. Resume it with "
                "--resume, or replace it with --overwrite."
            )
        self.remove()
        self.folder.mkdir(parents=True)
        self._write_run(run)

    def joining(self) -> bool:
        """Whether a run was stopped while it wrote the output: what is there of it may be replaced."""
        return bool(self.finished()) and bool(self._run().get("joining"))

    def mark_joining(self) -> None:
        """Notes that the output is about to be written."""
        self._write_run({**self._run(), "joining": True})

    def _run(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"'{self.folder / _RUN}' cannot be read: {e}. Replace the run with --overwrite.") from e

    def _write_run(self, run: dict[str, Any]) -> None:
        temporary = self.folder / f".{_RUN}"
        temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / _RUN)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}{_SUFFIX}"

    def write(self, number: int, part: Part) -> None:
        """Writes a finished part."""
        temporary = self.folder / f".{number:08d}.tmp"
        # JSON in ASCII: names may have bytes that are not UTF-8
        metadata = {"names": json.dumps(part.names), "skipped": json.dumps(part.skipped)}
        save_file({"rows": part.rows}, temporary, metadata=metadata)
        os.replace(temporary, self._path(number))

    def read(self, number: int) -> Part:
        """A finished part."""
        with safe_open(self._path(number), framework="np") as file:
            metadata = file.metadata()
            skipped = [(i, name, reason) for i, name, reason in json.loads(metadata["skipped"])]
            return Part(file.get_tensor("rows"), json.loads(metadata["names"]), skipped)

    def skipped(self) -> Iterator[tuple[int, str, str]]:
        """Skipped images of all finished parts, in order; see `Part`."""
        for number in sorted(self.finished()):
            yield from self.read(number).skipped

    def remove(self) -> None:
        """Removes the folder, of which nothing stays under its name at any time."""
        gone = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(gone, ignore_errors=True)  # left by a run that was killed here
        if self.folder.exists():
            os.replace(self.folder, gone)
            shutil.rmtree(gone, ignore_errors=True)
