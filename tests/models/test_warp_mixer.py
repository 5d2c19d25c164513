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


class StandIn:
    """The functions that are called, and how often. The rows of a kernel are its taps, row-major."""

    def __init__(self):
        self.maps, self.convolutions = 0, 0

    def generate_kernel_map(self, inputs, outputs, stride, size):
        assert inputs.dtype == outputs.dtype == torch.int32 and inputs.shape[1] == 3 and stride == (1, 1)
        self.maps += 1
        place, found = {tuple(c): n for n, c in enumerate(inputs.tolist())}, []
        for i, j in product(*(range(-(k // 2), k // 2 + 1) for k in size)):
            near = [(place.get((b, y + i, x + j), -1), n) for n, (b, y, x) in enumerate(outputs.tolist())]
            pairs = torch.tensor([pair for pair in near if pair[0] >= 0], dtype=torch.int32).view(-1, 2)
            found.append(pairs[torch.randperm(len(pairs))].unbind(1))  # as threads find them
        return found

    def spatially_sparse_depthwise_conv(self, x, weight, kernel_map, num_out):
        assert weight.shape == (len(kernel_map), x.shape[1]) and num_out == len(x) and x.dtype == weight.dtype
        assert x.is_contiguous() and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")
        self.convolutions += 1
        out = torch.zeros_like(x)
        for tap, (source, target) in enumerate(kernel_map):
            out = out.index_add(0, target, x[source] * weight[tap])
        return NeedsContiguousGrad.apply(out)


class NeedsContiguousGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_contiguous()  # the binding would add the taps to a copy that is dropped
        return grad


@pytest.fixture
def stand_in(monkeypatch):
    """Takes WarpConvNet's place."""
    made = StandIn()
    for name in ("warpconvnet", warp_mixer.SEARCH, warp_mixer.CONVOLUTION):
        monkeypatch.setitem(sys.modules, name, made)
    return made


CASES = [(7, 1, 5, (3, 4), 0.6), (7, 4, 3, (2, 3), 0.5), (5, 2, 1, (3, 3), 0.3), (1, 2, 2, (2, 2), 0.5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias, batch", [(True, 1), (False, 3)])
@pytest.mark.parametrize("k, p, C, grid, ratio", CASES)
def test_mixer(stand_in, k, p, C, grid, ratio, bias, batch, dtype):
    """Output and every gradient, also under autocast, against the map with zeros."""
    amp = dtype != torch.float64
    conv = nn.Conv2d(C, C, k, padding=k // 2, groups=C, bias=bias, dtype=torch.float32 if amp else dtype)
    mask = random_mask(batch, grid, ratio)
    layout = PackedLayout(mask, int((~mask[0]).sum()))
    x = torch.randn(batch, C, layout.num_visible * p, p, dtype=conv.weight.dtype, requires_grad=True)
    grad, found = torch.randn_like(x), []  # that of one image reaches the tokens as it is, which is not contiguous
    for mix in (PackedLayout.mix, warp_mixer.warp_mix):
        with use_backend("eager"), torch.autocast("cpu", dtype, enabled=amp):
            out = mix(layout, x, conv)
            found.append([out, *torch.autograd.grad(out, [x, *conv.parameters()], grad.to(out.dtype))])
    for plain, warp in zip(*found, strict=True):
        torch.testing.assert_close(warp, plain, **(dict(rtol=0.05, atol=0.1) if amp else {}))  # and the same types
    assert out.dtype == dtype


def test_whole_model_and_the_step(stand_in):
    model = toy(mask_ratio=0.5)
    with patch.object(PackedLayout, "mix", warp_mixer.warp_mix), use_backend("eager"):
        assert_equals_reference(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), random_mask(2, (2, 2), 0.5))
    gc.collect()
    assert stand_in.convolutions == 5 * stand_in.maps // 4 > 0  # five blocks in four stages
    assert len(warp_mixer._maps) == 0  # which the layouts had
    before = stand_in.convolutions
    for name in (official.WARP, official.OURS):
        official.pretraining_step(name, "atto", 1, "cpu", "float32")()
        assert stand_in.convolutions == before + 12


def test_why_it_cannot_run(monkeypatch, tmp_path):
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
