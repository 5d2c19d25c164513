"""The mean cosine distance of channels, against its definition and in every kind of model."""

import math

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt

import timm_convnextv2
from timm_convnextv2.features import channel_distance, channel_maps, collapse
from timm_convnextv2.models import random_mask

SIZE = dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), patch_size=1)


def by_definition(x):
    """Mean of (1 - cosine) / 2 over all pairs of the channels of `[positions, C]`."""
    x = x / x.norm(dim=0)
    return ((1 - x.T @ x) / 2).mean()


def shaken(model):
    """Weights that no initialisation gives, so that layer scale and GRN act."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.double()


def test_equals_the_definition_over_all_pairs():
    x = torch.randn(3, 50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.7
    distance, dead = channel_distance(x)
    assert torch.allclose(distance, torch.stack([by_definition(image) for image in x]), rtol=1e-12, atol=0)
    assert not dead.any()


def test_planted_collapse_and_independence():
    generator = torch.Generator().manual_seed(0)
    one, scales = torch.randn(2, 400, 1, generator=generator), torch.rand(64, generator=generator) + 0.1
    assert channel_distance(one * scales)[0].max() < 1e-6
    assert channel_distance(torch.randn(2, 400, 64, generator=generator))[0].sub(0.5).abs().max() < 0.02


def test_dead_channels_are_counted_and_left_out():
    x = torch.randn(1, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = by_definition(x[0, :, :6])
    x[..., 6], x[..., 7] = 0, x[..., 7] * 1e-9
    distance, dead = channel_distance(x)
    assert math.isclose(distance.item(), expected.item(), rel_tol=1e-12) and dead.item() == 0.25
    nothing, all_dead = channel_distance(torch.zeros(1, 5, 4))
    assert nothing.isnan().all() and all_dead.item() == 1


V2, CONV = dict(use_grn=True, ls_init_value=None), dict(conv_mlp=True)
MODELS = {
    "ours": (timm_convnextv2.ConvNeXtV2, V2), "ours, 1x1 convolutions": (timm_convnextv2.ConvNeXtV2, {**V2, **CONV}),
    "ours, V1": (timm_convnextv2.ConvNeXtV2, dict(use_grn=False, ls_init_value=1e-6, **CONV)),
    "timm V1": (ConvNeXt, {}), "timm V1, 1x1 convolutions": (ConvNeXt, CONV),
    "timm V2": (ConvNeXt, V2), "timm V2, 1x1 convolutions": (ConvNeXt, {**V2, **CONV}),
}  # fmt: skip


def build(kind):
    make, options = MODELS[kind]
    return shaken(make(**SIZE, **options))


def second_input(block, x):
    """Straight from the layers: `[B, positions, C]` of a block's input `[B, C, H, W]`."""
    mlp = block.mlp
    x = torch.nn.functional.conv2d(
        x, block.conv_dw.weight, block.conv_dw.bias, padding=block.conv_dw.padding, groups=x.shape[1]
    ).permute(0, 2, 3, 1)
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps)
    x = torch.nn.functional.gelu(torch.nn.functional.linear(x, mlp.fc1.weight.flatten(1), mlp.fc1.bias))
    if hasattr(mlp, "grn"):
        norm = x.norm(dim=(1, 2), keepdim=True)
        norm = norm / (norm.mean(-1, keepdim=True) + mlp.grn.eps)
        x = x + x * norm * mlp.grn.weight + mlp.grn.bias
    return x.flatten(1, 2)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_of_a_model_at_the_second_linear(kind):
    model = build(kind).train()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    inputs, blocks = {}, {name: m for name, m in model.named_modules() if hasattr(m, "conv_dw")}
    keep = [m.register_forward_pre_hook(lambda _, x, n=n: inputs.__setitem__(n, x[0])) for n, m in blocks.items()]
    before = model.eval()(images)
    for handle in keep:
        handle.remove()
    model.train()
    found = collapse(model, images, batch_size=2)
    assert model.training and all(m.training for m in model.modules())
    assert [b.block for b in found] == list(blocks)
    assert [b.depth for b in found] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    for entry in found:
        expected = [by_definition(x) for x in second_input(blocks[entry.block], inputs[entry.block])]
        assert entry.distance == pytest.approx(float(sum(expected) / 5), rel=1e-9) and entry.dead == 0
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.eval()(images), before)


def test_hooks_change_no_output():
    """The fused token MLP steps aside while there are hooks, and computes the same."""
    model = build("ours").eval()
    images, seen = torch.randn(2, 3, 16, 16, dtype=torch.float64), []
    block = model.stages[1].blocks[0]
    x = model.stages[1].downsample(model.stages[0](model.stem(images)))
    assert not block.why_eager(x)
    block.mlp.fc2.register_forward_pre_hook(lambda *_: seen.append("its hook"))
    assert block.why_eager(x)
    hooked = model.forward_features(images)
    block.mlp.fc2._forward_pre_hooks.clear()
    assert seen == ["its hook"]
    assert torch.allclose(hooked, model.forward_features(images), rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def fcmae():
    sizes = dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), patch_size=1, img_size=32, decoder_dim=8)
    return shaken(timm.create_model("fcmae_convnextv2_atto", **sizes))


def test_packed_is_the_visible_part_of_dense(fcmae):
    """With nothing removed, packed positions are the dense ones in another order; else fewer of them are measured."""
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    dense = collapse(fcmae, images)
    assert dense == collapse(fcmae.encoder, images)
    whole = collapse(fcmae, images, torch.zeros(3, 4, 4, dtype=torch.bool))
    assert [b.distance for b in whole] == pytest.approx([b.distance for b in dense], rel=1e-9)
    masks = random_mask(3, (4, 4), 0.6, generator=torch.Generator().manual_seed(0))
    packed = collapse(fcmae, images, masks, batch_size=2)
    assert packed[0].distance != pytest.approx(dense[0].distance, rel=1e-6)
    hidden = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert [b.distance for b in collapse(fcmae, changed, masks)] == pytest.approx([b.distance for b in packed])


def test_maps_of_channels(fcmae):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    name, maps = channel_maps(fcmae, images, batch_size=1)
    assert name == "stages.2.blocks.0" and maps.shape == (2, 64, 8, 8) and maps.dtype == torch.float32
    name, some = channel_maps(fcmae.encoder, images, "stages.2.blocks.0", [3, 60])
    assert torch.allclose(some, maps[:, [3, 60]])
    assert channel_maps(fcmae, images, "stages.0.blocks.0")[1].shape == (2, 32, 32, 32)  # it has 32 channels


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: collapse(timm.create_model("resnet18"), x), "ResNet has 8 BasicBlock, expected"),
        (lambda m, x: collapse(torch.nn.Linear(2, 2), x), "Linear has no blocks"),
        (lambda m, x: collapse(m.encoder, x, torch.zeros(2, 4, 4).bool()), "is a ConvNeXtV2. Leave them out"),
        (lambda m, x: collapse(m, x[:0]), "no images"),
        (lambda m, x: collapse(m, x * math.nan), "stages.0.blocks.0 gives NaN"),
        (lambda m, x: channel_maps(m, x, "stages.7"), "no block 'stages.7'; there are: stages.0.blocks.0"),
        (lambda m, x: channel_maps(m, x, channels=[999]), r"\[999\].* has 0 to 63"),
    ],
)
def test_what_cannot_be_measured(fcmae, call, message):
    with pytest.raises(ValueError, match=message):
        call(fcmae, torch.randn(2, 3, 32, 32, dtype=torch.float64))
