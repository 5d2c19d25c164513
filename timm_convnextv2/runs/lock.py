"""The lock of a run's folder: one process at a time writes there.

The lock is the file `.lock`, which says who holds it. It does not rely on locks of the system, which network file
systems may ignore, but on two things that they keep: a hard link (or, where there are none, an exclusive creation)
succeeds for one process only, and so does a rename. The holder touches the file every 30 seconds. It is free again

- when the holder gives it back: at the end, after an error, at the exit of the interpreter;
- when the holder is dead, on this machine: no process has its number and its start time;
- when it was not touched for five minutes, where the holder is on another machine, or on this one before a restart.
  Both times are taken from the file system, so the clocks of the machines need not agree.

A holder that comes back after such a pause finds the lock gone before it writes, and stops.
"""

import contextlib
import json
import os
import shlex
import sys
import threading
import uuid
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from ..files import ProcessId, is_alive, new_part, this_process

LOCK = ".lock"
BEAT = 30.0  # seconds between signs of life
STALE = 300.0  # without one, a holder that cannot be asked is dead

_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class LockLostError(Exception):
    """Another process took the folder over."""


class Lock:
    """The lock of a folder, held from now on.

    Args:
        folder: It exists.

    Raises:
        ValueError: Another process holds it; says which and since when.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._token = folder / LOCK, uuid.uuid4().hex
        _take(self.path, self._token)
        self._stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(self.path, self._token, self._stop), daemon=True)
        # runs when nobody refers to the lock any more, and at the exit of the interpreter
        self._finish = weakref.finalize(self, _give_back, self.path, self._token, self._stop, os.getpid())
        thread.start()
        _held.add(self)

    def check(self) -> None:
        """Raises `LockLostError` where the lock is another's by now."""
        holder = _read(self.path)
        if holder is None or holder.get("token") != self._token:
            who = f"is held by {_name(holder)}" if holder else "is gone"
            raise LockLostError(f"The lock '{self.path}' {who}: this process had given no sign of life for too long.")

    def release(self) -> None:
        """Gives it back; once is enough."""
        self._finish()


def release_locks() -> None:
    """Gives back all locks of this process."""
    for lock in list(_held):
        lock.release()


def refuse_locked(folder: Path) -> None:
    """Raises a `ValueError` where a process that lives holds the folder."""
    path = folder / LOCK
    holder = _read(path)
    if holder is not None and not _is_free(path, holder):
        raise ValueError(_refusal(path, holder))


def _take(path: Path, token: str) -> None:
    holder = _read(path)
    if holder is not None:
        if not _is_free(path, holder):
            raise ValueError(_refusal(path, holder))
        _remove(path, holder.get("token"))
    me = this_process()
    words = ["python", *sys.orig_argv[1:]]
    text = json.dumps(
        {**me._asdict(), "command": shlex.join(words), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "token": token}
    )
    part = new_part(path)
    try:
        part.write_text(text)
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(path, "x") as file:
                file.write(text)
    except FileExistsError:
        raise ValueError(_refusal(path, _read(path) or {})) from None
    finally:
        part.unlink(missing_ok=True)


def _remove(path: Path, token: Any) -> None:
    """Removes a lock that is free, and none that another process took in between: a rename succeeds for one only."""
    aside = new_part(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        found = _read(aside)
        if found is not None and found.get("token") != token:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where nobody does, {} where it cannot be told (it is being written)."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {} if path.exists() else None
    return found if isinstance(found, dict) else {}


def _is_free(path: Path, holder: dict[str, Any]) -> bool:
    try:
        process = ProcessId(str(holder["host"]), str(holder["system"]), int(holder["pid"]), str(holder["start"]))
        alive = is_alive(process)
    except (KeyError, TypeError, ValueError, OverflowError):
        alive = None
    return _age(path) > STALE if alive is None else not alive


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    probe = new_part(path)
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _name(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "a process that has just begun"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    text = f"The output folder {path.parent} is in use by {_name(holder)}. "
    if holder.get("host") == this_process().host:
        return text + "Wait for its end or stop it, or choose another --experiment."
    return (
        f"{text}Wait for its end or stop it, or choose another --experiment. If that machine is down, the folder is "
        f"free again {STALE / 60:.0f} minutes after the last sign of life, {_age(path):.0f} seconds ago."
    )


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        holder = _read(path)
        if holder is not None and holder.get("token") == token:
            with contextlib.suppress(OSError):
                os.utime(path)


def _give_back(path: Path, token: str, stop: threading.Event, pid: int) -> None:
    if os.getpid() != pid:  # a copy of the process, which holds nothing
        return
    stop.set()
    holder = _read(path)
    if holder is not None and holder.get("token") == token:
        with contextlib.suppress(OSError):
            path.unlink()
