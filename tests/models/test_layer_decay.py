"""Layer-wise learning rate decay against the official rule (`optim_factory.py` of facebookresearch/ConvNeXt-V2)."""

import re

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.optim import create_optimizer_v2

import timm_convnextv2  # noqa: F401
from timm_convnextv2.registry import VARIANTS

# Recipe of each size: layer ids, decay, weight decay.
RECIPES = dict.fromkeys(("atto", "femto", "pico", "nano"), ("single", 0.9, 0.3))
RECIPES |= dict.fromkeys(("tiny", "small"), ("single", 0.9, 0.05))  # small's is not the paper's
RECIPES |= dict.fromkeys(("base", "large", "huge"), ("group", 0.6, 0.05))


def official_scale(name: str, depths: tuple[int, ...], kind: str, decay: float) -> float:
    """The official rule, by the official names of the layers."""
    block = re.match(r"stages\.(\d)\.blocks\.(\d+)", name)
    downsample = re.match(r"stages\.(\d)\.downsample", name)
    stage = 0 if name.startswith("stem") else int(downsample[1]) if downsample else int(block[1]) if block else None
    if kind == "single":
        last = sum(depths) + 1
        layer = last if stage is None else sum(depths[:stage]) + 1 + (int(block[2]) if block else 0)
    else:
        last = 13
        if stage is None:
            layer = last
        elif block:
            layer = {0: 1, 1: 2, 2: 3 + int(block[2]) // 3, 3: 12}[stage]
        else:
            layer = {0: 0, 1: 2, 2: 3, 3: 12}[stage]
    return decay ** (last - layer)


def groups_by_name(model: torch.nn.Module, layer_decay: float, weight_decay: float) -> dict[str, tuple[float, float]]:
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=weight_decay, layer_decay=layer_decay)
    found = {p: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: found[p] for name, p in model.named_parameters()}


OPTIONS = [dict(num_classes=0), dict(patch_size=2), dict(head_norm_first=True)]
CASES = [*((size, {}) for size in RECIPES), *((size, more) for size in ("atto", "base") for more in OPTIONS)]


@pytest.mark.parametrize("size, options", CASES, ids=str)
def test_official_scales_and_weight_decay(size, options):
    """norm_pre is one of "the rest"; stage 0 only downsamples with patch_size 2, as a second part of the stem."""
    kind, layer_decay, weight_decay = RECIPES[size]
    model = timm.create_model(f"convnextv2_{size}", device="meta", **options)
    found = groups_by_name(model, layer_decay, weight_decay)
    for name, p in model.named_parameters():
        scale, decay = found[name]
        official = official_scale(name, VARIANTS[size]["depths"], kind, layer_decay)
        assert scale == pytest.approx(official, rel=1e-12), name
        # officially none on 1-D tensors, biases and GRN's gamma and beta
        assert decay == (0 if p.ndim == 1 or name.endswith("bias") or ".grn." in name else weight_decay), name


@pytest.mark.parametrize("size", ["atto", "base"])
def test_coarse_groups_are_timms(size):
    model = timm.create_model(f"convnextv2_{size}", device="meta")
    assert model.group_matcher(coarse=True) == ConvNeXt.group_matcher(model, coarse=True)


def test_grouped_rule_goes_on_for_other_depths():
    model = timm.create_model("convnextv2_base", depths=(1, 1, 7, 1), dims=(8, 8, 8, 8), num_classes=3)
    found = groups_by_name(model, 0.5, 0.05)
    stage_2 = [found[f"stages.2.blocks.{b}.norm.weight"][0] for b in range(7)]
    assert stage_2 == [0.5**4] * 3 + [0.5**3] * 3 + [0.5**2]
    assert found["stages.3.downsample.0.weight"][0] == 0.5 and found["head.fc.weight"][0] == 1


def test_the_encoder_inside_fcmae_has_its_sizes_type():
    options = dict(depths=(1, 1, 3, 1), dims=(8, 8, 8, 8), decoder_dim=8, img_size=64)
    for size in ("atto", "base"):
        model = timm.create_model(f"fcmae_convnextv2_{size}", **options)
        assert model.encoder.layer_decay_type == RECIPES[size][0]
        model.encoder.layer_decay_type = "pairs"
        with pytest.raises(ValueError, match="'single'.*'group'.*'pairs'"):
            model.encoder.group_matcher()
