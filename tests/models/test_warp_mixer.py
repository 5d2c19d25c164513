"""WarpConvNet as the mixer of a benchmark, on a stand-in: against dense convolutions with masks."""

import gc
import sys
from itertools import product
from unittest.mock import patch

import pytest
import torch
from test_fcmae import assert_equals_reference, toy
from torch import nn

from benchmarks import official, warp_mixer
from timm_convnextv2 import random_mask
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import use_backend


class Convolution(torch.autograd.Function):
    """The 'implicit' way of nn/functional/sparse_conv_depth.py: the product with the middle tap, then tap by tap."""

    @staticmethod
    def forward(ctx, x, weight, kernel_map):
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        out = x * weight[len(kernel_map) // 2]
        for tap, (source, target) in enumerate(kernel_map):
            if tap != len(kernel_map) // 2:
                out.index_add_(0, target, x[source] * weight[tap])
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = grad * weight[len(ctx.kernel_map) // 2], torch.empty_like(weight)
        for tap, (source, target) in enumerate(ctx.kernel_map):
            if tap != len(ctx.kernel_map) // 2:  # the binding adds to `c.contiguous()`, which may be a copy
                grad_x.contiguous().index_add_(0, source, grad[target] * weight[tap])
            grad_weight[tap] = (x[source] * grad[target]).sum(dim=0)
        return grad_x, grad_weight, None


class StandIn:
    """The functions that are called, and how often. The rows of a kernel are its taps, row-major."""

    def __init__(self):
        self.maps, self.convolutions = 0, 0

    def generate_kernel_map(self, inputs, outputs, stride, size):
        assert inputs.dtype == outputs.dtype == torch.int32 and inputs.shape[1] == 3 and stride == (1, 1)
        self.maps += 1
        place, found = {tuple(c): n for n, c in enumerate(inputs.tolist())}, []
        for tap in product(*map(range, size)):
            i, j = (t - k // 2 for t, k in zip(tap, size, strict=True))
            near = [(place.get((b, y + i, x + j), -1), n) for n, (b, y, x) in enumerate(outputs.tolist())]
            pairs = torch.tensor([pair for pair in near if pair[0] >= 0], dtype=torch.int32).view(-1, 2)
            found.append(pairs[torch.randperm(len(pairs))].unbind(1))  # as threads find them
        return found

    def spatially_sparse_depthwise_conv(self, x, weight, kernel_map, num_out):
        assert weight.shape == (len(kernel_map), x.shape[1]) and num_out == len(x) and x.dtype == weight.dtype
        assert x.is_contiguous() and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")
        self.convolutions += 1
        return Convolution.apply(x, weight, kernel_map)


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in where WarpConvNet would be."""

    def call():
        stand_in = StandIn()
        for name in ("warpconvnet", warp_mixer.SEARCH, warp_mixer.CONVOLUTION):
            monkeypatch.setitem(sys.modules, name, stand_in)
        return stand_in

    return call


def both(case, batch, bias=True, dtype=torch.float64):
    """Output and every gradient: of the map with zeros in it, and of the mixer."""
    k, p, C, grid, ratio = case
    conv = nn.Conv2d(C, C, k, padding=k // 2, groups=C, bias=bias, dtype=dtype)
    mask = random_mask(batch, grid, ratio)
    layout = PackedLayout(mask, int((~mask[0]).sum()))
    x = torch.randn(batch, C, layout.num_visible * p, p, dtype=dtype, requires_grad=True)
    grad, found = torch.randn_like(x), []  # that of one image reaches the tokens as it is, which is not contiguous
    for mix in (PackedLayout.mix, warp_mixer.warp_mix):
        with use_backend("eager"):
            out = mix(layout, x, conv)
        found.append([out, *torch.autograd.grad(out, [x, *conv.parameters()], grad.to(out.dtype))])
    return found


CASES = [(7, 1, 5, (3, 4), 0.6), (7, 4, 3, (2, 3), 0.5), (5, 2, 1, (3, 3), 0.3), (3, 3, 4, (1, 2), 0.5)]
CASES += [(1, 2, 2, (2, 2), 0.5)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_mixer(install, case, bias, batch):
    install()
    for plain, warp in zip(*both(case, batch, bias), strict=True):
        torch.testing.assert_close(warp, plain)


def test_whole_model(install):
    stand_in = install()
    model = toy(mask_ratio=0.5)
    with patch.object(PackedLayout, "mix", warp_mixer.warp_mix), use_backend("eager"):
        assert_equals_reference(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), random_mask(2, (2, 2), 0.5))
    gc.collect()
    assert stand_in.convolutions == 5 * stand_in.maps // 4 > 0  # five blocks in four stages
    assert len(warp_mixer._maps) == 0  # which the layouts had


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_under_autocast(install, dtype):
    install()
    with torch.autocast("cpu", dtype):
        plain, warp = both((7, 2, 4, (3, 3), 0.6), 2, dtype=torch.float32)
    assert warp[0].dtype == dtype and warp[1].dtype == torch.float32
    for a, b in zip(plain, warp, strict=True):
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)  # and the same types


def test_the_step_runs_on_it(install):
    stand_in = install()
    step = official.pretraining_step(official.WARP, "atto", 1, "cpu", "float32")
    step()
    assert (stand_in.convolutions, stand_in.maps) == (12, 4)
    official.pretraining_step(official.OURS, "atto", 1, "cpu", "float32")()
    assert stand_in.convolutions == 12


def test_why_it_cannot_run(install, monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "warpconvnet", None)  # as Python says that there is none
    assert official.missing("atto", 2, None, torch.device("cpu"), "float32")[official.WARP] == "WarpConvNet needs CUDA"
    assert "512 images" in warp_mixer.why_not(cuda, 513)
    reason = warp_mixer.why_not(cuda, 512)
    assert "not installed" in reason and "pip install --no-build-isolation warpconvnet" in reason
    monkeypatch.delitem(sys.modules, "warpconvnet")
    (tmp_path / "warpconvnet.py").write_text("raise ImportError('built for another PyTorch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported (built for another PyTorch)" in warp_mixer.why_not(cuda, 2)
    install()
    assert warp_mixer.why_not(cuda, 2) == ""
