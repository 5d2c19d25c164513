"""Matrix products by oneDNN and by MKL: the same numbers, and a choice that a run can repeat."""

from functools import partial

import pytest
import torch
from test_token_mlp import assert_same, both, make, plain

from timm_convnextv2.ops import gemm
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
    keep, tensors, grad = torch.tensor([2.0, 0.0, 0.5]) if path else None, make(3, T, C), torch.randn(3, T, C).double()
    exact = both(tensors, keep, grad, [plain])[0]
    fused = partial(fused_mlp.fused_token_mlp, recompute=recompute)
    assert_same(both([t.detach().float().requires_grad_() for t in tensors], keep, grad, [fused])[0], exact, 5e-6)
    onednn, calls = library
    assert bool(calls) == onednn


CPUS = [
    (EPYC, "AVX512", True), ({"cpu_name": "AMD Ryzen 9 9950X"}, "AVX512", True), (EPYC, "AVX2", False),
    ({"cpu_name": "INTEL(R) XEON(R) PLATINUM 8592+"}, "AVX512", False), ({}, "AVX512", False),
]  # fmt: skip


@pytest.mark.parametrize("found,capability,prefers", CPUS)
@needs_onednn
def test_which_cpus_prefer_onednn(found, capability, prefers, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert gemm._cpu_prefers_onednn.__wrapped__() is prefers
    monkeypatch.setattr(gemm, "_ONEDNN", None)  # a PyTorch without that operation
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
