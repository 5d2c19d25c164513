"""Runs of length and of several processes: nothing grows, and restarts lose nothing. Each prints its figures (-s)."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from encoders import make_encoder
from helpers import assert_same, environment
from PIL import Image
from runs import command, load, steady

from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.finetune.checkpoints import newest_whole

pytestmark = pytest.mark.slow
MODULE = ["-m", "timm_convnextv2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(words, log, **more):
    """A process and its children in a session of their own, which prints to a file."""
    out = open(log, "a")  # noqa: SIM115  closed with this process
    how = {"stdout": out, "stderr": out, "env": environment(**more), "start_new_session": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **how)


def family(pid):
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in below for one in family(int(child)))]


def end_all(process):
    """torchrun gives each process a session of its own."""
    for one in family(process.pid):
        os.kill(one, signal.SIGKILL)
    process.wait()


def sample(pid):
    """MiB of its own memory, descriptors and threads of a process and all below it; files in /dev/shm."""
    found = np.zeros(3)
    for one in family(pid):
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
            own = int(status["RssAnon"].split()[0]) / 1024, len(os.listdir(f"/proc/{one}/fd")), int(status["Threads"])
        except (OSError, KeyError):  # it has just ended
            continue
        found += own
    return [*found, len(os.listdir("/dev/shm"))]


def watched(process, seconds, log):
    """Waits for the end; samples `[N, 4]` by `sample`."""
    seen, end = [], time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        seen.append(sample(process.pid))
        time.sleep(0.5)
    assert process.poll() == 0, log.read_text()[-3000:]
    return np.array(seen)


def show(title, seen, rate):
    """Prints the medians of the second and the last fifth of the samples, and returns them."""
    fifths = np.array_split(seen, 5)
    early, late = np.median(fifths[1], axis=0), np.median(fifths[-1], axis=0)
    names = ("MiB", "descriptors", "threads", "files in /dev/shm")
    print("\nMiB by tenths:", *(f"{np.median(tenth[:, 0]):.0f}" for tenth in np.array_split(seen, 10)))
    text = "; ".join(f"{a:.0f} to {b:.0f} {name}" for a, b, name in zip(early, late, names, strict=True))
    print(f"\n{title}: {rate}; {text}; {len(seen)} samples")
    return early, late


def test_2000_updates_take_no_more_than_200(tmp_path):
    data = ["--num-images", "1600", "--img-size", "32", "--patch-size", "1", "--batch-size", "4"]
    data += ["--device", "cpu", "--workers", "1"]
    begin, log = time.monotonic(), tmp_path / "log"
    process = start([*MODULE, "pretrain", *command(tmp_path / "r", epochs=5, data=data)], log)
    seen = watched(process, 1500, log)
    assert load(tmp_path / "r")["progress"]["epoch"] == 5, log.read_text()
    early, late = show("2,000 updates", seen, f"{time.monotonic() - begin:.0f} s")
    # it takes about 6 MiB more after each epoch; why is not known
    assert late[0] < early[0] + 40 and (late[1:] <= early[1:] + 2).all()


def test_embed_of_100000_images(tmp_path):
    images, count = tmp_path / "images", 100_000
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(images / f"{i:06d}.png")
    for i in range(100, count):
        os.link(images / f"{i % 100:06d}.png", images / f"{i:06d}.png")
    make_encoder(tmp_path / "encoder")
    words = ["--model", f"local-dir:{tmp_path / 'encoder'}", "--data-dir", images, "--output", tmp_path / "e.npy"]
    words += ["--device", "cpu", "--workers", "1", "--batch-size", "256"]
    begin, log = time.monotonic(), tmp_path / "log"
    seen = watched(start([*MODULE, "embed", *words], log), 1500, log)
    rows = np.load(tmp_path / "e.npy")
    assert len(rows) == count and np.allclose(rows.reshape(-1, 100, rows.shape[1]), rows[:100], atol=1e-4)
    with open(tmp_path / "e.npy.csv", newline="") as file:
        assert sum(1 for _ in csv.reader(file)) == count + 1
    assert sorted(path.name for path in tmp_path.iterdir() if "e.npy" in path.name) == ["e.npy", "e.npy.csv"]
    early, late = show("embed of 100,000 images", seen, f"{count / (time.monotonic() - begin):.0f} images/s")
    assert late[0] < early[0] + 60 and (late[1:] <= early[1:] + 2).all()


def ranks(pid):
    """Processes below torchrun that train: its own children."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_restarts_a_run_whose_process_is_killed(tmp_path):
    """With --max-restarts and --resume auto the run ends bit for bit as one without the kill."""
    more = ["--workers", "0", "--batch-size", "4", "--resume", "auto", "--milestone-interval", "1"]
    for name in ("whole", "r"):
        words = [*TORCHRUN, "--max-restarts", "3", *MODULE, "pretrain", *command(tmp_path / name, *more, epochs=9)]
        process, killed = start(words, tmp_path / f"{name}.log", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"), 0
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if name == "r" and killed < 2 and (tmp_path / f"r/milestone-{3 + 4 * killed}.pth.tar").exists():
                os.kill(ranks(process.pid)[killed], signal.SIGKILL)
                killed += 1
            time.sleep(0.01)
        if process.poll() is None:
            end_all(process)
        log = (tmp_path / f"{name}.log").read_text()
        assert process.poll() == 0 and killed == 2 * (name == "r"), log
    assert_same(load(tmp_path / "r")["state_dict"], load(tmp_path / "whole")["state_dict"])
    assert [row["epoch"] for row in steady(tmp_path / "r")] == [str(i) for i in range(9)]
    print(f"\ntorchrun --max-restarts: {killed} kills of one process of two, same weights")


@pytest.mark.timm_train
def test_finetuning_on_two_processes_under_kills(tmp_path):
    """Killed three times at random moments after a checkpoint; the checkpoint that `finetune` names ends the run."""
    if not (script := os.environ.get("TIMM_TRAIN")):
        pytest.skip("TIMM_TRAIN=/path/to/timm's train.py is not set")
    data, rng, kills, resume = tmp_path / "data", random.Random(0), 0, []
    write_folder(data, size=32, train=24, validation=16)
    make_encoder(tmp_path / "encoder")
    words = ["finetune", "--recipe", "smoke", "--model", f"local-dir:{tmp_path / 'encoder'}", "--data-dir", data]
    words += ["--output", tmp_path, "--experiment", "r", "--timm-train", script, "--epochs", 12, "--warmup-epochs", 0]
    words += ["--batch-size", 4, "--workers", 0, "--device", "cpu"]
    while kills < 3:
        before = newest_whole(tmp_path / "r")
        process = start([*TORCHRUN, *MODULE, *words, *resume], tmp_path / "log")
        end = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < end and newest_whole(tmp_path / "r") == before:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        end_all(process)
        kills += 1
        found = newest_whole(tmp_path / "r")
        assert found and found[1] >= kills
        resume = ["--resume", found[0]]
    process = start([*TORCHRUN, *MODULE, *words, *resume], tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "r/model/model.safetensors").stat().st_size
    epochs = {line.partition(",")[0] for line in (tmp_path / "r/summary.csv").read_text().splitlines()[1:]}
    assert {str(i) for i in range(12)} <= epochs
    print(f"\nfinetune on two processes: {kills} kills, all 12 epochs")
