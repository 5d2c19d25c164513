"""What the benchmarks share: paired timing, peak memory, conditions, result files."""

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

__all__ = ["conditions", "peak_memory", "ratio", "time_in_turn", "write_csv"]

RESULTS = Path(__file__).parent / "results"


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


def time_in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender, run in turn (A B A B ...), so that a machine that drifts drifts for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, step in contenders.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum of a / b, pair by pair."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def _status(field: str) -> int:
    """A memory figure of this process in bytes, from Linux's /proc."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _child(make: Callable[..., Callable[[], object]], args: tuple, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    step = make(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    for _ in range(2):
        step()
    pipe.send(_status("VmHWM") - before)


def peak_memory(make: Callable[..., Callable[[], object]], args: tuple, device: torch.device, threads: int) -> int:
    """Bytes that two steps add at their peak to what the model and its data take.

    On CPU the growth of the resident size of a fresh process (Linux); on CUDA the allocator's peak.

    Args:
        make: Module-level function that builds a step from `args`.
        args: Its arguments.
        device: Where the step runs.
        threads: CPU threads.
    """
    if device.type == "cuda":
        step = make(*args)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(make, args, threads, send))
    process.start()
    send.close()
    grown = receive.recv()
    process.join()
    return grown


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
