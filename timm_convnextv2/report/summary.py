"""Reading the tables that a run writes, `summary.csv` and `collapse.csv`, also where a crash tore a line."""

import csv
from pathlib import Path

__all__ = ["read_rows"]


def read_rows(path: Path) -> tuple[list[dict[str, object]], list[str]]:
    """The rows of a table whose first column is `epoch`, and the lines that are none; nothing where there is no file.

    Raises:
        OSError: It cannot be read.
    """
    if not path.exists():
        return [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows, damaged = [], []
    header = next(csv.reader(lines[:1]), [])
    for line in lines[1:]:
        cells = next(csv.reader([line]), [])
        if cells == header:  # of a run that was resumed by an earlier version
            continue
        whole = line.endswith("\n") and len(cells) == len(header) and header[:1] == ["epoch"] and cells[0].isdecimal()
        if whole:
            rows.append(dict(zip(header, cells, strict=True)))
        elif line.strip():
            damaged.append(line.strip())
    return rows, damaged
