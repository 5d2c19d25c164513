"""Files that appear under their name whole or not at all, and what a process that was killed left of them.

A file is written under a name of its own beside its place, `.NAME.HOST.PID-START.TOKEN.part`, brought to the disk, and
renamed; then its folder is brought to the disk. So a crash of the process or of the machine leaves the old file or the
new one, and two processes never write to the same file.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .host import ProcessId, is_alive, this_process

__all__ = ["WriteError", "new_part", "system_reason", "remove_leftovers", "save_torch", "sync", "whole_file"]

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
