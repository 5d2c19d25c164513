"""Depthwise weight gradient on CPU, a few kernel columns at a time.

oneDNN, which PyTorch calls, has a depthwise weight gradient for kernels up to 3 columns wide and takes a dense one for
wider kernels, 2 to 20 times slower. Here it is asked for a few columns at a time, and in float32 for half types too:
their wide one is as slow on a CPU with bfloat16 instructions, and slower yet in float16.
"""

from collections.abc import Callable

import torch

from .functional import stats_dtype
from .scratch import scratch

__all__ = ["HAS_ONEDNN", "MAX_COLUMNS", "bias_grad", "shifted", "weight_grad"]

MAX_COLUMNS = 3  # of the kernel, in oneDNN's depthwise weight gradient (jit_uni_dw_conv_kernel_utils.cpp, "kw > 3")
CHUNK_BYTES = 8 * 2**20  # of the gradient, at a time: what is gathered for it stays in the cache
HAS_ONEDNN = torch.backends.mkldnn.is_available()

aten = torch.ops.aten


def _column_groups(k: int) -> list[tuple[int, int]]:
    """`(first, width)` of groups of kernel columns, up to `MAX_COLUMNS` wide, the middle one first."""
    width = min(k, MAX_COLUMNS)
    side = (k - width) // 2
    groups = [(side, width)]
    for first in range(0, side, MAX_COLUMNS):
        groups += [(start + first, min(MAX_COLUMNS, side - first)) for start in (0, side + width)]
    return groups


def weight_grad(
    grad: torch.Tensor, k: int, part: Callable[[slice, int, int], tuple[torch.Tensor, tuple[int, int]]]
) -> torch.Tensor:
    """Weight gradient `[C, 1, k, k]`.

    Args:
        grad: Gradient of the output, `[N, C, H, W]`, channels-last.
        k: Side of the kernel.
        part: Takes images (or patches), first kernel column and number of columns, returns the input that this part of
            the kernel has seen, and its padding (rows, columns).
    """
    N, C, H, W = grad.shape
    groups, n, dtype = [(0, k)], N, grad.dtype
    if dtype != torch.float64 and grad.device.type == "cpu":
        groups, n, dtype = _column_groups(k), max(1, CHUNK_BYTES // (C * H * W * 4)), torch.float32
    total = grad.new_zeros(C, 1, k, k, dtype=dtype)
    for i in range(0, N, n):
        images = slice(i, min(i + n, N))
        here = grad[images].to(dtype)
        for first, width in groups:
            x, padding = part(images, first, width)
            part_grad = aten.convolution_backward(
                here, x.to(dtype), total.new_empty(C, 1, k, width), [C], [1, 1], padding, [1, 1], False, [0, 0], C,
                [False, True, False],
            )[1]  # fmt: skip
            total[..., first : first + width] += part_grad
    return total.to(grad.dtype)


def bias_grad(grad: torch.Tensor) -> torch.Tensor:
    """Bias gradient `[C]` of the output's gradient `[N, C, H, W]`."""
    return grad.sum(dim=(0, 2, 3), dtype=stats_dtype(grad)).to(grad.dtype)


def shifted(x: torch.Tensor, first: int, width: int, k: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """What `width` kernel columns from `first` on see of `[N, C, H, W]`, and the padding that is left to the call.

    The middle columns see the input itself. What others see is written to memory that the next call writes over.
    """
    N, C, H, W = x.shape
    rows = k // 2 if H >= k else 0  # for a kernel higher than its map oneDNN has no depthwise one either
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
