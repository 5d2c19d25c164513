"""Files that appear under their name whole or not at all, and what a process that was killed left of them.

A file is written under a name of its own beside its place, `.NAME.HOST.PID-START.TOKEN.part`, brought to the disk, and
renamed; then its folder is brought to the disk. So a crash of the process or of the machine leaves the old file or the
new one, and two processes never write to the same file.
"""

import argparse
import contextlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError


class ProcessId(NamedTuple):
    """A process of some machine.

    Attributes:
        host: The machine's name; letters, digits and hyphens.
        system: Tells apart what has the same name: the boot of the machine and the container's own numbering.
        pid: The number.
        start: When it started, in the system's own count; a number that is used again has another. '' where unknown.
    """

    host: str
    system: str
    pid: int
    start: str


def this_process() -> ProcessId:
    """The process that calls."""
    return ProcessId(*_machine(), os.getpid(), _start(os.getpid())[0])


def is_alive(process: ProcessId) -> bool | None:
    """Whether a process still runs; None where it is of another machine, so that this one cannot know."""
    host, system = _machine()
    if (process.host, process.system) != (host, system):
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, and there
        pass
    start, dead = _start(process.pid)
    return not dead and (start == process.start or "" in (start, process.start))


@lru_cache
def _machine() -> tuple[str, str]:
    host = re.sub(r"[^A-Za-z0-9-]", "-", platform.node() or "localhost")[:60]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return host, f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux: the name has to do
        return host, ""


def _start(pid: int) -> tuple[str, bool]:
    """When a process started, '' where unknown; whether it has ended and only its parent does not know yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()  # the name before it may hold anything
        return fields[19], fields[0] in ("Z", "X")
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():  # Linux, which hides it
        return "", False
    try:
        asked = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=9)
    except (OSError, subprocess.SubprocessError):
        return "", False
    state, _, start = asked.stdout.strip().partition(" ")
    return re.sub(r"\W+", "-", start.strip()), state.startswith("Z")


_PART = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)-(?P<start>[^.]*)\.\w+\.part")


class WriteError(OSError):
    """A file cannot be written: the disk is full, read-only or gone. Names the file and the reason."""


def new_part(path: str | os.PathLike) -> Path:
    """A name beside `path` that no other process and no other call uses."""
    path, me = Path(path), this_process()
    return path.with_name(f".{path.name}.{me.host}.{me.pid}-{me.start}.{uuid.uuid4().hex[:8]}.part")


def sync(path: str | os.PathLike) -> None:
    """Brings a file or a folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not Path(path).is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """The name to write to instead of `path`; at the end of the block that file takes its place.

    Raises:
        WriteError: It cannot be written. What was there stays, nothing new is left.
    """
    path = Path(path)
    part = new_part(path)
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except Exception as e:
        reason = system_reason(e)
        if reason is None:
            raise
        raise WriteError(f"'{path}' cannot be written: {reason}.") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file, whole or not at all; its folder is made if needed.

    Raises:
        WriteError: See `whole_file`.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=indent) + ("" if indent is None else "\n"), encoding="utf-8")


def save_torch(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        WriteError: See `whole_file`.
    """
    # into a file of Python's, whose errors say what is wrong; of its own file torch only says 'unexpected pos'
    with whole_file(path) as part, open(part, "wb") as file:
        torch.save(content, file)


def system_reason(error: BaseException) -> str | None:
    """What the system said about a file, such as 'No space left on device'; None for an error of another kind."""
    if not isinstance(error, OSError | RuntimeError | SafetensorError):
        return None
    seen: BaseException | None = error
    while seen is not None:  # torch and safetensors wrap it
        if isinstance(seen, WriteError):
            return str(seen)
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        if isinstance(seen, SafetensorError) and (said := re.search(r"I/O error: (.*?)(?: \(os error|$)", str(seen))):
            return said[1]
        seen = seen.__cause__ or seen.__context__
    return None


def claim_folder(output: str | os.PathLike, names: Sequence[str] = (), *, overwrite: bool) -> Path:
    """Makes the folder of --output, unless it holds files that would be replaced without --overwrite.

    Args:
        output: The folder.
        names: Files that will be written; none if any file in the folder is in the way.
        overwrite: Existing files may be replaced.

    Raises:
        ValueError: It is a file, or holds such files.
        OSError: It cannot be made.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file, expected a folder.")
    found = [name for name in names if (folder / name).exists()]
    if not overwrite and (found or (not names and folder.is_dir() and any(folder.iterdir()))):
        what = f"already has {', '.join(found)}" if found else "is not empty"
        raise ValueError(f"--output '{folder}' {what}. Pass --overwrite, or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_free(path: str | os.PathLike, *, overwrite: bool) -> Path:
    """The path of a file to write, which does not exist or may be replaced.

    Raises:
        ValueError: It exists, and --overwrite was not given.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"--output '{path}' exists. Pass --overwrite, or choose another --output.")
    return path


def remove_leftovers(folder: str | os.PathLike, names: Sequence[str], *, alone: bool = False) -> list[Path]:
    """Removes what processes that are dead left of files (or folders) that they were writing.

    Args:
        folder: Where they were written.
        names: The files that they were to become, as patterns.
        alone: Nobody on another machine writes there, because this process holds the lock: what they left goes too.

    Returns:
        What was removed.
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
    """A file of weights that is missing, damaged, foreign, asks for code, or holds something else. Names the file."""


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a PyTorch or safetensors file to the CPU; nothing in it is ever executed.

    The checksums of a file of `torch.save` are compared first: a bit that flipped on a disk or in a copy is found.
    Safetensors, and what PyTorch before 1.6 wrote, have no checksums: there only the structure can tell.

    Args:
        path: `*.safetensors`, or a file of `torch.save`, which may hold tensors, plain data and an
            `argparse.Namespace` (as training checkpoints of timm and of the official code do).

    Raises:
        CheckpointError: (a ValueError, and the only error) No such file, a truncated, damaged or foreign file, one
            whose pickle asks for code, or one that does not hold a dictionary. Names the file.
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
        if wanted:
            raise CheckpointError(
                f"Checkpoint '{path}' was refused and not executed: besides tensors and plain data it asks for code, "
                f"{wanted[1]}. Save the state dict alone, best as safetensors."
            ) from e
        raise CheckpointError(
            f"Checkpoint '{path}' was not read: it is damaged, or not a file of torch.save. Nothing in it was executed."
        ) from e
    except Exception as e:  # bytes that say anything: whatever the readers make of them, the file is at fault
        raise CheckpointError(
            f"Checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or in another format. "
            f"Copy or download it again. ({type(e).__name__}: {str(e).partition('. ')[0]})"
        ) from e
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Checkpoint '{path}' holds a {type(content).__name__}; a dictionary of weights was expected."
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
                f"Checkpoint '{path}' ({path.stat().st_size} bytes) is damaged: the checksum of its part '{damaged}' "
                "is wrong. Copy or download it again."
            )
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
