"""The processes of a run: device and rank, which one prints, and when all of them stop."""

import argparse
import hashlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from ..console import PROGRAM

HEARTBEAT = 1.0  # seconds


PATIENCE = 60  # heartbeats that a process may miss: a machine can be suspended for a while


SUSPICION = 5  # the same where a signal or a broken connection says that something has happened


LEFT = "left"


def leave(status: int) -> None:
    """Ends this process at once, from any thread, with its data workers."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


class Peers:
    """Heartbeats of the other processes of a run, exchanged through a store.

    Args:
        suspicious: Returns whether something went wrong, so that missing heartbeats count sooner.
        writing: Held while a file is written; this process does not exit meanwhile.
    """

    # Not gloo's or NCCL's timeout alone: it cannot distinguish a dead process from rank 0 that measures for minutes.

    def __init__(
        self, rank: int, size: int, suspicious: Callable[[], bool], writing: threading.Lock, command: str
    ) -> None:
        self.rank, self.size, self._suspicious, self._writing = rank, size, suspicious, writing
        self._command = command
        port, attempt = int(os.environ["MASTER_PORT"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, timeout=timedelta(seconds=30), wait_for_workers=False)
        self._store = dist.PrefixStore(f"timm_convnextv2/{attempt}", store)
        self._others = [r for r in range(size) if r != rank] if rank == 0 else [0]
        self._broken, self._end = False, threading.Event()
        self._store.set(f"name/{rank}", f"process {rank} of {size} ({socket.gethostname()}, pid {os.getpid()})")
        self._store.set(f"alive/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Starts the heartbeat; all processes must have been created."""
        self._thread.start()

    def close(self) -> None:
        """Announces that this process ends normally."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            self._store.set(f"alive/{self.rank}", LEFT)
        except RuntimeError:  # the process with the store has exited already
            return

    def is_first(self, text: str) -> bool:
        """Whether no other process has printed the same text."""
        return self._store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    def fail(self) -> None:
        """Announces that this process has failed, after it has printed the reason."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failed", str(self.rank))

    def others_failed(self, broken: bool) -> bool:
        """Whether another process has failed, so that this one need not report its error.

        Args:
            broken: The error is a broken connection: it takes some heartbeats to learn whose.
        """
        self._broken = broken
        for _ in range(2 * SUSPICION + 1 if broken else 1):
            if self._failed():
                return True
            if broken:
                self._end.wait(HEARTBEAT)
        return self._failed()

    def _failed(self) -> bool:
        try:
            return self._store.check(["failed"]) and int(self._store.get("failed")) != self.rank
        except RuntimeError:
            return True  # the store is gone with its process

    def _watch(self) -> None:
        seen: dict[int, bytes] = {}
        missed = dict.fromkeys(self._others, 0)
        beats = silent = 0
        while not self._end.wait(HEARTBEAT):
            beats += 1
            try:
                self._store.set(f"alive/{self.rank}", str(beats))
                if self._store.check(["failed"]) and int(self._store.get("failed")) != self.rank:
                    self._leave()
                now = dict(zip(self._others, self._store.multi_get([f"alive/{r}" for r in self._others]), strict=True))
                silent = 0
            except RuntimeError:
                silent += 1
                if silent == SUSPICION:
                    self._leave()
                continue
            patience = SUSPICION if self._broken or self._suspicious() else PATIENCE
            for rank, value in now.items():
                missed[rank] = 0 if value != seen.get(rank) or value == LEFT.encode() else missed[rank] + 1
                if missed[rank] >= patience:
                    self._report_lost(rank)
            seen = now

    def _report_lost(self, rank: int) -> None:
        name = self._store.get(f"name/{rank}").decode()
        text = (
            f"{PROGRAM} {self._command}: {name} was killed or stopped responding. The last checkpoint is whole; "
            "--resume auto takes it."
        )
        if self.is_first(text):
            print(text, file=sys.stderr, flush=True)
        self.fail()
        self._leave()

    def _leave(self) -> None:
        with self._writing:
            leave(1)


SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
)  # requests to stop; SLURM can send the last one


# Messages about a connection that a peer has closed.
_BROKEN = "Connection (closed|reset)|Broken pipe|gloo|NCCL|remote process|Socket"


