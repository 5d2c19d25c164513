"""LayerNorm of stem and downsampling: the operation, the layer and the models that have it.

Triton's kernels are interpreted on CPU everywhere, compiled where there is a CUDA GPU.
"""

from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from kernels import nodes
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers import RmsNorm2d
from torch import nn

import timm_convnextv2  # noqa: F401  (registers the models)
from timm_convnextv2 import ops
from timm_convnextv2.layers import LayerNorm2d
from timm_convnextv2.models.explain import explanation
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.ops.functional import layer_norm
from timm_convnextv2.ops.layer_norm import fused_layer_norm
from timm_convnextv2.transfer.backbone import create_backbone
from timm_convnextv2.transfer.detection.detector import Pyramid
from timm_convnextv2.transfer.segmentation.segmenter import Segmenter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODEL = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 40), img_size=64, decoder_dim=16)


def tolerance(*dtypes: torch.dtype) -> float:
    """Of a relative error: the interpreter cuts bfloat16 off instead of rounding."""
    return max(5e-6, 2 * max(torch.finfo(dtype).eps for dtype in dtypes))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def tensors(device: str, shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> list[torch.Tensor]:
    """Input, weight and bias, far from the values that layers begin with."""
    x = torch.randn(shape, device=device).mul(2).add(1).to(dtype)
    return [x, *(torch.randn(shape[-1], device=device).to(weights) for _ in range(2))]


SHAPES = [(2, 5, 3, 40), (3, 1, 1, 7), (2, 4, 9, 96), (1, 19, 2, 1)]


@pytest.mark.parametrize(
    "shape, dtype, out", [*product(SHAPES[:1], DTYPES, DTYPES), *((s, *DTYPES[:2]) for s in SHAPES[1:])], ids=str
)
def test_values_and_gradients(as_backend, shape, dtype, out):
    check_values_and_gradients(as_backend.device, shape, dtype, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_values_and_gradients_of_fused(shape, dtype):
    with ops.use_backend("fused"):
        check_values_and_gradients("cpu", shape, dtype, dtype)


def check_values_and_gradients(device: str, shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> None:
    given = [t.requires_grad_() for t in tensors(device, shape, dtype, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in given]
    y, y64 = fused_layer_norm(*given, 1e-6, out), F.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-6)
    assert y.dtype == out and y.shape == shape and y.is_contiguous()
    assert error(y, y64) <= tolerance(out)
    grad = torch.randn(shape[::-1], device=y.device).to(out).permute(3, 2, 1, 0)  # not contiguous
    found = torch.autograd.grad(y, given, grad)
    for ours, t, theirs in zip(found, given, torch.autograd.grad(y64, exact, grad.double()), strict=True):
        assert ours.dtype == t.dtype and ours.shape == t.shape
        if shape[-1] == 1 and t is given[0]:  # zero, as a difference of terms of the size of 1 / sqrt(eps)
            assert not theirs.any() and ours.abs().max() <= 1e3 * tolerance(dtype)
        else:
            assert error(ours, theirs) <= tolerance(dtype), t.shape


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (False, False, True)], ids=str)
def test_only_the_gradients_that_are_needed(as_backend, needs):
    given = tensors(as_backend.device, (2, 3, 4, 20), torch.float32, torch.float32)
    want = [t.detach().clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    found = [t.detach().clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    fused_layer_norm(*found, 1e-6, torch.float32).square().sum().backward()
    layer_norm(*want, 1e-6, torch.float32).square().sum().backward()
    for ours, theirs, need in zip(found, want, needs, strict=True):
        assert (ours.grad is not None) == need
        if need:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative(as_backend, out):
    given = tensors(as_backend.device, (2, 3, 2, 6), torch.float32, torch.float32)
    found = []
    for function in (fused_layer_norm, layer_norm):
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(*leaves, 1e-3, out).float()
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.any() and error(ours, theirs) <= (3e-2 if out == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype, out", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_registration(as_backend, dtype, out):
    """Schema, fake tensors and autograd agree with what runs."""
    given = [t.requires_grad_() for t in tensors(as_backend.device, (2, 3, 2, 6), dtype, torch.float32)]
    op, name = torch.ops.timm_convnextv2.layer_norm.default, "triton"
    torch.library.opcheck(
        op, (*given, 1e-6, out, name), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    _, mean, rstd = op(*given, 1e-6, out, name)
    backward = torch.ops.timm_convnextv2.layer_norm_backward.default
    rest = [t.detach() for t in (torch.ones_like(given[0], dtype=out), given[0], mean, rstd, given[1])]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (*rest, name, *needs), test_utils=("test_schema", "test_faketensor"))


def layers(feeds_conv: bool, channels: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same random weights."""
    norms = [TimmLayerNorm2d(channels, eps=1e-3).to(device) for _ in range(2)]
    for p in norms[0].parameters():
        nn.init.normal_(p)
    LayerNorm2d.adopt(norms[0], feeds_conv)
    assert norms[1].load_state_dict(norms[0].state_dict(), strict=True)
    return norms[0], norms[1]


def runs_kernel(norm: nn.Module, x: torch.Tensor) -> bool:
    return any("layer_norm" in name and "timm_convnextv2" in name for name in nodes(norm(x).float().sum()))


@pytest.mark.parametrize("feeds_conv", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_under_autocast(as_backend, dtype, feeds_conv):
    """What a convolution reads comes in autocast's type, and the convolution gives what it gives after float32."""
    device = as_backend.device
    ours, theirs = layers(feeds_conv, 24, device)
    conv = nn.Conv2d(24, 8, 2, stride=2).to(device)
    x = torch.randn(2, 24, 4, 6, device=device).to(dtype, memory_format=torch.channels_last)
    grad = torch.randn(2, 8, 2, 3, device=device)
    found = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            # plain PyTorch on CUDA does this by itself, on CPU it leaves bfloat16 as it is
            y = norm(leaf) if norm is ours else norm(leaf.float())
            out = conv(y)
        assert out.dtype == torch.bfloat16
        assert y.dtype == (torch.bfloat16 if norm is ours and feeds_conv else torch.float32)
        found.append([y, out, *torch.autograd.grad(out.float(), [leaf, norm.weight, norm.bias, conv.weight], grad)])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and error(a, b) <= 2e-2
    assert [t.dtype for t in found[0][2:]] == [t.dtype for t in found[1][2:]] == [dtype, *[torch.float32] * 3]
    if not feeds_conv:
        torch.testing.assert_close(found[0][0], found[1][0])


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_many_tokens_on_cpu(dtype, autocast):
    """PyTorch adds them up in the type of the input: bfloat16's sum stays behind after some thousand."""
    ours, theirs = layers(True, 8, "cpu")
    x, grad = torch.randn(2, 8, 100, 100), torch.randn(2, 8, 100, 100) + 0.1
    theirs(x).backward(grad)
    with torch.autocast("cpu", dtype, enabled=autocast):
        (ours if autocast else ours.to(dtype))(x.to(dtype)).backward(grad.to(dtype))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert error(a.grad, b.grad) <= (1e-2 if dtype == torch.bfloat16 else 2e-3)


V1 = dict(use_grn=False, ls_init_value=1.0)  # whose blocks the fused token MLP cannot run


@pytest.mark.parametrize(
    "name, more",
    [("fcmae_convnextv2_atto", {}), ("fcmae_convnextv2_atto", V1), ("convnextv2_atto", {}), ("convnextv2_tiny", V1),
     ("detector", {})],
)  # fmt: skip
def test_gradients_of_models_under_autocast_on_cpu(name, more):
    """Every parameter's: one that is summed in bfloat16 is off by far more than the rounding of what it sums."""
    images, mask = torch.randn(8, 3, 128, 128), random_mask(8, (4, 4), 0.5)
    size: Any = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 40), **more)
    if name == "detector":
        model: Any = Pyramid(create_backbone("convnextv2_atto", pretrained=False, **size), 16)
    else:
        model = timm.create_model(name, **size, **(dict(decoder_dim=16) if "fcmae" in name else {}))

    def loss() -> torch.Tensor:
        if "fcmae" in name:
            return model(images, mask).loss
        out = model(images)
        maps = [*out.values()] if isinstance(out, dict) else [out]
        fixed = torch.Generator().manual_seed(0)  # not a mean, which a norm just before it makes constant
        return torch.stack([(m.float() * torch.randn(m.shape, generator=fixed)).sum() for m in maps]).sum()

    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss()
        value.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {n: e for n, g in found[0].items() if (e := error(found[1][n], g)) > 0.04} == {}


def test_a_segmenter_has_it():
    """Its gradients are not compared: a ReLU of a few pooled values changes sign by rounding."""
    backbone = create_backbone("convnextv2_atto", pretrained=False, depths=(1, 1, 1, 1), dims=(8, 16, 24, 40))
    model = Segmenter(backbone, 3, channels=16, auxiliary_channels=16)
    norms = [m for m in model.modules() if isinstance(m, TimmLayerNorm2d)]
    assert len(norms) == 4 + 4 + 4 and {type(m) for m in norms} == {LayerNorm2d}


def test_layer_steps_aside(as_backend):
    ours, theirs = layers(True, 8, as_backend.device)
    x = torch.randn(1, 8, 2, 2, device=as_backend.device)
    with ops.use_backend("eager"):
        assert "eager" in ours.why_eager(x)
        assert not runs_kernel(ours, x) and torch.equal(ours(x), theirs(x))
    with ops.use_backend("fused"):
        assert runs_kernel(ours, x) == (x.device.type == "cpu") and torch.equal(ours(x), theirs(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            assert runs_kernel(ours, x) == (x.device.type == "cpu")
        with torch.no_grad():
            assert ours.why_eager(x)
    theirs._fast_norm = True  # as timm sets it where `set_fast_norm` is on
    for other in (theirs, TimmLayerNorm2d(8, affine=False), nn.LayerNorm(8), RmsNorm2d(8), nn.Identity()):
        kind = type(other)
        LayerNorm2d.adopt(other, True)
        assert type(other) is kind


def test_models_have_it(as_backend):
    """In the stem and before each downsampling convolution, in dense and packed runs; `explain` says so."""
    model = timm.create_model("fcmae_convnextv2_atto", **MODEL).to(as_backend.device)
    found = {n: m.feeds_conv for n, m in model.encoder.named_modules() if isinstance(m, LayerNorm2d)}
    others = [*(f"stages.{i}.downsample.0" for i in (1, 2, 3)), *(f"stages.{i}.blocks.0.norm" for i in range(4))]
    assert found == {"stem.1": False, **dict.fromkeys(others, True)}
    lines = [line for line in explanation(model).splitlines() if "norm, stem and downsampling" in line]
    assert len(lines) == 1 and lines[0].split()[-2:] == ["4", "triton"]
    images = torch.randn(1, 3, 64, 64, device=as_backend.device)
    for run in (lambda: model(images), lambda: model.encoder(images)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run()
        ran = {event.key: event.count for event in profiler.key_averages()}
        assert ran["timm_convnextv2::layer_norm"] == 4
    with ops.use_backend("fused"):
        text = explanation(model)
        reason = "eager: only" if as_backend.device != "cpu" else "fused"
        assert f"norm, stem and downsampling     4  {reason}" in text
        with torch.no_grad():
            assert "norm, stem and downsampling     4  eager: " in explanation(model)


def test_other_norms_of_a_model_are_explained():
    text = explanation(timm.create_model("convnextv2_atto", norm_layer="rmsnorm", depths=(1, 1, 1, 1)), "cpu")
    assert "norm, stem and downsampling     4  eager: it is not a LayerNorm with weight" in text


def test_compiled_without_a_graph_break(as_backend):
    """A stage: `test_task_compiles` has the whole model, and opcheck each operation."""
    torch.compiler.reset()
    device = as_backend.device
    stage = timm.create_model("fcmae_convnextv2_atto", **MODEL).to(device).encoder.stages[1]
    x = torch.randn(1, 8, 16, 16, device=device).to(memory_format=torch.channels_last)
    parameters = list(stage.parameters())

    def loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return stage(x).float().square().mean()

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), parameters)
    for a, b in zip(ours, torch.autograd.grad(loss(), parameters), strict=True):
        assert error(a, b) <= 5e-2


def test_types_under_autocast(as_backend):
    """What `benchmarks.step_model` counts: the residual stream of the first stage is float32, the others are not."""
    device, found = as_backend.device, {}
    model = timm.create_model("fcmae_convnextv2_atto", **MODEL).to(device)

    def note(name: str):
        return lambda module, args, out: found.update({name: (args[0].dtype, out.dtype)})

    for name, module in model.encoder.named_modules():
        if name.endswith(("stem.1", "downsample.0", "blocks.0")):
            module.register_forward_hook(note(name))
    with torch.autocast(device, torch.bfloat16):
        model(torch.randn(1, 3, 64, 64, device=device))
    half, full = torch.bfloat16, torch.float32
    assert found == {
        "stem.1": (half, full), "stages.0.blocks.0": (full, full),
        "stages.1.downsample.0": (full, half), "stages.1.blocks.0": (half, half),
        "stages.2.downsample.0": (half, half), "stages.2.blocks.0": (half, half),
        "stages.3.downsample.0": (half, half), "stages.3.blocks.0": (half, half),
    }  # fmt: skip
