"""The losses of 50 updates stay: crops, masks, initial weights, drop path, schedule and numerics."""

import json

import pytest
from helpers import ROOT

from timm_convnextv2 import FCMAETask
from timm_convnextv2.commands.pretrain import main


def test_same_losses(tmp_path, no_images, monkeypatch):
    losses, forward = [], FCMAETask.forward

    def noted(self, *args):
        output = forward(self, *args)
        losses.append(output["loss"].item())
        return output

    monkeypatch.setattr(FCMAETask, "forward", noted)
    options = "--num-images 40 --batch-size 4 --img-size 40 --patch-size 1 --epochs 5 --lr 7.8125e-4 --workers 0"
    options += " --decoder-dim 32 --warmup-epochs 1 --recon-interval 100 --device cpu --experiment r"
    options += " --scale 0.2 1 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    kwargs = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(16,24,32,40)", "drop_path_rate=0.1"]
    assert main([*options.split(), *kwargs, "--output", str(tmp_path)]) == 0
    expected = json.loads((ROOT / "tests/fixtures/losses.json").read_text())
    assert len(losses) == 50 and max(expected) - min(expected) > 0.1
    assert losses == pytest.approx(expected, rel=2e-5)  # other processors add in another order
