"""Learning rates: schedules, and layers against the rule of the paper's detection and segmentation code."""

import re

import pytest
import torch
from tiny import BACKBONE, SEGMENTER, SHORT
from torch import nn

from timm_convnextv2.commands.segment import COMMAND
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.runs.plan import Plan
from timm_convnextv2.runs.world import World
from timm_convnextv2.transfer import create_backbone, parameter_groups
from timm_convnextv2.transfer.loop import create_schedule
from timm_convnextv2.transfer.task import create_trainer


def exponents(blocks):
    """`layer_wise` of the official LearningRateDecayOptimizerConstructor: part of the backbone -> exponent."""
    top = blocks // 3 + 1  # num_layers is 6 for 9 blocks in stage 3, and 12 for 27
    return {
        "stem": top + 3, "stages.0.blocks": top + 2, "stages.1.downsample": top + 1, "stages.1.blocks": top + 1,
        "stages.2.downsample": top, **{f"stages.2.blocks.{b}": top - b // 3 for b in range(blocks)},
        "stages.3.downsample": 1, "stages.3.blocks": 1,
    }  # fmt: skip


TINY, BASE = exponents(9), exponents(27)


class Whole(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.body, self.pyramid, self.head = backbone, nn.Conv2d(8, 8, 3), nn.Linear(8, 2)


def exponent_of(name, table):
    name = re.sub(r"^model\.(stem|stages)_", r"\1.", name)
    return next(table[key] for key in sorted(table, key=len, reverse=True) if f"{name}.".startswith(f"{key}."))


@pytest.mark.parametrize("model, table, decay", [("tiny", TINY, 0.95), ("base", BASE, 0.9)])
def test_learning_rates_are_those_of_the_paper(model, table, decay):
    with torch.device("meta"):
        backbone = create_backbone(f"convnextv2_{model}", pretrained=False)
    whole = Whole(backbone)
    seen, used = {}, set()
    for group in parameter_groups(whole, backbone, weight_decay=0.05, layer_decay=decay):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert group["weight_decay"] == (0 if parameter.ndim == 1 else 0.05), name
            seen[name] = group["lr_scale"]
    assert set(seen) == {name for name, _ in whole.named_parameters()}
    for name, scale in seen.items():
        part, _, rest = name.partition(".")
        if part == "body":
            used.add(exponent_of(rest, table))
            assert scale == pytest.approx(decay ** exponent_of(rest, table)), name
        else:
            assert scale == 1.0, name
    assert used == set(table.values())


def test_a_stock_model_decays_by_its_own_layers_and_frozen_ones_are_left_out():
    backbone = create_backbone("resnet18", pretrained=False)
    whole = Whole(backbone)
    whole.pyramid.requires_grad_(False)
    groups = parameter_groups(whole, backbone, weight_decay=0.1, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head.weight"] == 1 > scale["body.model.layer4.1.conv2.weight"] > scale["body.model.conv1.weight"]
    assert not any(name.startswith("pyramid") for name in scale)


def test_mistakes():
    backbone = create_backbone("resnet18", pretrained=False)
    with pytest.raises(ValueError, match="not a part of the model"):
        parameter_groups(nn.Linear(2, 2), backbone, weight_decay=0.1)
    with pytest.raises(ValueError, match="layer_decay is 1.5, expected"):
        parameter_groups(Whole(backbone), backbone, weight_decay=0.1, layer_decay=1.5)
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\]; expected stages of growing stride"):
        create_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32)


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
