"""The commands of docs/transfer.md: all are options that exist, and all run as written."""

import json
import re
import shlex

import pytest
from encoders import make_encoder
from helpers import ROOT

from timm_convnextv2.commands import detect, segment
from timm_convnextv2.commands.main import main

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")

PAGE = (ROOT / "docs/transfer.md").read_text()
TASKS = {"detect": detect.COMMAND, "segment": segment.COMMAND}


def commands_of(text):
    """The words of the commands on data, detection and segmentation in the blocks of a page."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [words for words in lines if {*words[1:2]} & {"demo", *TASKS}]


def run(words, *more):
    return main([*words[1:], *more])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an encoder where pretraining without arguments leaves it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    make_encoder(tmp_path / "output/demo/encoder", patch_size=1)
    return tmp_path


def test_all_commands_are_known_and_training_would_begin(here, capsys):
    """Those that train, with --dry-run."""
    commands = commands_of(PAGE)
    assert [words[1:3] for words in commands if words[1] != "demo"] == [
        [task, action] for task in TASKS for action in ("train", "eval", "predict")
    ]
    for words in commands:
        if words[1] == "demo":
            assert run(words, "--train", "16", "--validation", "8") == 0
        elif words[2] == "train":
            assert run(words, "--dry-run", "-j", "0", "--device", "cpu") == 0
        else:
            assert TASKS[words[1]].parse(words[2:])[0] == words[2]
    assert capsys.readouterr().out.count("updates of 8 images") == 2
    for name, options in TASKS.items():  # in the text, too
        for line in re.findall(rf"timm-convnextv2 {name} ((?:train|eval|predict) -[^`\n]+)`", PAGE):
            options.parse(shlex.split(line))


@pytest.mark.slow
def test_they_run_as_written(here, capsys):
    """With an encoder of random weights, so that nothing is said of AP."""
    for words in commands_of(PAGE):
        assert run(words) == 0, words
    out = capsys.readouterr().out
    assert "ap50" in out and "mIoU" in out
    assert len(json.loads((here / "found.json").read_text())["images"]) == 80
    assert len(list((here / "masks").glob("*.png"))) == 80
    for name in ("boxes", "classes"):
        assert (here / "output" / name / "report.html").stat().st_size > 20_000
