"""Learning rates of backbone, pyramid and heads against the rule of the paper's detection and segmentation code."""

import re

import pytest
import torch
from torch import nn

from timm_convnextv2.transfer import create_backbone, parameter_groups


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
