"""Matrix products by oneDNN and by MKL: the same numbers, and a choice that a run can repeat."""

import pytest
import torch

from timm_convnextv2.ops import functional, gemm
from timm_convnextv2.ops import token_mlp as fused_mlp
from timm_convnextv2.ops.gemm import linear, onednn_is_faster

needs_onednn = pytest.mark.skipif(
    gemm._ONEDNN is None or not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN for Linears"
)
EPYC = {"cpu_name": "AMD EPYC"}


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Every product that may go to either, by one; returns whether that is oneDNN, and notes its calls."""
    monkeypatch.setattr(gemm, "_cpu_prefers_onednn", lambda: request.param)
    calls = []
    real = gemm._ONEDNN
    monkeypatch.setattr(gemm, "_ONEDNN", lambda *args: calls.append(args) or real(*args))
    return request.param, calls


@pytest.mark.parametrize("M,K,N", [(1, 64, 64), (37, 96, 384), (152, 260, 65), (301, 65, 259)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(M, K, N, bias, transposed, library):
    x, w = torch.randn(M, K), torch.randn(K, N).t() if transposed else torch.randn(N, K)
    b = torch.randn(N) if bias else None
    want = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    kept = torch.empty(M, N)
    onednn, calls = library
    for out, slot in ((None, ""), (None, "test"), (kept, "")):
        found = linear(x, w, b, out, slot)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)
    assert found is kept
    assert len(calls) == (2 if onednn else 0)


@pytest.mark.parametrize("rows", [1, 10_000], ids=["an image a time", "at once"])
@pytest.mark.parametrize("T,C", [(19, 96), (7, 65), (600, 66)])
@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_token_mlp(rows, T, C, path, recompute, library, monkeypatch):
    """Values and gradients, where chunks and folding decide what each product is asked for."""
    monkeypatch.setattr(fused_mlp, "CHUNK_BYTES", 1)
    monkeypatch.setattr(fused_mlp, "MIN_ROWS", rows)
    shapes = [(3, T, C), (3, T, C), (C,), (C,), (4 * C, C), (4 * C,), (4 * C,), (4 * C,), (C, 4 * C), (C,)]
    tensors = [torch.randn(s, dtype=torch.float64) / max(1, s[-1] ** 0.5 * (len(s) == 2)) for s in shapes]
    keep = torch.tensor([2.0, 0.0, 0.5]) if path else None
    grad = torch.randn(3, T, C, dtype=torch.float64)

    exact = [t.clone().requires_grad_() for t in tensors]
    out = functional.token_mlp(exact[0], *exact[2:])
    out = exact[1] + (out if keep is None else out * keep.double().view(-1, 1, 1))
    want = [out, *torch.autograd.grad(out, exact, grad)]

    ours = [t.float().requires_grad_() for t in tensors]
    out = fused_mlp.fused_token_mlp(ours[0], ours[1], keep, *ours[2:], recompute=recompute)
    found = [out, *torch.autograd.grad(out, ours, grad.float())]
    for a, b in zip(found, want, strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm()
    onednn, calls = library
    assert bool(calls) == onednn


@pytest.mark.parametrize(
    "found,capability,prefers",
    [
        (EPYC, "AVX512", True),
        ({"cpu_name": "AMD Ryzen 9 9950X"}, "AVX512", True),
        (EPYC, "AVX2", False),
        ({"cpu_name": "INTEL(R) XEON(R) PLATINUM 8592+"}, "AVX512", False),
        ({}, "AVX512", False),
    ],
)
@needs_onednn
def test_which_cpus_prefer_onednn(found, capability, prefers, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert gemm._cpu_prefers_onednn.__wrapped__() is prefers


def test_a_pytorch_without_that_operation_takes_mkl(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: EPYC, raising=False)
    monkeypatch.setattr(gemm, "_ONEDNN", None)
    assert gemm._cpu_prefers_onednn.__wrapped__() is False


@needs_onednn
def test_what_stays_with_mkl(monkeypatch):
    monkeypatch.setattr(gemm, "_cpu_prefers_onednn", lambda: True)
    x, w = torch.randn(5, 64), torch.randn(64, 64)
    assert onednn_is_faster(x, w)
    assert not onednn_is_faster(x.double(), w.double())
    assert not onednn_is_faster(x.bfloat16(), w.bfloat16())  # PyTorch's own goes to oneDNN
    assert not onednn_is_faster(x, w[:63])
    assert not onednn_is_faster(x[:, :40], w[:, :40])
    assert not onednn_is_faster(x.to("meta"), w.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_is_faster(x, w)
