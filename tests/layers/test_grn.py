"""GRN against timm's, the reference of this repository's `GlobalResponseNorm`."""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm

from timm_convnextv2.layers import GlobalResponseNorm

LAYOUTS = [pytest.param(True, id="nhwc"), pytest.param(False, id="nchw")]
TOKENS = [pytest.param(1, 1, id="1"), pytest.param(7, 9, id="63"), pytest.param(3137, 1, id="3137")]
HALF = [torch.float16, torch.bfloat16]


def make_grn(channels: int, channels_last: bool, dtype: torch.dtype = torch.float64, cls: type = GlobalResponseNorm):
    """A GRN whose parameters are away from their initial zeros."""
    grn = cls(channels, channels_last=channels_last, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in grn.parameters():
        parameter.data.uniform_(-1, 1, generator=generator)
    return grn


def make_input(batch: int, tokens: tuple[int, int], channels: int, channels_last: bool, **kwargs) -> torch.Tensor:
    shape = (batch, *tokens, channels) if channels_last else (batch, channels, *tokens)
    return torch.randn(shape, **kwargs)


def run(grn, x, grad):
    """Output, gradient of the input, gradients of weight and bias."""
    x = x.detach().requires_grad_()
    out = grn(x)
    return [out.detach(), *torch.autograd.grad(out, [x, grn.weight, grn.bias], grad.to(out.dtype))]


def assert_close(ours, theirs, tol: float) -> None:
    for name, a, b in zip(("output", "x.grad", "weight.grad", "bias.grad"), ours, theirs, strict=True):
        assert torch.isfinite(a).all(), name
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300)
        assert error <= tol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("channels", [40, 352, 1])
@pytest.mark.parametrize("h,w", TOKENS)
def test_equals_timm_in_float64(h, w, channels, channels_last):
    ours = make_grn(channels, channels_last)
    theirs = make_grn(channels, channels_last, cls=TimmGlobalResponseNorm)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = make_input(2, (h, w), channels, channels_last, dtype=torch.float64)
    # tiny activations are where eps counts
    for scale in (1.0, 1e-6):
        grad = torch.randn_like(x)
        assert_close(run(ours, x * scale, grad), run(theirs, x * scale, grad), 1e-12)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_all_zero_maps_have_finite_values_and_gradients(dtype, channels_last):
    grn = make_grn(8, channels_last, dtype)
    x = torch.zeros(2, 8, 8, 8, dtype=dtype)
    grad = torch.randn_like(x)
    out, x_grad, weight_grad, bias_grad = run(grn, x, grad)
    assert torch.equal(out, grn.bias.view(grn.wb_shape).expand_as(out))
    torch.testing.assert_close(x_grad, grad, rtol=1e-8, atol=0)  # out = x * (1 + weight * 0) + bias
    assert not weight_grad.any()
    assert torch.isfinite(bias_grad).all() and bias_grad.any()


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype,tol", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("magnitude", [1, 500, 3000])
@pytest.mark.parametrize("autocast", [False, True])
def test_statistics_are_float32_in_half_precision(autocast, magnitude, dtype, tol, channels_last):
    """Also with float32 parameters, as under autocast."""
    # 56x56 tokens: at 500 the sum of squares overflows float16, at 3000 its square root does too
    grn = make_grn(8, channels_last, torch.float32 if autocast else dtype)
    exact = make_grn(8, channels_last)
    exact.load_state_dict(grn.state_dict())
    x = (magnitude * (1 + 0.1 * make_input(2, (56, 56), 8, channels_last))).to(dtype)
    if dtype == torch.float16:
        assert torch.isinf(x.square().sum(grn.spatial_dim)).all() == (magnitude > 1)
        assert torch.isinf(x.double().norm(dim=grn.spatial_dim).half()).all() == (magnitude == 3000)
    grad = (torch.randn_like(x) / 512).to(dtype)
    ours = run(grn, x, grad)
    assert ours[0].dtype == ours[1].dtype == dtype and ours[2].dtype == grn.weight.dtype
    assert_close(ours, run(exact, x.double(), grad.double()), tol)
