"""Depthwise convolution: of maps, and of packed patches with a border of their visible neighbours.

On CPU its cost is the weight gradient. oneDNN, which PyTorch calls, has a depthwise one for kernels up to 3 columns
wide and takes a dense one for wider kernels, 2 to 20 times slower; here it is asked for a few columns at a time.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from .dispatch import autocast_dtype, backend
from .functional import stats_dtype
from .scratch import scratch

__all__ = ["depthwise_conv", "window_depthwise"]

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


def _weight_grad(
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
    groups, n = [(0, k)], N
    if grad.dtype == torch.float32 and grad.device.type == "cpu":
        groups, n = _column_groups(k), max(1, CHUNK_BYTES // (C * H * W * grad.itemsize))
    total = grad.new_zeros(C, 1, k, k)
    for i in range(0, N, n):
        images = slice(i, min(i + n, N))
        for first, width in groups:
            x, padding = part(images, first, width)
            part_grad = aten.convolution_backward(
                grad[images], x, grad.new_empty(C, 1, k, width), [C], [1, 1], padding, [1, 1], False, [0, 0], C,
                [False, True, False],
            )[1]  # fmt: skip
            total[..., first : first + width] += part_grad
    return total


def _bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return grad.sum(dim=(0, 2, 3), dtype=stats_dtype(grad)).to(grad.dtype)


def _shifted(x: torch.Tensor, first: int, width: int, k: int) -> tuple[torch.Tensor, tuple[int, int]]:
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


@torch.library.custom_op("timm_convnextv2::depthwise", mutates_args=())
def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@torch.library.custom_op("timm_convnextv2::depthwise_backward", mutates_args=())
def _depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; those that nobody needs are of no use."""
    C, k = len(weight), weight.shape[-1]
    # with an odd kernel, the transpose is the same operation with the kernel turned round
    grad_x = F.conv2d(grad, weight.flip(2, 3), padding=k // 2, groups=C) if need_x else x.new_empty(0)
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if need_weight:
        grad_weight = _weight_grad(grad, k, lambda images, first, width: _shifted(x[images], first, width, k))
    if need_bias:
        grad_bias = _bias_grad(grad)
    return grad_x, grad_weight, grad_bias


@depthwise_conv.register_fake
def _(x, weight, bias):
    return torch.empty_like(x, memory_format=torch.channels_last)


@_depthwise_backward.register_fake
def _(grad, x, weight, need_x, need_weight, need_bias):
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(len(weight) if need_bias else 0),
    )


def _setup_dense(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _dense_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    C, k = len(weight), weight.shape[-1]
    needs = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():  # a gradient of gradients was asked for; this one can be differentiated
        pad = [k // 2] * 2
        return aten.convolution_backward(grad, x, weight, [C], [1, 1], pad, [1, 1], False, [0, 0], C, needs)
    found = _depthwise_backward(grad, x, weight, *needs)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


depthwise_conv.register_autograd(_dense_backward, setup_context=_setup_dense)


def _windows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, p, p, C]` at `index` `[N, q, q]`, zeros where it is `N * p * p`, as channels-last `[N, C, q, q]`.

    On CPU in memory that the next call writes over.
    """
    return _gather(_with_zero(x), index)


def _with_zero(x: torch.Tensor) -> torch.Tensor:
    """`[N, p, p, C]` as tokens `[N * p * p + 1, C]`, the last of them zero."""
    C = x.shape[-1]
    tokens = scratch("tokens", (x.numel() // C + 1, C), x.dtype, x.device)
    return torch.cat([x.view(-1, C), x.new_zeros(1, C)], out=tokens)


def _gather(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens at `index` `[n, h, w]` as channels-last `[n, C, h, w]`."""
    windows = scratch("windows", (index.numel(), tokens.shape[1]), tokens.dtype, tokens.device)
    torch.index_select(tokens, 0, index.flatten(), out=windows)
    return windows.view(*index.shape, -1).permute(0, 3, 1, 2)


@torch.library.custom_op("timm_convnextv2::window_depthwise", mutates_args=())
def _window_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, triton: bool
) -> torch.Tensor:
    if triton:
        from .triton_kernels import depthwise_forward

        return depthwise_forward(x, weight.contiguous(), bias, index)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(_windows(x, index), weight, bias, groups=len(weight)).permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("timm_convnextv2::window_depthwise_backward", mutates_args=())
def _window_depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, has_bias: bool, triton: bool,
    need_x: bool, need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; those that nobody needs are of no use."""
    C = len(weight)
    nothing = x.new_empty(0)
    grad_x, grad_weight, grad_bias = nothing, nothing.clone(), nothing.clone()
    if triton:
        from . import triton_kernels

        if need_x:
            grad_x = triton_kernels.depthwise_input_grad(grad, weight.contiguous(), index)
        if need_weight:
            grad_weight, grad_bias = triton_kernels.depthwise_weight_grad(x, grad, index, weight.shape[-1])
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            # neighbourhood is mutual: the transpose is the same operation with the kernel turned round
            grad_x = F.conv2d(_windows(grad, index), weight.flip(2, 3), groups=C).permute(0, 2, 3, 1).contiguous()
        if need_weight:
            p, maps = x.shape[1], grad.permute(0, 3, 1, 2)
            tokens = _with_zero(x)

            def part(patches: slice, first: int, width: int) -> tuple[torch.Tensor, tuple[int, int]]:
                return _gather(tokens, index[patches, :, first : first + p + width - 1]), (0, 0)

            grad_weight = _weight_grad(maps, weight.shape[-1], part)
            if has_bias:
                grad_bias = _bias_grad(maps)
    return grad_x, grad_weight, grad_bias


@_window_depthwise.register_fake
def _(x, weight, bias, index, triton):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_window_depthwise_backward.register_fake
def _(grad, x, weight, index, has_bias, triton, need_x, need_weight):
    C = len(weight)
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(C if need_weight and (has_bias or triton) else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, index, ctx.triton = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    x, weight, index = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    found = _window_depthwise_backward(
        grad.contiguous(), x, weight, index, ctx.has_bias, ctx.triton, need_x, need_weight or need_bias
    )
    needs = (need_x, need_weight, need_bias)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


_window_depthwise.register_autograd(_backward, setup_context=_setup_context)


def window_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Submanifold depthwise convolution of packed patches; work and memory go with the number of patches.

    Its gradient can be taken once.

    Args:
        x: Packed patches `[N, p, p, C]`.
        weight: Kernel `[C, 1, k, k]`, k odd.
        bias: `[C]` or None.
        index: For each patch its tokens with a border of `k // 2`, int64 `[N, p + k - 1, p + k - 1]` into the
            `N * p * p` tokens, `N * p * p` where there is none (removed, or outside of the image).

    Returns:
        `[N, p, p, C]`.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _window_depthwise(x.contiguous(), weight, bias, index, backend(x.device) == "triton")


@register_flop_formula([torch.ops.timm_convnextv2.depthwise, torch.ops.timm_convnextv2.window_depthwise])
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3]


@register_flop_formula(torch.ops.timm_convnextv2.window_depthwise_backward)
def _backward_flops(grad, x, weight, index, has_bias, triton, need_x, need_weight, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)


@register_flop_formula(torch.ops.timm_convnextv2.depthwise_backward)
def _dense_backward_flops(grad, x, weight, need_x, need_weight, need_bias, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)
