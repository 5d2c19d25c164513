"""The example of docs/data.md runs as written, up to an encoder that timm opens."""

import re
import shlex
from pathlib import Path

import numpy as np

from timm_convnextv2 import cli

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
# of the same run, in seconds
SMALLER = "--epochs 1 --decoder-dim 8 --model-kwargs depths=[1,1,1,1] dims=[8,12,16,20] --device cpu".split()


def test_from_raw_scenes_to_an_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ran = []
    for kind, text in re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), re.S):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            program, name, *words = shlex.split(line)
            assert program == "timm-convnextv2"
            words += SMALLER if name == "pretrain" else ["-j", "0"] if name in ("stats", "check") else []
            assert cli.main([name, *words]) == 0, line
            ran.append(name)
    assert ran == ["check", "stats", "pretrain", "embed"]
    printed = capsys.readouterr().out
    assert "--mean auto, --std auto, --clip-percentiles: measured on" in printed
    assert "torch.Size([" in printed.splitlines()[-1]
    assert np.isfinite(np.load("scenes.npy")).all()
