"""SIGKILL at random moments, also in the middle of a checkpoint or an export: the run ends as one without."""

import json
from pathlib import Path

import pytest
from helpers import run_python

from timm_convnextv2.pretraining import loop
from timm_convnextv2.runs import folder

KILLER = Path(__file__).with_name("killer.py")
OPTIONS = ["--num-images", "8", "--img-size", "32", "--patch-size", "1", "--batch-size", "4", "--workers", "0"]
OPTIONS += ["--decoder-dim", "8", "--model-kwargs", "depths=[1,1,1,1]", "dims=[8,12,16,20]", "drop_path_rate=0.1"]
OPTIONS += ["--epochs", "2", "--model-ema", "--device", "cpu", "--lr", "1e-2"]


@pytest.mark.parametrize("tries, seed", [(2, 3), pytest.param(25, 1, marks=pytest.mark.slow)])
def test_killed_runs_end_as_one_that_was_not(tmp_path, tries, seed):
    result = run_python(KILLER, tmp_path, tries, seed, *OPTIONS, timeout=60 + 60 * tries)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert result.returncode == 0 and len(found) == tries, result.stderr + logs
    assert all(each["same"] and not each["left"] for each in found), f"{found}\n{logs}"
    kills = [kill for each in found for kill in each["kills"]]
    assert any(kill not in ("starting", "training") for kill in kills), kills  # some in the middle of a write
    for path in tmp_path.glob("run*/*"):
        assert any(path.match(pattern) for pattern in (*folder.WRITTEN, *loop.WRITTEN)), path
