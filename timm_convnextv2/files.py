"""Reading and writing files: written whole or not at all, read without executing anything.

A file is written as `.NAME.HOST.PID-START.TOKEN.part` in the same folder, flushed to disk and renamed; then the folder
is flushed. A crash of the process or machine leaves the old or the new file, and processes never share a part file.
"""

import argparse
import contextlib
import csv
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError


class ProcessId(NamedTuple):
    """A process on a named machine."""

    host: str  # letters, digits and hyphens
    system: str  # boot and PID namespace: distinguishes machines and containers of the same name
    pid: int
    start: str  # start time in the system's unit, which distinguishes reused numbers; '' if unknown


def this_process() -> ProcessId:
    """The calling process."""
    return ProcessId(*_machine(), os.getpid(), _start(os.getpid())[0])


def is_alive(process: ProcessId) -> bool | None:
    """Whether a process is running; None if it belongs to another machine."""
    host, system = _machine()
    if (process.host, process.system) != (host, system):
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to another user
        pass
    start, dead = _start(process.pid)
    return not dead and (start == process.start or "" in (start, process.start))


@lru_cache
def _machine() -> tuple[str, str]:
    host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node() or "localhost")[:60]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return host, f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: only the name is known
        return host, ""


def _start(pid: int) -> tuple[str, bool]:
    """Start time of a process, '' if unknown; whether it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()  # the process name before it may contain spaces and brackets
        return fields[19], fields[0] in ("Z", "X")
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():  # Linux hides processes of other users
        return "", False
    try:
        asked = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=9)
    except (OSError, subprocess.SubprocessError):
        return "", False
    state, _, start = asked.stdout.strip().partition(" ")
    return re.sub(r"\W+", "-", start.strip()), state.startswith("Z")


_LONGEST_NAME = 255  # bytes, of most file systems
_PART = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)-(?P<start>[^.]*)\.\w+\.part", re.DOTALL)
_FORMULA = re.compile(r"'*[=+@\t\r-](?![\d.]+(e[+-]?\d+)?$)", re.I)


class WriteError(OSError):
    """A file cannot be written: the disk is full, read-only or gone. Names the file and the reason."""


def new_part(path: str | os.PathLike) -> Path:
    """A name in the folder of `path` that no other process or call uses."""
    path, me = Path(path), this_process()
    ending = f".{me.host}.{me.pid}-{me.start}.{uuid.uuid4().hex[:8]}.part"
    name, most = path.name, _LONGEST_NAME - 1 - len(ending)
    if len(os.fsencode(name)) > most:
        name = os.fsencode(name)[:most].decode("utf-8", "ignore")
    return path.with_name(f".{name}{ending}")


def sync(path: str | os.PathLike) -> None:
    """Flushes a file or a folder to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not Path(path).is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name to write to; the file replaces `path` when the block ends, a `WriteError` leaves `path` as is."""
    path = Path(path)
    part = new_part(path)
    try:
        with write_errors(f"'{path}'"):
            yield part
            sync(part)
            os.replace(part, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turns errors of the system while `what`, such as a path, is written into a `WriteError`."""
    try:
        yield
    except Exception as e:
        reason = system_reason(e)
        if reason is None:
            raise
        raise WriteError(f"{what} cannot be written: {reason}.") from e


def write_json(path: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file with `whole_file`; creates its folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=indent) + ("" if indent is None else "\n"), encoding="utf-8")


def write_csv(
    path: str | os.PathLike, header: Sequence[str], rows: Iterable[Iterable[object]], errors: str = "backslashreplace"
) -> None:
    """Writes a CSV file with `whole_file`; text that looks like a formula gets an apostrophe in front.

    `errors` is for file names with bytes that are not UTF-8: 'surrogateescape' keeps them, but no other program may
    be able to read the file.
    """
    how: Any = {"encoding": "utf-8", "errors": errors, "newline": ""}
    with whole_file(path) as part, open(part, "w", **how) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"'{v}" if isinstance(v, str) and _FORMULA.match(v) else v for v in row] for row in rows)


def read_cell(text: str) -> str:
    """The text that `write_csv` wrote."""
    return text[1:] if text[:1] == "'" and _FORMULA.match(text[1:]) else text


def read_rows(path: Path) -> tuple[list[dict[str, object]], list[str]]:
    """The rows of a table whose first column is `epoch`, and its corrupt lines; both empty if there is no file."""
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "\ufffd")  # csv of Python 3.10 raises
    lines = text.splitlines(keepends=True)
    rows, damaged = [], []
    header = next(csv.reader(lines[:1]), [])
    for line in lines[1:]:
        cells = next(csv.reader([line]), []) if len(line) < csv.field_size_limit() else []  # else csv raises
        if cells == header:  # timm's train.py repeats it in a resumed run
            continue
        if line.endswith("\n") and len(cells) == len(header) and header[:1] == ["epoch"] and cells[0].isdecimal():
            rows.append(dict(zip(header, cells, strict=True)))
        elif line.strip():
            damaged.append(line.strip())
    return rows, damaged


def save_torch(content: Any, path: str | os.PathLike) -> None:
    """`torch.save` with `whole_file`."""
    # a Python file object reports the system's error; torch's own file only reports 'unexpected pos'
    with whole_file(path) as part, open(part, "wb") as file:
        torch.save(content, file)


