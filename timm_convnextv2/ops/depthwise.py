"""Depthwise convolution as differentiable operations: of maps, and of packed patches with a border of neighbours.

On maps PyTorch's operations run where they are faster: on CPU all but the weight gradient (`ops.gemm.weight_grad`).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .functional import differentiable_gradients
from .gemm import bias_grad, shifted, weight_grad

aten = torch.ops.aten


@torch.library.custom_op("timm_convnextv2::depthwise", mutates_args=())
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@torch.library.custom_op("timm_convnextv2::depthwise_backward", mutates_args=())
def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; outputs whose `need_*` flag is False are placeholders."""
    C, k = len(weight), weight.shape[-1]
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    # with an odd kernel the transpose is the same operation with the flipped kernel
    if need_x:
        with torch.autocast(x.device.type, enabled=False):
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=k // 2, groups=C)
    if need_weight:
        total = weight_grad(grad, k, lambda images, first, width: shifted(x[images], first, width, k))
        grad_weight = total.to(weight.dtype)
    if need_bias:
        grad_bias = bias_grad(grad).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


@depthwise_conv.register_fake
def _(x, weight, bias):
    return torch.empty_like(x, memory_format=torch.channels_last)


@_depthwise_backward.register_fake
def _(grad, x, weight, need_x, need_weight, need_bias):
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape if need_weight else 0), weight.new_empty(len(weight) * need_bias)


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
def _window_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, where: Tensor, kernels: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.kernels(kernels).window_conv(x, weight, bias, where)


@torch.library.custom_op("timm_convnextv2::window_depthwise_backward", mutates_args=())
def _window_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, where: Tensor, kernels: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (with the weight's); outputs whose `need_*` flag is False are placeholders."""
    run = dispatch.kernels(kernels)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            grad_x = run.window_conv_input_grad(grad, weight, where)
        if need_weight:
            sums = run.window_conv_weight_grad(x, grad, where, weight.shape[-1])
            grad_weight, grad_bias = (total.to(weight.dtype) for total in sums)
    return grad_x, grad_weight, grad_bias


@_window_depthwise.register_fake
def _(x, weight, bias, where, kernels):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_window_depthwise_backward.register_fake
def _(grad, x, weight, where, kernels, need_x, need_weight):
    sums = (weight.new_empty(shape if need_weight else 0) for shape in (weight.shape, len(weight)))
    return x.new_empty(x.shape if need_x else 0), *sums


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, where, ctx.kernels = inputs
    ctx.save_for_backward(x, weight, where)


def _backward(ctx, grad):
    x, weight, where = ctx.saved_tensors
    need_x, need_weight, need_bias = needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # double backward: differentiate the plain form
        bias = weight.new_zeros(len(weight), requires_grad=need_bias)  # its values do not affect any gradient
        plain = dispatch.kernels(ctx.kernels).window_conv if ctx.kernels == "minkowski" else _plain_window_conv
        found = differentiable_gradients(partial(plain, where=where), (x, weight, bias), needs, grad)
        return *found, None, None
    wanted = need_x, need_weight or need_bias
    found = _window_depthwise_backward(grad.contiguous(), x, weight, where, ctx.kernels, *wanted)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def _plain_window_conv(x: Tensor, weight: Tensor, bias: Tensor, where: Tensor) -> Tensor:
    C = x.shape[-1]
    tokens = torch.cat([x.reshape(-1, C), x.new_zeros(1, C)])  # the last token stands for positions without one
    return F.conv2d(tokens[where].permute(0, 3, 1, 2), weight, bias, groups=C).permute(0, 2, 3, 1)


_window_depthwise.register_autograd(_backward, setup_context=_setup_context)


def window_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, where: Tensor) -> Tensor:
    """Submanifold depthwise convolution of packed patches `[N, p, p, C]`; cost is proportional to their number.

    Args:
        weight: Kernel `[C, 1, k, k]`, k odd.
        where: The tokens of each patch with a border of `k // 2`, int64 `[N, p + k - 1, p + k - 1]` into the
            `N * p * p` tokens; `N * p * p` for removed positions and those outside the image. For the backend
            'minkowski' image, row and column of each token, int32 `[N * p * p, 3]`, unique.
    """
    dtype = dispatch.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    kernels = "minkowski" if dispatch.backend(x.device) == "minkowski" else dispatch.kernels_name(x.device)
    return _window_depthwise(x.contiguous(), weight, bias, where, kernels)


@register_flop_formula([torch.ops.timm_convnextv2.depthwise, torch.ops.timm_convnextv2.window_depthwise])
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3]


@register_flop_formula(
    [torch.ops.timm_convnextv2.depthwise_backward, torch.ops.timm_convnextv2.window_depthwise_backward]
)
def _backward_flops(grad, x, weight, *args, **kwargs) -> int:
    need_x, need_weight = [arg for arg in args if isinstance(arg, bool)][:2]
    return _forward_flops(x, weight) * (need_x + need_weight)
