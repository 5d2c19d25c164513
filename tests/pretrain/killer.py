"""A process that imports torch once and forks runs of pretraining, kills them at random moments, and resumes them.

    python killer.py FOLDER TRIES SEED OPTIONS...

Prints a line of JSON a try: its kills, by what the run was doing, and whether it ended as the one without.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from timm_convnextv2 import files
from timm_convnextv2.checkpoint import export
from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.pretraining import loop, measures
from timm_convnextv2.runs.lock import LOCK

SLOW = 0.02  # seconds that a file needs to get to the disk: a kill finds many half-written ones


def slow_down() -> None:
    """Writing takes most of the time of a run, and drawing none."""
    sync = files.sync

    def slowly(path):
        time.sleep(SLOW)
        sync(path)

    files.sync = export.sync = slowly
    loop.save_loss_curve = measures.save_reconstructions = lambda *_: None


def start(out: Path, options: list[str]) -> int:
    """Forks a run; returns its number."""
    pid = os.fork()
    if pid == 0:
        status = 70
        with contextlib.suppress(BaseException), open(out.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = main([*options, "--output", str(out.parent), "--experiment", out.name, "--resume", "auto"])
        os._exit(status)
    return pid


def doing(out: Path) -> str:
    """What a run that was killed was writing, by what it left."""
    parts = sorted(path.name.split(".")[1] for path in out.glob(".*.part")) if out.is_dir() else []
    return " and ".join(parts) or ("training" if (out / LOCK).exists() else "starting")


def state(out: Path) -> dict:
    """What a run leaves that must not depend on kills."""
    last = torch.load(out / "last.pth.tar", weights_only=True)
    rows = [line.split(",")[:2] for line in (out / "summary.csv").read_text().split()]
    weights = load_file(out / "encoder/model.safetensors")
    return {"last": last["state_dict"], "optimizer": last["optimizer"]["state"], "rows": rows, "encoder": weights}


def same(a: object, b: object) -> bool:
    """Equal, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def wait(pid: int, out: Path, rng: random.Random, seconds: float) -> None:
    """For some time, or until the run is writing one of its first files: on a busy machine time alone finds few."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.05, 1) * seconds)
        return
    seen: set[str] = set()
    wanted, deadline = rng.randint(1, 4), time.monotonic() + 10 * seconds
    while len(seen) < wanted and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return  # it has ended
        seen.update(path.name for path in out.glob(".*.part"))
        time.sleep(SLOW / 20)


def attack(out: Path, options: list[str], rng: random.Random, seconds: float) -> dict:
    """Kills a run up to three times, then lets it end."""
    kills = []
    for _ in range(rng.randint(1, 3)):
        pid = start(out, options)
        wait(pid, out, rng, seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills.append(doing(out))
    status = os.waitstatus_to_exitcode(os.waitpid(start(out, options), 0)[1])
    return {"kills": kills, "status": status, "left": [path.name for path in out.rglob(".*")]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    slow_down()
    folder, tries, seed, options = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    begin = time.monotonic()
    os.waitpid(start(folder / "whole", options), 0)
    expected, seconds = state(folder / "whole"), time.monotonic() - begin
    rng = random.Random(seed)
    for number in range(tries):
        out = folder / f"run{number}"
        result = attack(out, options, rng, seconds)
        result["same"] = result["status"] == 0 and same(state(out), expected)
        print(json.dumps(result), flush=True)
