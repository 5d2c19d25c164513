"""The examples of docs/data.md and docs/large-images.md run as written, up to encoders that timm opens."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from timm_convnextv2.commands import main as cli
from timm_convnextv2.pretrain import loop, measures

DOCS = Path(__file__).parents[1] / "docs"
# of the same run, in seconds
SMALLER = "--epochs 1 --decoder-dim 8 --model-kwargs depths=[1,1,1,1] dims=[8,12,16,20] --device cpu".split()


def examples(page: str) -> dict[str, list[tuple[str, str]]]:
    """The blocks of Python and of the shell of a page, by the heading that they are below."""
    found: dict[str, list[tuple[str, str]]] = {}
    heading = ""
    for title, kind, text in re.findall(
        r"^## ([^\n]*)$|^```(python|bash)\n(.*?)```", (DOCS / page).read_text(), re.S | re.M
    ):
        heading = title or heading
        if kind:
            found.setdefault(heading, []).append((kind, text))
    return found


def run_section(page: str, heading: str) -> list[str]:
    """Runs the code of a section of the page in the folder we are in; returns the commands that ran."""
    ran = []
    for kind, text in examples(page)[heading]:
        if kind == "python":
            exec(compile(text, page, "exec"), {})
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


@pytest.mark.parametrize(
    "page, heading, commands, package",
    [
        ("data.md", "From raw scenes to an encoder", ["check", "stats", "pretrain", "embed"], "tifffile"),
        ("large-images.md", "Windows out of huge images", ["check", "stats", "pretrain"], "tifffile"),
        ("large-images.md", "Stacks", ["stats", "pretrain"], "tifffile"),
        ("large-images.md", "X-rays: DICOM", ["check", "stats", "pretrain", "embed"], "pydicom"),
    ],
)
def test_from_raw_files_to_an_encoder(page, heading, commands, package, tmp_path, capsys):
    pytest.importorskip(package)
    assert run_section(page, heading) == commands
    printed = capsys.readouterr().out
    assert "standard error of the mean" in printed and "torch.Size([" in printed.splitlines()[-1]
    if heading == "From raw scenes to an encoder":
        assert "--mean auto, --std auto, --clip-percentiles: measured on" in printed
    for features in tmp_path.glob("*.npy"):
        assert np.isfinite(np.load(features)).all()


def test_two_roots_and_a_list(monkeypatch, capsys):
    monkeypatch.setattr(loop, "save_loss_curve", lambda *_: None)  # drawing takes longer than the runs
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(measures, "save_reconstructions", lambda *_: None)
    assert run_section("data.md", "Where the files are") == ["check", "pretrain", "pretrain", "embed"]
    printed = capsys.readouterr()
    assert "Written: cameras.index, an index of 43 images." in printed.err
    assert "; 43 images of 3 x 32 x 32" in printed.out
    assert "cameras/yard: 8 images, 33.3% of an epoch, each drawn 2 times per epoch" in printed.out
    assert "torch.Size([" in printed.out.splitlines()[-1] and len(np.load("cameras.npy")) == 48


def test_no_example_is_left_out():
    for page in ("data.md", "large-images.md"):
        assert len(examples(page)) == {"data.md": 2, "large-images.md": 3}[page]
