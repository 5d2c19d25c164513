"""Depthwise convolution on packed patches, reading each patch with a border of its visible neighbours."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from .backends import autocast_dtype, backend
from .scratch import scratch

__all__ = ["is_plain_depthwise", "window_depthwise"]


def is_plain_depthwise(conv: nn.Module) -> bool:
    """Whether `window_depthwise` computes what `conv` does: depthwise, stride and dilation 1, 'same' zero padding."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


def _windows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, p, p, C]` at `index` `[N, q, q]`, zeros where it is `N * p * p`, as channels-last `[N, C, q, q]`.

    On CPU in memory that the next call writes over.
    """
    C = x.shape[-1]
    tokens = scratch("tokens", (x.numel() // C + 1, C), x.dtype, x.device)
    torch.cat([x.view(-1, C), x.new_zeros(1, C)], out=tokens)
    windows = scratch("windows", (index.numel(), C), x.dtype, x.device)
    torch.index_select(tokens, 0, index.flatten(), out=windows)
    return windows.view(*index.shape, C).permute(0, 3, 1, 2)


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
    grad, C = grad.contiguous(), len(weight)
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
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad.permute(0, 3, 1, 2), _windows(x, index), weight, [C], [1, 1], [0, 0], [1, 1], False, [0, 0], C,
                [False, True, has_bias],
            )  # fmt: skip
            grad_bias = grad_bias if has_bias else nothing.clone()
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
        grad, x, weight, index, ctx.has_bias, ctx.triton, need_x, need_weight or need_bias
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


@register_flop_formula(torch.ops.timm_convnextv2.window_depthwise)
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3]


@register_flop_formula(torch.ops.timm_convnextv2.window_depthwise_backward)
def _backward_flops(grad, x, weight, index, has_bias, triton, need_x, need_weight, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)
