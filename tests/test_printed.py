"""Every command that a command prints runs as printed, on the CPU; only placeholders are replaced."""

import os
import shlex
from pathlib import Path

import pytest
from real import call, strict

from timm_convnextv2.commands.main import main
from timm_convnextv2.commands.stats import main as stats
from timm_convnextv2.report.kinds import BASELINES, KINDS
from timm_convnextv2.report.run import read_run

STAND_IN = Path(__file__).parent / "finetune" / "stand_in_train.py"


def commands_in(printed: str, replace: dict[str, str]) -> list[list[str]]:
    """The words after the program of each command that stands on a line of its own."""
    found = []
    for line in printed.splitlines():
        for placeholder, value in replace.items():
            line = line.replace(f" {placeholder}", f" {value}")
        words = shlex.split(line) if line.startswith("  ") and "'" in line + "'" else []
        for start in ("timm-convnextv2", "timm_convnextv2", "-c"):
            if start in words[:3] and words[0] != "-c":
                found.append(words[words.index(start) + (start != "-c") :])
                break
    return found


@pytest.fixture
def run(tmp_path, monkeypatch, demo):
    """Runs what was printed; returns the names of the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMM_TRAIN", os.environ.get("TIMM_TRAIN") or str(STAND_IN))

    def run(printed: str, data: Path = demo) -> list[str]:
        places = dict.fromkeys(("DATA", "IMAGES", "LABELLED"), str(data))
        commands = commands_in(printed, {**places, "USER/NAME": "me/x", "ID": "mit"})
        for name, *words in commands:
            if name == "-c":
                exec(words[0], {})
            elif name == "finetune":  # timm's train.py is not here
                assert "--device" in words and main([name, *words, "--dry-run"]) == 0, words
            else:
                assert main([name, *words]) == 0, words
        return [name for name, *_ in commands]

    return run


def test_after_pretraining(pretrained, run):
    folder, printed = pretrained
    assert run(printed) == ["evaluate", "-c", "finetune", "embed", "publish"]
    settings = read_run(folder).settings
    steps = KINDS["pretraining"].next_steps(settings, folder)
    assert all(step.command in printed for step in steps)  # the report's are the same
    own = [step.why for step in KINDS["pretraining"].next_steps(settings | {"divide": 4095.0}, folder)]
    assert sum("convert stored values" in why for why in own) == 1


def test_the_last_line_is_what_the_probe_found(pretrained):
    folder, printed = pretrained
    probe = strict(folder / "probe.json")
    sides = [f"{BASELINES[name]} {of['knn']:.3g} %" for name, of in probe["baselines"].items()]
    knn = read_run(folder).column("eval_knn")
    words = f"kNN of frozen features: {knn[max(knn)]:.3g} % ({', '.join(sides)}, chance {probe['chance']:.3g} %)"
    assert len(sides) >= 3 and printed.rstrip().splitlines()[-1] == words


@pytest.mark.parametrize("task, kind", [("segment", "segmentation"), ("detect", "detection")])
def test_after_a_training(request, run, task, kind):
    folder, printed = request.getfixturevalue(f"{task}ed")
    assert all(step.command in printed for step in KINDS[kind].next_steps(read_run(folder).settings, folder))
    assert {task, "publish"} <= {*run(printed, folder.parent / "images" / "validation" / "images")}


def test_after_stats(demo, tmp_path, capsys, run):
    """The options that `stats` prints are those of a pretraining."""
    assert stats([str(demo / "validation"), "-j", "0", "--output", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    options = printed.partition("to paste:\n")[2].splitlines()[0]
    words = ["--data-dir", demo / "validation", "--device", "cpu", "--workers", "0", "--dry-run", "--output", tmp_path]
    call("pretrain --img-size 32 --patch-size 1 --epochs 1 --batch-size 4", *words, *shlex.split(options))
