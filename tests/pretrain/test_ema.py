"""A moving average of a short run: it starts short, or the user is told that it would be mostly the start."""

import copy
from dataclasses import replace

import pytest
import yaml
from runs import at_update, load, run
from safetensors.torch import load_file

from timm_convnextv2.pretraining import messages
from timm_convnextv2.pretraining.config import Average

EMA = ["--model-ema", "--lr", "1e-2", "--warmup-epochs", "0"]


def share_of_start(out, first):
    """How much of the way from the end back to where averaging began the exported encoder is."""
    last, found = load(out)["state_dict"], load_file(out / "encoder" / "model.safetensors")

    def distance(weights):
        keys = [k for k in found if not k.startswith("head.")]
        return sum((weights(k) - last[f"encoder.{k}"]).square().sum() for k in keys).sqrt()

    return float(distance(found.__getitem__) / distance(lambda k: first[f"encoder.{k}"]))


@pytest.fixture
def first(monkeypatch, updates):
    """Weights after the second update: up to there timm copies them."""
    weights = {}
    at_update(monkeypatch, 1, lambda: weights.update(copy.deepcopy(updates[-1][1].model.state_dict())))
    return weights


@pytest.mark.parametrize("warmup", [True, False])
def test_short_run(tmp_path, no_images, capsys, first, warmup):
    out = run(tmp_path / "r", *EMA, *[] if warmup else ["--no-model-ema-warmup"], epochs=4)
    moved = 1 - share_of_start(out, first)
    printed = capsys.readouterr().err
    if warmup:
        assert moved > 0.6 and "moving average" not in printed
    else:
        assert moved < 0.05
        assert printed.startswith("warning: 100% of the moving average") and "Add --model-ema-warmup" in printed
    assert load(out)["args"]["model_ema_warmup"] is warmup


@pytest.mark.parametrize(
    "decay, warmup, updates, warned",
    [
        (0.9999, False, 192, True),
        (0.9999, True, 192, False),
        (0.9999, False, 29000, True),
        (0.9999, False, 31000, False),
        (0.98, False, 192, False),
        (0.9, False, 20, True),
    ],
)
def test_warning_names_a_decay_that_fits(decay, warmup, updates, warned):
    settings = Average(model_ema=True, model_ema_decay=decay, model_ema_warmup=warmup)
    found = messages.ema_warnings(settings, updates)
    assert bool(found) == warned
    if warned:
        fits = float(found[0].rpartition("lower the decay to ")[2].rstrip("."))
        assert decay > fits > 0 and not messages.ema_warnings(replace(settings, model_ema_decay=fits), updates)
    assert not messages.ema_warnings(replace(settings, model_ema=False), updates)


@pytest.mark.parametrize("said, expected", [([], False), (["--model-ema-warmup"], True)])
def test_resumed_run_keeps_its_setting(tmp_path, no_images, said, expected):
    """Of a version whose default was another; the command line wins."""
    out = run(tmp_path / "r", *EMA, "--no-model-ema-warmup")
    run(out, *EMA, *said, "--resume", "auto", epochs=2)
    assert yaml.safe_load((out / "args.yaml").read_text())["model_ema_warmup"] is expected
