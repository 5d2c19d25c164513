"""LayerNorm of tokens as a differentiable operation.

The Triton kernels read and write each type directly; PyTorch under autocast copies to float32 and back. On CPU only the
backward is faster (`ops.torch_kernels.layer_norm_backward`).

Source: Layer Normalization, https://arxiv.org/abs/1607.06450; the plain form is `ops.functional.layer_norm`.
"""

from functools import partial

import torch
from torch import Tensor

from . import dispatch
from .functional import differentiable_gradients, layer_norm, stats_dtype


@torch.library.custom_op("timm_convnextv2::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, their mean and their reciprocal standard deviation."""
    return dispatch.kernels(kernels).layer_norm(x, weight, bias, eps, dtype)


@torch.library.custom_op("timm_convnextv2::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, kernels: str, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (with the weight's); outputs whose `need_*` flag is False are placeholders."""
    run = dispatch.kernels(kernels).layer_norm_backward
    dx, d_weight, d_bias = run(grad, x, mean, rstd, weight, need_x, need_weight)
    dx = x.new_empty(0) if dx is None else dx
    if not need_weight:
        return dx, weight.new_empty(0), weight.new_empty(0)
    # copies: both are views of one sum, and outputs of a custom operation must not share memory
    return dx, d_weight.to(weight.dtype, copy=True), d_bias.to(weight.dtype, copy=True)


@_layer_norm.register_fake
def _(x, weight, bias, eps, dtype, kernels):
    statistics = (x.new_empty(*x.shape[:-1], 1, dtype=stats_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), *statistics


@_layer_norm_backward.register_fake
def _(grad, x, mean, rstd, weight, kernels, need_x, need_weight):
    sums = (weight.new_empty(weight.shape if need_weight else 0) for _ in range(2))
    return x.new_empty(x.shape if need_x else 0), *sums


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps, _, ctx.kernels = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    if grad is None:
        return (None,) * 6
    x, weight, mean, rstd = ctx.saved_tensors
    need_x, need_weight, need_bias = needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # double backward: differentiate the plain form
        bias = torch.zeros_like(weight, requires_grad=need_bias)  # its values do not affect any gradient
        plain = partial(layer_norm, eps=ctx.eps, dtype=grad.dtype)
        return *differentiable_gradients(plain, (x, weight, bias), needs, grad), None, None, None
    wanted = need_x, need_weight or need_bias
    found = _layer_norm_backward(grad.contiguous(), x, mean, rstd, weight, ctx.kernels, *wanted)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis of `[..., C]`, with float32 statistics; contiguous, rounded once to `dtype`."""
    return _layer_norm(x.contiguous(), weight, bias, eps, dtype, dispatch.kernels_name(x.device))[0]
