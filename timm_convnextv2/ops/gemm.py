"""Building blocks for CPU: matrix products by the faster of PyTorch's two libraries (MKL, oneDNN), the depthwise weight
gradient by columns, and scratch memory.

PyTorch uses MKL for float32. On AMD CPUs with AVX-512 oneDNN is faster (`benchmarks.gemm`), most of all with the few
hundred rows of the last stages, but not for weight gradients. The choice depends on the CPU, the shape and the output's
memory, never on a time measured at run time: a repeated or resumed run must round the same way.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functional import stats_dtype

LARGEST = 64 * 2**20  # bytes of the largest buffer that is kept
MAX_COLUMNS = 3  # oneDNN's depthwise weight gradient has no fast code for wider kernels ("kw > 3" in its source)
CHUNK_BYTES = 8 * 2**20  # gradient bytes at a time: what is gathered for them stays in the cache
HAS_ONEDNN = torch.backends.mkldnn.is_available()
SMALLEST = 64  # channels on both sides, below which MKL is as fast

aten = torch.ops.aten
_local = threading.local()


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. On CPU the thread's next call with the same slot reuses its memory.

    Fresh pages cost as much as a pass over them. Read the contents before that next call.
    """
    numel = math.prod(shape)
    if device.type != "cpu" or numel * dtype.itemsize > LARGEST:
        return torch.empty(shape, dtype=dtype, device=device)
    held: dict[Any, Tensor] = _local.__dict__
    key = slot, dtype
    buffer = held.get(key)
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be used outside it
            buffer = held[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def _column_groups(k: int) -> list[tuple[int, int]]:
    """`(first, width)` of groups of kernel columns, up to `MAX_COLUMNS` wide, the middle one first."""
    width = min(k, MAX_COLUMNS)
    side = (k - width) // 2
    groups = [(side, width)]
    for first in range(0, side, MAX_COLUMNS):
        groups += [(start + first, min(MAX_COLUMNS, side - first)) for start in (0, side + width)]
    return groups


def weight_grad(grad: Tensor, k: int, part: Callable[[slice, int, int], tuple[Tensor, tuple[int, int]]]) -> Tensor:
    """Depthwise weight gradient `[C, 1, k, k]` from the output's gradient `[N, C, H, W]`, channels-last.

    It is summed and returned in float32 (float64 for float64).

    Args:
        part: Takes images (or patches), first kernel column and number of columns; returns the input that this part of
            the kernel reads, and its padding (rows, columns).
    """
    N, C, H, W = grad.shape
    groups, n, dtype, full = [(0, k)], N, grad.dtype, stats_dtype(grad)
    if dtype != torch.float64 and grad.device.type == "cpu":
        groups, n, dtype = _column_groups(k), max(1, CHUNK_BYTES // (C * H * W * 4)), full
    total = grad.new_zeros(C, 1, k, k, dtype=full)
    for i in range(0, N, n):
        images = slice(i, min(i + n, N))
        here = grad[images].to(dtype)
        for first, width in groups:
            x, padding = part(images, first, width)
            part_grad = aten.convolution_backward(
                here, x.to(dtype), here.new_empty(C, 1, k, width), [C], [1, 1], padding, [1, 1], False, [0, 0], C,
                [False, True, False],
            )[1]  # fmt: skip
            total[..., first : first + width] += part_grad
    return total


def bias_grad(grad: Tensor) -> Tensor:
    """Bias gradient `[C]` of the output's gradient `[N, C, H, W]`, in float32 (float64 for float64)."""
    return grad.sum(dim=(0, 2, 3), dtype=stats_dtype(grad))


def shifted(x: Tensor, first: int, width: int, k: int) -> tuple[Tensor, tuple[int, int]]:
    """The part of `[N, C, H, W]` that `width` kernel columns from `first` on read, and the padding that remains.

    The middle columns read the input itself; for the others a shifted copy is written to scratch memory.
    """
    N, C, H, W = x.shape
    rows = k // 2 if H >= k else 0  # oneDNN has no fast code for a kernel higher than its map
    if first + width // 2 == k // 2 and rows:
        return x, (rows, width // 2)
    top, left, out_width = k // 2 - rows, k // 2 - first, W + width - 1
    seen = scratch("shifted", (N, H + 2 * top, out_width, C), x.dtype, x.device)
    begin, end = min(max(0, left), out_width), max(0, min(out_width, W + left))
    for border in (seen[:, :top], seen[:, top + H :], seen[:, :, :begin], seen[:, :, end:]):
        border.zero_()
    if end > begin:
        seen[:, top : top + H, begin:end] = x.permute(0, 2, 3, 1)[:, :, begin - left : end - left]
    return seen.permute(0, 3, 1, 2), (rows, 0)


# Private, but `torch.compile` uses it too; no public operation reaches oneDNN's float32 product.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def _cpu_prefers_onednn() -> bool:
    """Whether this is an AMD CPU with AVX-512; MKL has no AVX-512 code for AMD."""
    describe = getattr(torch.cpu, "get_capabilities", None)  # missing in older releases
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
    """`x @ w.T + bias` without autograd: `[M, K]`, `[N, K]` in any memory order, `[N]` or None, to `[M, N]`.

    Args:
        out: Tensor to write the result to; oneDNN cannot and is not used then.
        slot: Scratch memory that may hold the result.
    """
    if out is None and _ONEDNN is not None and onednn_is_faster(x, w):
        return _ONEDNN(x, w, bias, "none", [], "")
    if out is None and slot:
        out = scratch(slot, (len(x), len(w)), x.dtype, x.device)
    if bias is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(bias, x, w.t(), out=out)
