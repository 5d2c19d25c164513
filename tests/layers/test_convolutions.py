"""Depthwise and patch convolutions, the modules, against PyTorch's own in float64."""

import copy

import pytest
import torch
from torch import nn

from timm_convnextv2.layers import DepthwiseConv2d, PatchConv2d
from timm_convnextv2.ops import gemm as columns
from timm_convnextv2.ops import use_backend


def gradients(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and gradients of input and parameters, float64; None for what is frozen."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return [t if t is None else t.detach().double() for t in (out, x.grad, *(p.grad for p in module.parameters()))]


def assert_same(module: nn.Module, x: torch.Tensor, kind: type, tol: float = 2e-6) -> None:
    """`module` in float32 against the plain convolution in float64; errors relative to the largest number."""
    plain = copy.deepcopy(module).double()
    plain.__class__ = nn.Conv2d
    assert type(module) is kind
    exact = x.detach().double().requires_grad_(x.requires_grad)
    grad = torch.randn_like(plain(exact))
    for ours, theirs in zip(gradients(module, x, grad.float()), gradients(plain, exact, grad), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.shape == theirs.shape
            scale = max(1.0, float(theirs.abs().max()))
            assert (ours - theirs).abs().max() <= tol * scale * (1 + x.numel() ** 0.5 / 100)


def make(channels: int, k: int, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=bias)
    DepthwiseConv2d.adopt(conv)
    return conv


def uses_own(module: nn.Module, x: torch.Tensor) -> bool:
    return "Convolution" not in type(module(x).grad_fn).__name__


@pytest.mark.parametrize("k", [5, 7, 9, 11, 13])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 7), (14, 9), (3, 30)], ids=str)
def test_dense(k, size):
    conv, x = make(6, k), torch.randn(3, 6, *size, requires_grad=True)
    assert uses_own(conv, x)
    assert_same(conv, x, DepthwiseConv2d)


@pytest.mark.parametrize("channels", [1, 40, 352])
@pytest.mark.parametrize("chunk", [1, 8 * 2**20], ids=["one image at a time", "all"])
def test_channels_and_chunks(channels, chunk, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_BYTES", chunk)
    x = torch.randn(3, channels, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    assert_same(make(channels, 7), x, DepthwiseConv2d)


@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after autocast", "backward within"])
def test_half_precision(dtype, tol, autocast, inside):
    """No type is left behind, and the weight's gradient, summed in float32, is as exact as its inputs are."""
    conv, x = make(6, 7), torch.randn(3, 6, 14, 9, requires_grad=True)
    conv, given = (conv, x) if autocast else (conv.to(dtype), x.detach().to(dtype).requires_grad_())
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = conv(given)
        assert out.dtype == dtype and "Convolution" not in type(out.grad_fn).__name__
        grad = torch.randn_like(out)
        if inside:
            out.backward(grad)
    if not inside:
        out.backward(grad)
    plain = nn.Conv2d(6, 6, 7, padding=3, groups=6).double()
    plain.load_state_dict({k: v.to(dtype) for k, v in conv.state_dict().items()})
    exact = given.detach().to(dtype).double().requires_grad_()
    plain(exact).backward(grad.double())
    for ours, theirs in ((given, exact), (conv.weight, plain.weight), (conv.bias, plain.bias)):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad - theirs.grad).abs().max() <= tol * theirs.grad.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_batched_gradients(autocast):
    """Several gradients at a time, as `torch.autograd.functional.jacobian(vectorize=True)` asks for."""
    conv, x = make(3, 7), torch.randn(1, 3, 8, 5, requires_grad=True)
    grads, found = torch.randn(4, 1, 3, 8, 5), []
    for name in ("fused", "eager"):
        with use_backend(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv(x)
        given = grads.to(y.dtype)
        found.append(torch.autograd.grad(y, (x, conv.weight), given, is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-4, atol=0.2 if autocast else 1e-4)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "no bias"])
def test_frozen(frozen):
    conv, x = make(4, 7, bias=frozen != "no bias"), torch.randn(2, 4, 8, 8, requires_grad=frozen != "x")
    for name, p in conv.named_parameters():
        p.requires_grad_(name != frozen)
    assert uses_own(conv, x)
    assert_same(conv, x, DepthwiseConv2d)


@pytest.mark.parametrize("view", ["sliced", "expanded", "nchw"])
def test_non_contiguous(view):
    x = torch.randn(2, 4, 16, 9)
    x = {"sliced": x[:, :, ::2, 1:], "expanded": x[:1].expand(3, -1, -1, -1), "nchw": x}[view]
    assert_same(make(4, 7), x.requires_grad_(), DepthwiseConv2d)


def test_steps_aside():
    """Where oneDNN has what is needed, where nobody differentiates, and where another backend is asked for."""
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert not uses_own(make(4, 3), x)
    assert not uses_own(make(4, 7).double(), x.double())
    conv = make(4, 7)
    with use_backend("eager"):
        assert not uses_own(conv, x)
    with torch.no_grad():
        assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))
    conv.dilation, conv.padding = (2, 2), (6, 6)  # as timm does for an output stride of 16
    assert not uses_own(conv, x)
    reflect, wider = dict(padding=3, groups=4, padding_mode="reflect"), dict(padding=3, groups=4)
    for out, options in ((4, dict(padding=3)), (4, dict(groups=4)), (4, reflect), (8, wider)):
        other = nn.Conv2d(4, out, 7, **options)
        DepthwiseConv2d.adopt(other)
        assert type(other) is nn.Conv2d


def test_second_derivative():
    found, weights, x = [], make(3, 5).state_dict(), torch.randn(2, 3, 6, 5)
    for module in (make(3, 5), nn.Conv2d(3, 3, 5, padding=2, groups=3)):
        module.load_state_dict(weights)
        a = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(a).pow(3).sum(), a, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [a, module.weight, module.bias]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def patch_conv(k: int, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(5, 7, k, stride=k, bias=bias)
    PatchConv2d.adopt(conv)
    return conv


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("across, own", [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_patch_conv(k, across, own, bias):
    conv = patch_conv(k, bias)
    x = torch.randn(2, 5, 4 * k, across * k).to(memory_format=torch.channels_last).requires_grad_()
    assert uses_own(conv, x) == own
    assert_same(conv, x, PatchConv2d)


def test_patch_conv_steps_aside():
    conv, x = patch_conv(2), torch.randn(2, 5, 4, 2, requires_grad=True)
    with use_backend("eager"):
        assert not uses_own(conv, x)
    for options in (dict(stride=1), dict(stride=2, padding=1), dict(stride=2, groups=2)):
        other = nn.Conv2d(6, 6, 2, **options)
        PatchConv2d.adopt(other)
        assert type(other) is nn.Conv2d


@pytest.mark.parametrize("size", [(5, 2), (4, 3), (5, 3)], ids=str)
def test_patch_conv_drops_rows_and_columns_that_fill_no_patch(size):
    conv, x = patch_conv(2), torch.randn(2, 5, *size, requires_grad=True)
    assert not uses_own(conv, x)
    assert_same(conv, x, PatchConv2d)


def test_patch_conv_second_derivative():
    conv = patch_conv(2).double()
    x = torch.randn(2, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, (x,)), (x, conv.weight, conv.bias)
    )
