"""What the processes of a run tell each other beside their collectives: who has failed, and who still lives.

A collective does not end when a process that it waits for has died, or ends with a traceback that names no cause. So
each process beats in the store that torchrun (or the first process) keeps, from a thread of its own. The process that
fails says so there after its message; the others see it within a second and end without one.
"""

import hashlib
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

__all__ = ["Peers", "leave"]

BEAT = 1.0  # seconds
PATIENCE = 60  # beats that a process may miss: a whole machine can stand still for a while
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
    """The other processes of a run, seen through the store.

    Args:
        rank: Of this process.
        size: Number of processes.
        suspicious: Whether something has happened, so that patience is short.
        writing: Held while a file is written; this process does not leave meanwhile.
    """

    def __init__(self, rank: int, size: int, suspicious: Callable[[], bool], writing: threading.Lock) -> None:
        self.rank, self.size, self._suspicious, self._writing = rank, size, suspicious, writing
        port, attempt = int(os.environ["MASTER_PORT"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, timeout=timedelta(seconds=30), wait_for_workers=False)
        self._store = dist.PrefixStore(f"timm_convnextv2/{attempt}", store)
        self._others = [r for r in range(size) if r != rank] if rank == 0 else [0]
        self._broken, self._end = False, threading.Event()
        self._store.set(f"name/{rank}", f"process {rank} of {size} ({socket.gethostname()}, pid {os.getpid()})")
        self._store.set(f"alive/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begins to beat and to watch; all processes must have been made."""
        self._thread.start()

    def close(self) -> None:
        """This process ends as it should."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            self._store.set(f"alive/{self.rank}", LEFT)
        except RuntimeError:  # whoever kept the store has left before
            return

    def is_first(self, text: str) -> bool:
        """Whether no other process has asked this about the same text, as one of them prints it."""
        return self._store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    def fail(self) -> None:
        """Tells the others that this process has failed, after it has printed why."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failed", str(self.rank))

    def others_failed(self, broken: bool) -> bool:
        """Whether another process has failed, so that an error here need not be told.

        Args:
            broken: The error is one of a connection: then it takes some beats to see whose.
        """
        self._broken = broken
        for _ in range(2 * SUSPICION + 1 if broken else 1):
            if self._failed():
                return True
            if broken:
                self._end.wait(BEAT)
        return self._failed()

    def _failed(self) -> bool:
        try:
            return self._store.check(["failed"]) and int(self._store.get("failed")) != self.rank
        except RuntimeError:
            return True  # the store is gone, with the process that kept it

    def _watch(self) -> None:
        seen: dict[int, bytes] = {}
        missed = dict.fromkeys(self._others, 0)
        beats = silent = 0
        while not self._end.wait(BEAT):
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
                    self._tell_lost(rank)
            seen = now

    def _tell_lost(self, rank: int) -> None:
        name = self._store.get(f"name/{rank}").decode()
        text = (
            f"timm-convnextv2 pretrain: {name} was killed, or does not answer any more. The last checkpoint is whole; "
            "--resume auto takes it."
        )
        if self.is_first(text):
            print(text, file=sys.stderr, flush=True)
        self.fail()
        self._leave()

    def _leave(self) -> None:
        with self._writing:
            leave(1)
