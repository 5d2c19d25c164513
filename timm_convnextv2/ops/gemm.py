"""Matrix products on CPU, by whichever of PyTorch's two libraries is faster there: MKL or oneDNN.

PyTorch takes MKL for float32. On AMD's CPUs with AVX-512 oneDNN is faster (`benchmarks.gemm`), most so with the few
hundred rows of the last stages, but not for gradients of weights. The choice follows from the CPU, the shape and where
the result must lie, never from a time measured at run time: a run that is repeated or resumed must round the same way.
"""

import functools

import torch
from torch import Tensor

from .scratch import scratch

__all__ = ["linear", "onednn_is_faster"]

SMALLEST = 64  # channels on both sides, below which MKL is as fast

# `torch.compile` calls it for its own Linears; of PyTorch's public operations, none reaches oneDNN's float32 product.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def _cpu_prefers_onednn() -> bool:
    """Whether this CPU has AVX-512 and is AMD's, for which MKL has no AVX-512 code."""
    describe = getattr(torch.cpu, "get_capabilities", None)  # older releases have none
    if describe is None or _ONEDNN is None or not torch.backends.mkldnn.is_available():
        return False
    found = describe()
    return "AMD" in found.get("cpu_name", "") and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_is_faster(x: Tensor, w: Tensor) -> bool:
    """Whether `linear(x, w)` goes to oneDNN."""
    return (
        x.dtype == w.dtype == torch.float32
        and x.device.type == "cpu"
        and min(w.shape) >= SMALLEST
        and torch.backends.mkldnn.enabled
        and _cpu_prefers_onednn()
    )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None, slot: str = "") -> Tensor:
    """`x @ w.T + bias`, without autograd.

    Args:
        x: `[M, K]`.
        w: `[N, K]`, in any order in memory.
        bias: `[N]`, or None.
        out: Where the result must be written, `[M, N]`; oneDNN, which cannot, is then not asked.
        slot: Of `ops.scratch`, where the result may be written.
    """
    if out is None and _ONEDNN is not None and onednn_is_faster(x, w):
        return _ONEDNN(x, w, bias, "none", [], "")
    if out is None and slot:
        out = scratch(slot, (len(x), len(w)), x.dtype, x.device)
    if bias is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(bias, x, w.t(), out=out)