def system_reason(error: BaseException) -> str | None:
    """The system's message about a file, such as 'No space left on device'; None for other errors."""
    if not isinstance(error, OSError | RuntimeError | SafetensorError):
        return None
    seen: BaseException | None = error
    while seen is not None:  # torch and safetensors wrap the system's error
        if isinstance(seen, WriteError):
            return str(seen)
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        if isinstance(seen, SafetensorError) and (said := re.search(r"I/O error: (.*?)(?: \(os error|$)", str(seen))):
            return said[1]
        seen = seen.__cause__ or seen.__context__
    return None


def has_mark(path: str | os.PathLike, marks: Sequence[str]) -> bool:
    """Whether a file begins with the mark of a command's own output."""
    try:
        with open(path, "rb") as file:
            head = file.read(2000)
    except OSError:
        return False
    return any(mark.encode() in head for mark in marks)


def claim_folder(
    output: str | os.PathLike,
    names: Sequence[str] = (),
    *,
    overwrite: bool,
    flag: str = "--overwrite",
    marks: Sequence[str] = (),
) -> Path:
    """Creates the folder of --output; a ValueError if it is a file, or holds files that must not be replaced.

    A folder that cannot be written is a `WriteError`. Part files that dead processes left there are removed. `names`
    are the files that will be written; if empty, any file in the folder is in the way. A file is replaced with
    `overwrite`, which the option `flag` sets ('' if there is none), or if it has one of the `marks`, see `has_mark`.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file, expected a folder.")
    remove_leftovers(folder, ["*"])
    found = [name for name in names if (folder / name).exists() and not has_mark(folder / name, marks)]
    if not overwrite and (found or (not names and folder.is_dir() and any(folder.iterdir()))):
        what = f"already has {', '.join(found)}" if found else "is not empty"
        raise ValueError(
            f"--output '{folder}' {what}. {f'Pass {flag}, or choose' if flag else 'Choose'} another folder."
        )
    _try_to_write(folder)
    return folder


def check_free(
    path: str | os.PathLike, *, overwrite: bool, flag: str = "--overwrite", marks: Sequence[str] = ()
) -> Path:
    """The path of a file to write; a ValueError if it is a folder, or exists and must not be replaced.

    A file with one of the `marks` is replaced, see `has_mark`. The folder is created; if it cannot be written, that is
    a `WriteError`. Part files that dead processes left of this file are removed.
    """
    path, remedy = Path(path), f"Pass {flag}, or choose" if flag else "Choose"
    if path.is_dir():
        raise ValueError(f"--output '{path}' is a folder, expected a file.")
    if path.exists() and not overwrite and not has_mark(path, marks):
        raise ValueError(f"--output '{path}' exists. {remedy} another --output.")
    remove_leftovers(path.parent, [path.name])
    _try_to_write(path.parent)
    return path


def _try_to_write(folder: Path) -> None:
    """Creates a folder and a file in it: a command must not find out after hours that it cannot write."""
    part = new_part(folder / "test")
    with write_errors(f"--output: the folder '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()


def remove_leftovers(folder: str | os.PathLike, names: Sequence[str], *, alone: bool = False) -> list[Path]:
    """Removes and returns the part files (or folders) that dead processes left while they wrote `names` (patterns).

    `alone`: this process holds the lock, so that part files of other machines are removed as well.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*.part")):
        found = _PART.fullmatch(path.name)
        if not found or not any(Path(found["name"]).match(name) for name in names):
            continue
        here = this_process()
        same = found["host"] == here.host
        alive = is_alive(ProcessId(found["host"], here.system, int(found["pid"]), found["start"])) if same else None
        if alive or (alive is None and not alone):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, in another format, or asks for code. Names the file."""


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a PyTorch or safetensors file to the CPU; nothing in it is ever executed.

    The checksums in a file of `torch.save` are verified first. Safetensors and PyTorch before 1.6 write no checksums:
    only a broken structure is detected there.

    Args:
        path: `*.safetensors`, or a file of `torch.save` with tensors, plain data and, as timm writes it, a Namespace.

    Raises:
        CheckpointError: (the only error) The file is missing, corrupt or in another format, its pickle asks for code,
            or it does not contain a dictionary.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"Checkpoint '{path}' {what}.")
    try:
        content = _read(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as e:
        wanted = re.search(r"(?:GLOBAL|global:) (?!GLOBAL)([\w.]+)", str(e))
        what = (
            f"was refused and not executed: it asks for code, {wanted[1]}. Save the state dict alone, as safetensors."
            if wanted
            else "was not read: it is corrupt, or not a file of torch.save. Nothing in it was executed."
        )
        raise CheckpointError(f"Checkpoint '{path}' {what}") from e
    except Exception as e:  # arbitrary bytes: whatever error a reader raises, the file is at fault
        raise CheckpointError(
            f"Checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or in another format. "
            f"Copy or download it again. ({type(e).__name__}: {str(e).partition('. ')[0]})"
        ) from e
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Checkpoint '{path}' holds a {type(content).__name__}, expected a dictionary of weights."
        )
    return content


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path, device="cpu")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"Checkpoint '{path}' ({path.stat().st_size} bytes) is corrupt: its part '{damaged}' has another "
                "checksum. Copy or download it again."
            )
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