def leave_signals_to_parent(_worker: int) -> None:
    """Keeps data workers alive while the training process finishes its update."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Seat(NamedTuple):
    """The rank of a process in a run, for code that needs no more of its `World`."""

    rank: int
    size: int
    primary: bool = False

    def print(self, text: str) -> None:
        """Prints nothing: the process that replays prints its own lines."""

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value


class World:
    """The processes of a run; without torchrun, only this one.

    Args:
        device: Name such as 'cuda' or 'cpu', to which torchrun's local rank is added; a ValueError if it is unusable.
        command: Name of the command, for messages.

    Attributes:
        primary: True on rank 0, which prints and writes.
        stop: Name of the signal that requested a stop, else ''.
        writing: Held while a checkpoint is written, so that a failing peer does not interrupt it.
    """

    def __init__(self, device: str, command: str = "") -> None:
        try:
            found = argparse.Namespace(device=device)
            self.device: torch.device = init_distributed_device(found)
            torch.zeros(1, device=self.device)
        except (AssertionError, RuntimeError) as e:
            raise ValueError(f"--device {device} cannot be used: {e}") from e
        self.rank, self.size, self.distributed = found.rank, found.world_size, found.distributed
        self.primary = self.rank == 0
        self.stop = ""
        # what the processes agree on goes through the CPU, so that nobody waits for a GPU
        self._cpu_group: Any = (
            dist.new_group(backend="gloo") if self.distributed and self.device.type != "cpu" else None
        )
        self.writing = threading.Lock()
        self._wakeup: tuple[int, int] | None = None
        self._peers: Peers | None = None
        if self.distributed:
            self._peers = Peers(self.rank, self.size, lambda: bool(self.stop), self.writing, command)
            self.wait()
            self._peers.start()

    def print(self, text: str) -> None:
        """Prints on rank 0."""
        if self.primary:
            print(text, flush=True)

    def watch_signals(self) -> None:
        """The `SIGNALS` ask to stop after the update; a second one stops at once.

        Python runs a handler only where its main thread runs Python. While that waits in a collective, a thread counts.
        """

        def ask(number: int, _frame) -> None:
            self.stop = signal.Signals(number).name
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)

        for number in SIGNALS:
            signal.signal(number, ask)
        if self._wakeup is None and threading.current_thread() is threading.main_thread():
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            threading.Thread(target=self._count_signals, args=self._wakeup[:1], daemon=True).start()

    def _count_signals(self, pipe: int) -> None:
        asked = 0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS:
                    asked += 1
                    self.stop = self.stop or signal.Signals(number).name
                    if asked > 1:
                        leave(128 + number)
        os.close(pipe)

    def close(self) -> None:
        """Ends the threads of this process; the others know that it ends as it should."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])
            self._wakeup = None
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    def report(self, text: str) -> None:
        """Prints why the run ends, on stderr: once, where several processes say the same. The others end, too."""
        if self._peers is None or self._peers.is_first(text):
            print(text, file=sys.stderr, flush=True)
        self.fail()

    def fail(self) -> None:
        """Announces that this process ends with an error, so that the others end as well."""
        if self._peers is not None:
            self._peers.fail()

    def is_consequence(self, error: BaseException) -> bool:
        """Whether an error only follows from another process's failure, which that process reports itself."""
        if self._peers is None:
            return False
        broken = isinstance(error, RuntimeError) and re.search(_BROKEN, str(error)) is not None
        return self._peers.others_failed(broken or isinstance(error, dist.DistError))

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises a `ValueError` on all processes where one knows other facts than the first."""
        first, *others = self.gather([facts])
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):  # all processes name the same one
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"Process {rank} has another value of {name} than process 0: {other.get(name)!r}, not "
                        f"{first.get(name)!r}. All processes need the same settings, images and package versions."
                    )

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some process."""
        if not self.distributed:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(counts, group=self._cpu_group)
        return [bool(n) for n in counts]

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def gather(self, items: list) -> list:
        """The items of all processes, joined in the order of ranks."""
        if not self.distributed:
            return items
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, items, group=self._cpu_group)
        return sum(everywhere, [])

    def share(self, value: Any) -> Any:
        """What the first process has."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._cpu_group)
        return values[0]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes, on its device and without a wait."""
        x = x / self.size
        if self.distributed:
            dist.all_reduce(x)
        return x
