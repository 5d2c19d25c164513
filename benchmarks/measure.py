"""What the benchmarks share: paired timing, peak memory, conditions, result files."""

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

RESULTS = Path(__file__).parent / "results"


def add_machine_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """`--rounds`, `--threads`, `--device` and `--dtype`."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def device_kind(device: torch.device) -> str:
    """'cpu', or the GPU's name, for the names of files."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "_").lower()


def conditions(device: torch.device, threads: int) -> dict[str, str]:
    """What a figure depends on."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True).stdout
    # but for what runs write
    code = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results", ":!/docs"]
    dirty = subprocess.run(code, cwd=here, capture_output=True, text=True).stdout
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {threads} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() + ("+" if dirty.strip() else ""),
        "hardware": hardware,
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *map(_portable, sys.argv[1:])]),
    }


def _portable(word: str) -> str:
    """Without the folders of this machine."""
    return Path(word).name if os.path.isabs(word) else word


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def time_in_turn(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate on CPU, run in turn (A B A B ...) in this process."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmup + rounds):
        for name, step in candidates.items():
            start = time.perf_counter()
            step()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run_logged(command: list[str], log: Path) -> float:
    """Runs a program, with what it prints in a file; returns its seconds, or ends and says its last lines."""
    start = time.perf_counter()
    with open(log, "w") as f:
        done = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command[:5])} ... failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start


def call(script: str, words: list, log: Path) -> float:
    """Runs a script of `train_scripts/`; returns the seconds it took."""
    folder = Path(__file__).parents[1] / "train_scripts"
    return run_logged([sys.executable, str(folder / script), *map(str, words)], log)


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum of a / b, pair by pair."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def _status(field: str) -> int:
    """A memory figure of this process in bytes, from Linux's /proc."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _serve(build: Callable[..., Callable[[], object]], args: tuple, threads: int, warmup: int, pipe) -> None:
    """A candidate's process: says what memory its first steps took, then times a step whenever asked.

    Another step goes before it: training runs one after the other, and while a process waits for its turn the caches,
    and on some systems its memory, go to others.
    """
    torch.set_num_threads(threads)
    step = build(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    for _ in range(warmup):
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    pipe.send((_status("VmHWM") - before, seconds))
    while pipe.recv():
        step()
        start, busy = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - start, time.process_time() - busy))


class Candidates:
    """Steps that are compared: `with Candidates({name: (build, args)}, device, threads) as candidates`.

    On CPU (Linux) each has a process of its own, as in use: in a shared one, what one frees decides what memory costs
    the next. On CUDA they share this process.

    Args:
        make: For each name a module-level function that builds a step, and its arguments.
        device: Where the steps run.
        threads: CPU threads.
        warmup: Steps before the first that counts.

    Attributes:
        peak: Bytes that the first steps added at their peak to what the model and its data take: resident size of the
            process, or the CUDA allocator's.
        first: Seconds of the last of those steps.
        busy: On CPU, seconds that its threads computed in each step that was timed, which a shared machine's waiting
            does not add to.
    """

    def __init__(self, make: dict[str, tuple], device: torch.device, threads: int, warmup: int = 2) -> None:
        self.make, self.device, self.threads, self.warmup = make, device, threads, warmup
        self.peak: dict[str, int] = {}
        self.first: dict[str, float] = {}
        self.busy: dict[str, list[float]] = {name: [] for name in make}
        self._steps: dict[str, Callable[[], float]] = {}
        self._processes: list[tuple] = []

    def __enter__(self) -> "Candidates":
        for name, (build, args) in self.make.items():
            (self._here if self.device.type == "cuda" else self._apart)(name, build, args)
        return self

    def __exit__(self, *_) -> None:
        for process, pipe in self._processes:
            pipe.send(False)
            process.join()
        self._steps.clear()

    def _apart(self, name: str, build: Callable, args: tuple) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(build, args, self.threads, self.warmup, there), daemon=True)
        process.start()
        there.close()
        self.peak[name], self.first[name] = here.recv()
        self._processes.append((process, here))

        def run() -> float:
            here.send(True)
            seconds, busy = here.recv()
            self.busy[name].append(busy)
            return seconds

        self._steps[name] = run

    def _here(self, name: str, build: Callable, args: tuple) -> None:
        step = build(*args)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def run() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        for _ in range(self.warmup):
            self.first[name] = run()
        self.peak[name] = torch.cuda.max_memory_allocated() - before
        self._steps[name] = run

    def time(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of each, run in turn (A B A B ...), so that a machine that drifts drifts for all of them."""
        seconds: dict[str, list[float]] = {name: [] for name in self._steps}
        for _ in range(rounds):
            for name, run in self._steps.items():
                seconds[name].append(run())
        return seconds


def write_csv(name: str, rows: list[dict], about: dict[str, str]) -> Path:
    """Writes rows under the conditions as comment lines to `benchmarks/results/NAME.csv`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with open(path, "w", newline="") as f:
        for key, value in about.items():
            f.write(f"# {key}: {value}{os.linesep}")
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(rows)
    return path
