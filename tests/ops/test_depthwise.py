"""Depthwise operations: their registration, and the packed one against PyTorch's convolution in float64."""

import pytest
import torch

from timm_convnextv2.ops import gemm as columns
from timm_convnextv2.ops import window_depthwise


def test_columns_are_all_there_once():
    for k in (1, 3, 5, 7, 9, 11, 13, 31):
        seen = [first + i for first, width in columns._column_groups(k) for i in range(width)]
        assert sorted(seen) == list(range(k))
        assert max(width for _, width in columns._column_groups(k)) <= columns.MAX_COLUMNS


def test_registered_operation_passes_torch_library_opcheck():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(3, 1, 7, 7, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.timm_convnextv2.depthwise, (x, weight, bias))
    torch.library.opcheck(torch.ops.timm_convnextv2.depthwise, (x, weight, None))


@pytest.mark.parametrize("chunk", [1, 8 * 2**20], ids=["one patch at a time", "all"])
@pytest.mark.parametrize("k, p", [(7, 8), (7, 1), (5, 4), (9, 2)])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 5e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_windows_by_columns(k, p, dtype, tol, chunk, monkeypatch):
    """The weight gradient goes by columns and chunks; in float64 it does not, and is checked elsewhere."""
    monkeypatch.setattr(columns, "CHUNK_BYTES", chunk)
    N, C, side = 5, 6, p + k - 1
    index = torch.randint(0, N * p * p + 1, (N, side, side))
    middle = slice(k // 2, k // 2 + p)
    index[:, middle, middle] = torch.arange(N * p * p).view(N, p, p)
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((N, p, p, C), (C, 1, k, k), (C,)))
    grad, found = torch.randn(N, p, p, C).to(dtype), []
    for precision in (dtype, torch.float64):
        w, b = (t.to(precision).detach().clone().requires_grad_() for t in (weight, bias))
        window_depthwise(x.to(precision), w, b, index).backward(grad.to(precision))
        found.append((w.grad.double(), b.grad.double()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= tol * theirs.abs().max()
