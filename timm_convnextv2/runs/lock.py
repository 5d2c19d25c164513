"""The lock of a run's folder: only one process at a time writes to it. docs/reliability.md has its rules.

It relies on two operations that succeed for one process only: creating a hard link (or, without links, exclusive
creation) and renaming. Times come from the file system, so the machines' clocks need not agree.
"""
# Not filelock: its FileLock uses system locks, which some network file systems ignore and forked data workers keep
# after a kill; its soft locks do not record the holder's command and make a resume on another machine wait.

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
HEARTBEAT = 30.0  # seconds between touches
STALE = 300.0  # seconds without a touch after which a holder that cannot be checked counts as dead

_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class LockLostError(Exception):
    """Another process has taken the folder."""


class Lock:
    """Locks an existing folder; a ValueError names the process that holds the lock and since when."""

    def __init__(self, folder: Path) -> None:
        self.path, self._token = folder / LOCK, uuid.uuid4().hex
        _take(self.path, self._token)
        stop = threading.Event()
        # runs when the lock is garbage collected and when the interpreter exits
        self._finish = weakref.finalize(self, _release, self.path, self._token, stop, os.getpid())
        threading.Thread(target=_touch_regularly, args=(self.path, self._token, stop), daemon=True).start()
        _held.add(self)

    def check(self) -> None:
        """Raises `LockLostError` if this process no longer holds the lock."""
        holder = _read(self.path)
        if holder is None or holder.get("token") != self._token:
            who = f"is held by {_name(holder)}" if holder else "is gone"
            raise LockLostError(f"The lock '{self.path}' {who}: this process missed its heartbeat.")

    def release(self) -> None:
        """Releases the lock; further calls do nothing."""
        self._finish()


def release_locks() -> None:
    """Releases all locks of this process."""
    for lock in list(_held):
        lock.release()


def refuse_locked(folder: Path) -> dict[str, Any] | None:
    """Raises a `ValueError` if a running process holds the folder; returns the dead holder, None if there is none."""
    path = folder / LOCK
    holder = _read(path)
    if holder is not None and not _is_free(path, holder):
        raise ValueError(_refusal(path, holder))
    return holder


def _take(path: Path, token: str) -> None:
    holder = refuse_locked(path.parent)
    if holder is not None:
        _remove(path, holder.get("token"))
    command, since = shlex.join(["python", *sys.orig_argv[1:]]), f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    text = json.dumps({**this_process()._asdict(), "command": command, "since": since, "token": token})
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
    """Removes a free lock, but not one that another process has taken meanwhile: only one rename succeeds."""
    aside = new_part(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        found = _read(aside)
        if found is not None and found.get("token") != token:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """The holder of a lock; None if there is none, {} if it is unknown because the file is being written."""
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
    return abs(_age(path)) > STALE if alive is None else not alive  # a time in the future: the clock was set back


def _age(path: Path) -> float:
    """Seconds since the last touch, by the file system's clock."""
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
        return "a process that has just started"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    text = f"The output folder {path.parent} is in use by {_name(holder)}. "
    text += "Wait until it ends, stop it, or choose another --experiment or --output."
    if holder.get("host") == this_process().host:
        return text
    return (
        f"{text} If that machine is down, the folder is free again {STALE / 60:.0f} minutes after its last heartbeat, "
        f"{_age(path):.0f} seconds ago."
    )


def _touch_regularly(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        holder = _read(path)
        if holder is not None and holder.get("token") == token:
            with contextlib.suppress(OSError):
                os.utime(path)


def _release(path: Path, token: str, stop: threading.Event, pid: int) -> None:
    if os.getpid() != pid:  # a forked copy, which does not hold the lock
        return
    stop.set()
    holder = _read(path)
    if holder is not None and holder.get("token") == token:
        with contextlib.suppress(OSError):
            path.unlink()
