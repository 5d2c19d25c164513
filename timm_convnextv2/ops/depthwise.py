"""Depthwise convolution as differentiable operations: of maps, and of packed patches with a border of neighbours.

On maps PyTorch's operations run where they are faster: on CPU all but the weight gradient (`ops.gemm.weight_grad`).
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .gemm import bias_grad, shifted, weight_grad

aten = torch.ops.aten


@torch.library.custom_op("timm_convnextv2::depthwise", mutates_args=())
def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@torch.library.custom_op("timm_convnextv2::depthwise_backward", mutates_args=())
def _depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; outputs whose `need_*` flag is False are placeholders."""
    C, k = len(weight), weight.shape[-1]
    # with an odd kernel the transpose is the same operation with the flipped kernel
    with torch.autocast(x.device.type, enabled=False):
        grad_x = F.conv2d(grad, weight.flip(2, 3), padding=k // 2, groups=C) if need_x else x.new_empty(0)
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if need_weight:
        grad_weight = weight_grad(grad, k, lambda images, first, width: shifted(x[images], first, width, k))
    if need_bias:
        grad_bias = bias_grad(grad)
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
    # channels-last; vmap does not know the memory format by name
    grad = grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if torch.is_grad_enabled():  # double backward: this operation is differentiable
        pad = [k // 2] * 2
        return aten.convolution_backward(grad, x, weight, [C], [1, 1], pad, [1, 1], False, [0, 0], C, needs)
    found = _depthwise_backward(grad, x, weight, *needs)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


depthwise_conv.register_autograd(_dense_backward, setup_context=_setup_dense)


@torch.library.custom_op("timm_convnextv2::window_depthwise", mutates_args=())
def _window_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, kernels: str
) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.kernels(kernels).window_conv(x, weight, bias, index)


@torch.library.custom_op("timm_convnextv2::window_depthwise_backward", mutates_args=())
def _window_depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, kernels: str, need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, weight and bias (with the weight's); outputs whose `need_*` flag is False are placeholders."""
    run = dispatch.kernels(kernels)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            grad_x = run.window_conv_input_grad(grad, weight, index)
        if need_weight:
            sums = run.window_conv_weight_grad(x, grad, index, weight.shape[-1])
            grad_weight, grad_bias = (total.to(weight.dtype) for total in sums)
    return grad_x, grad_weight, grad_bias


@_window_depthwise.register_fake
def _(x, weight, bias, index, kernels):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_window_depthwise_backward.register_fake
def _(grad, x, weight, index, kernels, need_x, need_weight):
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(len(weight) if need_weight else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, index, ctx.kernels = inputs
    ctx.save_for_backward(x, weight, index)


def _backward(ctx, grad):
    x, weight, index = ctx.saved_tensors
    need_x, need_weight, need_bias = needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # double backward: differentiate the plain form
        return *_plain_window_gradients(grad, x, weight, index, needs), None, None
    found = _window_depthwise_backward(
        grad.contiguous(), x, weight, index, ctx.kernels, need_x, need_weight or need_bias
    )
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def _plain_window_gradients(grad, x, weight, index, needs) -> list[torch.Tensor | None]:
    """Gradients of x, weight and bias that can be differentiated again; None where not needed."""
    C = x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        bias = weight.new_zeros(C, requires_grad=needs[2])  # its values do not affect any gradient
        tokens = torch.cat([x.reshape(-1, C), x.new_zeros(1, C)])  # the last token stands for positions without one
        out = F.conv2d(tokens[index].permute(0, 3, 1, 2), weight, bias, groups=C).permute(0, 2, 3, 1)
        leaves = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, leaves, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_window_depthwise.register_autograd(_backward, setup_context=_setup_context)


def window_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Submanifold depthwise convolution of packed patches `[N, p, p, C]`; cost is proportional to their number.

    Args:
        weight: Kernel `[C, 1, k, k]`, k odd.
        index: The tokens of each patch with a border of `k // 2`, int64 `[N, p + k - 1, p + k - 1]` into the
            `N * p * p` tokens; `N * p * p` for removed positions and those outside the image.
    """
    dtype = dispatch.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _window_depthwise(x.contiguous(), weight, bias, index, dispatch.kernels_name(x.device))


@register_flop_formula([torch.ops.timm_convnextv2.depthwise, torch.ops.timm_convnextv2.window_depthwise])
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3]


@register_flop_formula(torch.ops.timm_convnextv2.window_depthwise_backward)
def _backward_flops(grad, x, weight, index, kernels, need_x, need_weight, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)


@register_flop_formula(torch.ops.timm_convnextv2.depthwise_backward)
def _dense_backward_flops(grad, x, weight, need_x, need_weight, need_bias, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)
