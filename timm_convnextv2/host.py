"""Which process is meant by a file that another one left: its machine, its number, and when it started."""

import os
import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["ProcessId", "is_alive", "this_process"]


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
