"""Folders that real, tiny commands wrote, once per session; with what they printed."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import pytest
from tiny import train

from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder

NETWORK = "--model-kwargs depths=(1,1,1,1) dims=(8,12,16,20) --decoder-dim 8 --patch-size 1 --img-size 32".split()


def call(line: str, *words: object) -> str:
    """Runs a command of the package; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([*shlex.split(line), *map(str, words)])
    assert status in (0, 1 if line.startswith("check") else 0), out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A labelled folder of small images."""
    return write_folder(tmp_path_factory.mktemp("real") / "demo", size=32, train=160, validation=16)


@pytest.fixture(scope="session")
def pretrained(demo) -> tuple[Path, str]:
    """The folder of a pretraining with every measure, and its output."""
    words = "pretrain --epochs 2 --batch-size 4 --device cpu --workers 0 --recon-interval 1 --holdout 0.2 --model-ema"
    places = ("--data-dir", demo / "validation", "--probe-dir", demo / "validation", "--output", demo.parent)
    printed = call(words, *NETWORK, *places, "--experiment", "pretrained")
    return demo.parent / "pretrained", printed


def trained(root: Path, task: str, **annotations: bool) -> tuple[Path, str]:
    """The folder of a training of `task`, and its output; the images are in `images` beside it."""
    images = write_folder(root / "images", size=32, train=16, validation=16, **annotations)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return train(task, images, root), out.getvalue()


@pytest.fixture(scope="session")
def segmented(tmp_path_factory) -> tuple[Path, str]:
    """The run of a segmenter, and its output."""
    return trained(tmp_path_factory.mktemp("segmented"), "segment", masks=True)


@pytest.fixture(scope="session")
def detected(tmp_path_factory) -> tuple[Path, str]:
    """The run of a detector, and its output."""
    return trained(tmp_path_factory.mktemp("detected"), "detect", coco=True)


def strict(path: Path) -> dict:
    """The content of a JSON file; NaN and Infinity, which other readers refuse, are errors."""

    def refuse(word: str) -> None:
        raise ValueError(f"{path} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
