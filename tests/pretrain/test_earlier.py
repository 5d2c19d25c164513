"""What version 0.1.0 computed and wrote: the same losses, and its checkpoints resume, export and publish."""

import csv
import json
import shutil

import pytest
from helpers import ROOT, assert_same
from runs import load, steady
from safetensors.torch import load_file

from timm_convnextv2 import FCMAETask
from timm_convnextv2.commands.pretrain import main

FIXTURES = ROOT / "tests" / "fixtures"
CLOSE = dict(rtol=1e-4, atol=1e-5)  # other processors add in another order


def test_same_losses(tmp_path, no_images, monkeypatch):
    """50 updates: crops, masks, initial weights, drop path, schedule and numerics are those of 0.1.0."""
    losses, forward = [], FCMAETask.forward

    def noted(self, *args):
        output = forward(self, *args)
        losses.append(output["loss"].item())
        return output

    monkeypatch.setattr(FCMAETask, "forward", noted)
    options = "--train-num-samples 40 --batch-size 4 --img-size 40 --patch-size 1 --epochs 5 --lr-base 0.05 --workers 0"
    options += " --decoder-dim 32 --warmup-epochs 1 --recon-interval 100 --device cpu --experiment r"
    kwargs = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(16,24,32,40)", "drop_path_rate=0.1"]
    assert main([*options.split(), *kwargs, "--output", str(tmp_path)]) == 0
    expected = json.loads((FIXTURES / "losses_0.1.json").read_text())
    assert len(losses) == 50 and max(expected) - min(expected) > 0.1
    assert losses == pytest.approx(expected, rel=2e-5)


@pytest.fixture
def earlier(tmp_path):
    """A copy of the run that 0.1.0 left, and its command line."""
    shutil.copytree(FIXTURES / "run_0.1", tmp_path / "runs" / "stopped")
    options = "--train-num-samples 16 --batch-size 4 --img-size 32 --patch-size 1 --epochs 3 --lr-base 0.05 --workers 0"
    options += " --decoder-dim 8 --model-ema --model-ema-decay 0.9 --warmup-epochs 0.5 --device cpu"
    kwargs = ["--model-kwargs", "depths=(1,1,1,1)", "dims=(8,12,16,20)", "drop_path_rate=0.1"]
    place = ["--output", str(tmp_path / "runs"), "--experiment", "stopped"]
    return tmp_path / "runs" / "stopped", [*options.split(), *kwargs, *place]


def test_its_run_resumes(earlier, no_images):
    out, options = earlier
    assert load(out)["progress"]["update"] == 2  # in the middle of an epoch
    assert main([*options, "--resume", "auto"]) == 0
    expected = load_file(out / "expected-encoder.safetensors")
    assert_same(load_file(out / "encoder/model.safetensors"), expected, **CLOSE)
    moved = load_file(FIXTURES / "run_0.1/encoder/model.safetensors")
    far = max((moved[k] - v).abs().max() for k, v in expected.items())
    assert far > 10 * CLOSE["atol"]  # what a checkpoint that is not taken would show
    found = steady(out)
    with open(out / "expected-summary.csv", newline="") as f:
        for here, there in zip(found, csv.DictReader(f), strict=True):
            assert float(here["train_loss"]) == pytest.approx(float(there["train_loss"]), rel=1e-4)
            added = {"eval_distance", "eval_dead"}  # measured since
            assert here["lr"] == there["lr"] and here.keys() - added <= there.keys()


def test_its_settings_are_read(earlier, no_images, tmp_path):
    """`--config args.yaml` of 0.1.0 starts the same run again."""
    out, _ = earlier
    expected = load_file(out / "expected-encoder.safetensors")
    assert main(["--config", str(out / "args.yaml"), "--output", str(tmp_path), "--experiment", "again"]) == 0
    assert_same(load_file(tmp_path / "again/encoder/model.safetensors"), expected, **CLOSE)
