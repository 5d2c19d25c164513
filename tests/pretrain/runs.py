"""Tiny runs of pretraining, and what is read of them."""

import csv
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import SCRIPTS, assert_same
from PIL import Image

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.data import DemoSource, ImageError
from timm_convnextv2.runs.trainer import Trainer

SCRIPT = SCRIPTS / "pretrain.py"
ERROR = "timm-convnextv2 pretrain: error: "
# a model of milliseconds, and one epoch of four updates of eight images
SMALL = ["--decoder-dim", "16", "--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]"]
DATA = ["--num-images", "32", "--img-size", "64", "--patch-size", "4", "--batch-size", "8", "--workers", "0"]
DATA += ["--device", "cpu"]
# the options of a tiny run on images of the test
TINY = ["--img-size", "32", "--patch-size", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", *SMALL]
BANDS = ["--mean", *["0.5"] * 5, "--std", *["0.3"] * 5]
# AdamW turns rounding of gradients near zero into whole steps; SGD keeps it rounding
SGD = ["--opt", "sgd", "--lr-base", "1.6", "--lr-base-scale", "linear"]
CASES = {
    "plain": ["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.3", "--lr", "1e-2"],
    "ema": ["--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"],
    "accum": ["--batch-size", "4", "--grad-accum-steps", "2", "--clip-grad", "0.5"],
    "float16": ["--amp", "--amp-dtype", "float16"],
}
TIMES = {"train_images_per_s", "train_data_wait", "train_seconds", "train_memory_gib"}


def command(out: Path, *more: str, epochs: int = 1, data: list[str] = DATA) -> list[str]:
    """Command line of a tiny run into `out`."""
    return [*data, *SMALL, "--epochs", str(epochs), "--output", str(out.parent), "--experiment", out.name, *more]


def run(out: Path, *more: str, status: int = 0, **kwargs) -> Path:
    """Such a run in this process."""
    assert main(command(out, *more, **kwargs)) == status
    return out


def load(out: Path, name: str = "last") -> dict:
    """A checkpoint of a run."""
    return torch.load(out / f"{name}.pth.tar", weights_only=True)


def rows(out: Path) -> list[dict[str, str]]:
    """The summary of a run."""
    with open(out / "summary.csv", newline="") as f:
        return list(csv.DictReader(f))


def steady(out: Path) -> list[dict[str, str]]:
    """The summary without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(out)]


def differs(a: dict, b: dict) -> bool:
    """Whether some tensor is another."""
    return any(not torch.equal(a[k], b[k]) for k in a)


def snapshot(folder: Path) -> dict:
    """All files below a folder."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def image_folder(path: Path, n: int = 16, size: int = 48, shape: tuple | None = None) -> Path:
    """A folder of PNGs, or of .npy files of a shape."""
    path.mkdir(parents=True)
    source = DemoSource(n, size)
    for i in range(n):
        if shape is None:
            Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
        else:
            np.save(path / f"{i:03d}.npy", np.random.default_rng(i).random(shape, dtype=np.float32))
    return path


def patched(folder: Path, act: str = "pass", *, number: int = 2, rank: int = 0, before: str = "") -> Path:
    """A script of the command that runs `act` before an update of one process, and draws nothing."""
    path = folder / "one.py"
    path.write_text(
        "import multiprocessing, os, signal, sys, time\n"
        "from timm_convnextv2.commands.pretrain import main\n"
        "from timm_convnextv2.pretraining import loop, measures, setup\n"
        "from timm_convnextv2.runs import world\n"
        "from timm_convnextv2.runs.errors import DataError\n"
        "from timm_convnextv2.runs.trainer import Trainer\n"
        "update = Trainer.update\n"
        "def wrapped(self, batches, number):\n"
        f"    if number == {number} and self.world.rank == {rank}:\n"
        f"        open({str(folder / 'fault')!r}, 'w').close(); {act}\n"
        "    return update(self, batches, number)\n"
        "Trainer.update = wrapped\n"
        f"loop.save_loss_curve = measures.save_reconstructions = lambda *_, **__: None\n{before}\n"
        "if __name__ == '__main__': sys.exit(main())\n"
    )
    return path


def at_update(monkeypatch, index: int, act) -> None:
    """Calls `act` after the forward and backward of an update, counted from the start of the process."""
    update, count = Trainer.update, iter(range(10**6))

    def wrapped(*args):
        result = update(*args)
        if next(count) == index:
            act()
        return result

    monkeypatch.setattr(Trainer, "update", wrapped)


def stop(out: Path, update: int, *more: str, number: int = signal.SIGTERM, **kwargs) -> Path:
    """A run that a signal asks to stop after an update; it may end before."""
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, update, lambda: os.kill(os.getpid(), number))
        assert main(command(out, *more, **kwargs)) in (0, 130 if number == signal.SIGINT else 0)
    return out


def kill(out: Path, update: int, *more: str, **kwargs) -> Path:
    """A run that ends at once after an update, while this process lives."""

    def die():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_update(patch, update, die)
        run(out, *more, **kwargs)
    return out


def assert_same_end(out: Path, expected: Path) -> None:
    """Weights and summary are equal, bit for bit."""
    assert_same(load(out)["state_dict"], load(expected)["state_dict"])
    assert steady(out) == steady(expected)


def flip(path):
    """Flips a bit of the largest tensor; bytes between the parts of the file mean nothing."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(part) as file:
            content = file.read()
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def config(folder: Path, **settings) -> str:
    """A config file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def refused(out: Path, capsys, words: str | list[str], *more: str, data: list[str] = DATA) -> None:
    """Exit status 2, one message on stderr that has the words, nothing written."""
    before = snapshot(out.parent)
    capsys.readouterr()
    run(out, *more, status=2, data=data)
    printed = capsys.readouterr()
    (message, *_) = [line for line in printed.err.splitlines() if not line.startswith("warning: ")]
    assert printed.err.count(ERROR) == 1 and message.startswith(ERROR)
    for word in [words] if isinstance(words, str) else words:
        assert word in printed.err
    assert "Writing to" not in printed.out
    assert snapshot(out.parent) == before and not out.exists()


def spoil(monkeypatch, bad: set[int]) -> None:
    """Images of the demo data set that cannot be decoded from now on."""
    read = DemoSource.read

    def spoiled(self, i, *args, **kwargs):
        if i in bad:
            raise ImageError(f"{self.name(i)}: is spoiled")
        return read(self, i)

    monkeypatch.setattr(DemoSource, "read", spoiled)
