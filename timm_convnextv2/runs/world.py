"""`World`: the processes of a training run, their device, and when all of them stop."""

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
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env

from ..console import PROGRAM
from .device import check_device
from .group import Processes

HEARTBEAT = 1.0  # seconds
PATIENCE = 60  # heartbeats that a process may miss: a machine can be suspended for a while
SUSPICION = 5  # the same once a signal or a broken connection shows that something happened
LEFT = b"left"
# requests to stop; SLURM can send SIGUSR1, a terminal that closes sends SIGHUP, perhaps twice
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

# Messages about a connection that a peer has closed.
_BROKEN = "Connection (closed|reset)|Broken pipe|gloo|NCCL|remote process|Socket"


def leave(status: int) -> None:
    """Ends this process at once, from any thread, with its data workers."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def leave_signals_to_parent(_worker: int) -> None:
    """Keeps data workers alive while the training process finishes its update."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Peers:
    """Heartbeats of the other processes of a run, exchanged through a store.

    `suspicious` returns whether something went wrong, so that missing heartbeats count sooner. While `writing` is held,
    this process does not exit.
    """

    # Not gloo's or NCCL's timeout alone: it cannot distinguish a dead process from rank 0 that measures for minutes.

    def __init__(
        self, rank: int, size: int, suspicious: Callable[[], bool], writing: threading.Lock, command: str
    ) -> None:
        self.rank, self._suspicious, self._writing, self._command = rank, suspicious, writing, command
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
            self._store.set(f"alive/{self.rank}", LEFT.decode())
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
        """Whether another process has failed; if a connection is `broken`, it takes some heartbeats to learn whose."""
        self._broken = broken
        for _ in range(2 * SUSPICION + 1 if broken else 0):
            if self._failed():
                return True
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
                missed[rank] = 0 if value != seen.get(rank) or value == LEFT else missed[rank] + 1
                if missed[rank] >= patience:
                    self._report_lost(rank)
            seen = now

    def _report_lost(self, rank: int) -> None:
        text = (
            f"{PROGRAM} {self._command}: {self._store.get(f'name/{rank}').decode()} was killed or stopped responding. "
            "The last checkpoint is whole; --resume auto takes it."
        )
        if self.is_first(text):
            print(text, file=sys.stderr, flush=True)
        self.fail()
        self._leave()

    def _leave(self) -> None:
        with self._writing:
            leave(1)


class World(Processes):
    """The processes of a training run; without torchrun, only this one.

    torchrun's local rank is added to a `device` such as 'cuda'; `command` is for messages.
    """

    def __init__(self, device: str, command: str = "") -> None:
        several, (local_rank, _, size) = is_distributed_env(), world_info_from_env()
        if several and "WORLD_SIZE" not in os.environ and not {"SLURM_PROCID", "MASTER_ADDR"} <= os.environ.keys():
            raise ValueError(
                f"SLURM_NTASKS={size} is set, but srun did not start this process with MASTER_ADDR. For one process: "
                "unset SLURM_NTASKS. For several: torchrun, as in launch/slurm.sh."
            )
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # https://github.com/pytorch/pytorch/issues/135712
            raise ValueError(
                "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment: without it, "
                "restarted processes may read the addresses of dead ones and hang."
            )
        kind = device.partition(":")[0]
        self.device = check_device(f"{kind}:{local_rank}" if several and device != "cpu" else device)
        joined: dict[str, Any] = init_distributed_device_so(device)
        # values that the processes agree on go through the CPU, so that no process waits for a GPU
        apart = joined["distributed"] and self.device.type != "cpu"
        super().__init__(joined["global_rank"], joined["world_size"], dist.new_group(backend="gloo") if apart else None)
        self.stop = ""  # name of the signal that requested a stop
        self.writing = threading.Lock()  # held while a checkpoint is written: a failing peer does not interrupt it
        self._wakeup: tuple[int, int] | None = None
        self._handlers: dict[int, Any] = {}  # of the signals, before this run
        self._peers: Peers | None = None
        if self.distributed:
            self._peers = Peers(self.rank, self.size, lambda: bool(self.stop), self.writing, command)
            self.wait()
            self._peers.start()

    def watch_signals(self) -> None:
        """After one of the `SIGNALS`, the run stops after the update; after a second one, at once."""
        if threading.current_thread() is not threading.main_thread():  # a caller's thread gets no signals
            return

        # Python runs a handler only while its main thread runs Python; if that waits in a collective, a thread counts
        def ask(number: int, _frame) -> None:
            self.stop = signal.Signals(number).name
            for other in self._handlers:
                signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)

        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        if self._handlers[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            del self._handlers[signal.SIGHUP]
        for number in self._handlers:
            signal.signal(number, ask)
        if self._wakeup is None:
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            threading.Thread(target=self._count_signals, args=self._wakeup[:1], daemon=True).start()

    def _count_signals(self, pipe: int) -> None:
        asked = 0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS and not (asked and number == signal.SIGHUP):
                    asked += 1
                    self.stop = self.stop or signal.Signals(number).name
                    if asked > 1:
                        leave(128 + number)
        os.close(pipe)

    def close(self) -> None:
        """Ends the threads of this process and its handlers; the others know that it ends normally."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])
            self._wakeup = None
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    def report(self, text: str) -> None:
        """Prints why the run ends, on stderr, once if several processes print the same; the others end as well."""
        if self._peers is None or self._peers.is_first(text):
            print(text, file=sys.stderr, flush=True)
        if self._peers is not None:
            self._peers.fail()

    def is_consequence(self, error: BaseException) -> bool:
        """Whether an error only follows from another process's failure, which that process reports itself."""
        if self._peers is None:
            return False
        broken = isinstance(error, RuntimeError) and re.search(_BROKEN, str(error)) is not None
        return self._peers.others_failed(broken or isinstance(error, dist.DistError))

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises a `ValueError` on all processes if a fact differs between two of them."""
        first, *others = self.gather([facts])
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):  # all processes name the same one
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"Process {rank} has another value of {name} than process 0: {other.get(name)!r}, not "
                        f"{first.get(name)!r}. All processes need the same settings, images and package versions."
                    )

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes, on its device and without a wait."""
        x = x / self.size
        if self.distributed:
            dist.all_reduce(x)
        return x
