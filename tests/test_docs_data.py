"""The examples of docs/data.md run as written, up to encoders that timm opens."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from timm_convnextv2 import cli
from timm_convnextv2.pretrain import loop, measures

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
# of the same run, in seconds
SMALLER = "--epochs 1 --decoder-dim 8 --model-kwargs depths=[1,1,1,1] dims=[8,12,16,20] --device cpu".split()


def run_section(title: str) -> list[str]:
    """Runs the code of a section of the page in the folder we are in; returns the commands that ran."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)
    ran = []
    for kind, text in re.findall(r"```(python|bash)\n(.*?)```", section, re.S):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            program, name, *words = shlex.split(line)
            assert program == "timm-convnextv2"
            words += SMALLER if name == "pretrain" else ["-j", "0"] if name in ("stats", "check") else []
            assert cli.main([name, *words]) == 0, line
            ran.append(name)
    return ran


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_from_raw_scenes_to_an_encoder(capsys):
    assert run_section("From raw scenes to an encoder") == ["check", "stats", "pretrain", "embed"]
    printed = capsys.readouterr().out
    assert "--mean auto, --std auto, --clip-percentiles: measured on" in printed
    assert "torch.Size([" in printed.splitlines()[-1]
    assert np.isfinite(np.load("scenes.npy")).all()


def test_two_roots_and_a_list(monkeypatch, capsys):
    monkeypatch.setattr(loop, "save_loss_curve", lambda *_: None)  # drawing takes longer than the runs
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(measures, "save_reconstructions", lambda *_: None)
    assert run_section("Where the files are") == ["check", "pretrain", "pretrain", "embed"]
    printed = capsys.readouterr()
    assert "Written: cameras.index, an index of 43 images." in printed.err
    assert "; 43 images of 3 x 32 x 32" in printed.out
    assert "cameras/yard: 8 images, 33.3% of the places, each 2 times an epoch" in printed.out
    assert "torch.Size([" in printed.out.splitlines()[-1] and len(np.load("cameras.npy")) == 48
