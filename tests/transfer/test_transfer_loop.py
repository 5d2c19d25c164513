"""Schedules, and learning rates by layer in a run."""

import pytest
import torch
from tiny import BACKBONE, SEGMENTER, SHORT
from torch import nn

from timm_convnextv2.commands.segment import COMMAND
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.runs.plan import Plan
from timm_convnextv2.runs.world import World
from timm_convnextv2.transfer.loop import create_schedule
from timm_convnextv2.transfer.task import create_trainer


@pytest.mark.parametrize(
    "kind, updates, warmup, expected",
    [
        ("cosine", 100, 0, {0: 1, 50: 0.5, 100: 0}),
        ("poly", 100, 0, {0: 1, 50: 0.5, 100: 0}),
        # the paper's detector: 36 epochs, a tenth after the 27th and the 33rd
        ("step", 360, 0, {0: 1, 269: 1, 270: 0.1, 329: 0.1, 330: 0.01}),
        ("step", 360, 100, {0: 0.001, 50: 0.5005, 100: 1, 269: 1, 270: 0.1}),  # the warmup moves no step
    ],
    ids=["cosine", "poly", "step", "warmup"],
)
def test_schedules(kind, updates, warmup, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_schedule(optimizer, Plan(updates, updates // 36, 1, 1.0, warmup), kind, steps=(27, 33))
    found = {}
    for update in expected:
        scheduler.step_update(update)
        found[update] = optimizer.param_groups[0]["lr"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_learning_rates_of_the_groups(tmp_path, opt):
    data = write_folder(tmp_path / "d", size=32, train=8, validation=8, masks=True)
    words = [*BACKBONE, *SEGMENTER, *SHORT, "--data-dir", str(data), "--layer-decay", "0.5", "--warmup-share", "0.1"]
    config = COMMAND.parse(["train", *words, "--opt", opt, "--lr", "0.1", "--warmup-updates", "3"])[1]
    world = World("cpu")
    trainer = create_trainer(COMMAND.task(config), config, Plan(4, 2, 4, 0.1, 3), world)
    trainer.scheduler.step_update(0)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) == pytest.approx(0.01) and min(rates) < 0.001
    world.close()
