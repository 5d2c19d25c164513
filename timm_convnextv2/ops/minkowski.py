"""The packed depthwise convolution on MinkowskiEngine, the library of the official pretraining code.

The engine finds neighbouring visible tokens in its coordinate map and runs `MinkowskiChannelwiseConvolution` on them.
The input's gradient is the same convolution with the flipped kernel; the weight's gradient is a sum over the engine's
pairs of neighbours.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from . import dispatch
from .engine import BUILD, engine


class _Map(NamedTuple):
    """Tokens in the engine's coordinate map."""

    manager: Any
    key: Any
    order: torch.Tensor | None  # rows of the tokens in the engine's order, `[T]`; None if it kept our order
    back: torch.Tensor | None  # the inverse permutation


_maps = WeakTensorKeyDictionary()  # built once for the blocks of a stage, forward and backward


def _map(coordinates: torch.Tensor) -> _Map:
    """The engine's map of `coordinates`, int32 `[T, 3]`; a RuntimeError if it was built without the GPU they are on."""
    found = _maps.get(coordinates)
    if found is None:
        me = engine()
        if coordinates.is_cuda and not me.is_cuda_available():
            raise RuntimeError(
                "MinkowskiEngine was built for the CPU alone, and this model is on a GPU. Build it with CUDA's "
                f"compiler, and `--force_cuda` in place of `--cpu_only`. {BUILD}"
            )
        kind = me.CoordinateMapType.CUDA if coordinates.is_cuda else me.CoordinateMapType.CPU
        manager = me.CoordinateManager(D=2, coordinate_map_type=kind)
        key, (order, back) = manager.insert_and_map(coordinates, 1)
        kept = len(back) == 0  # an empty map means that no token moved
        found = _Map(manager, key, None if kept else order.long(), None if kept else back.long())
        _maps[coordinates] = found
    return found


@functools.cache
def _module(channels: int, k: int) -> Any:
    """The engine's module, called with our weights."""
    return engine().MinkowskiChannelwiseConvolution(channels, kernel_size=k, bias=True, dimension=2)


def kernel_rows(weight: torch.Tensor) -> torch.Tensor:
    """A depthwise kernel `[C, 1, k, k]` in the engine's column-major layout, `[k * k, C]`."""
    return weight.squeeze(1).permute(2, 1, 0).flatten(0, 1)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, coordinates: torch.Tensor
) -> torch.Tensor:
    """The convolution by the engine's own module; shapes as in `minkowski_depthwise`."""
    where = _map(coordinates)
    sparse = engine().SparseTensor(
        x if where.order is None else x[where.order], coordinate_map_key=where.key, coordinate_manager=where.manager
    )
    bias = x.new_zeros(1, len(weight)) if bias is None else bias.unsqueeze(0)
    weights = {"kernel": kernel_rows(weight), "bias": bias}
    out = torch.func.functional_call(_module(len(weight), weight.shape[-1]), weights, (sparse,)).F
    return out if where.back is None else out[where.back]


def _weight_grad(x: torch.Tensor, grad: torch.Tensor, coordinates: torch.Tensor, k: int) -> torch.Tensor:
    """Gradient of the kernel, `[C, 1, k, k]`, from the pairs of tokens that each of its taps joins."""
    where = _map(coordinates)
    if where.order is not None:
        x, grad = x[where.order], grad[where.order]
    full = torch.promote_types(x.dtype, torch.float32)
    rows = x.new_zeros(k * k, x.shape[1], dtype=full)
    for tap, pairs in where.manager.kernel_map(where.key, where.key, 1, k, 1).items():
        source, target = pairs.long().to(x.device)
        rows[tap] = (x[source] * grad[target]).sum(dim=0, dtype=full)
    return rows.view(k, k, -1).permute(2, 1, 0).unsqueeze(1)


@torch.library.custom_op("timm_convnextv2::minkowski_depthwise", mutates_args=())
def _minkowski_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, coordinates: torch.Tensor
) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _convolve(x, weight, bias, coordinates)


@torch.library.custom_op("timm_convnextv2::minkowski_depthwise_backward", mutates_args=())
def _minkowski_depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, coordinates: torch.Tensor, need_x: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; outputs whose `need_*` flag is False are placeholders."""
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            grad_x = _convolve(grad, weight.flip(2, 3), None, coordinates)
        if need_weight:
            grad_weight = _weight_grad(x, grad, coordinates, weight.shape[-1]).to(weight.dtype).contiguous()
        if need_bias:
            grad_bias = grad.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(weight.dtype)
    return grad_x, grad_weight, grad_bias


@_minkowski_depthwise.register_fake
def _(x, weight, bias, coordinates):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_minkowski_depthwise_backward.register_fake
def _(grad, x, weight, coordinates, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(len(weight) if need_bias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, coordinates = inputs
    ctx.save_for_backward(x, weight, bias, coordinates)


def _backward(ctx, grad):
    x, weight, bias, coordinates = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # double backward: differentiate the engine's module
        leaves = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
        with torch.autocast(x.device.type, enabled=False):
            out = _convolve(x, weight, bias, coordinates)
            found = iter(torch.autograd.grad(out, leaves, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None
    found = _minkowski_depthwise_backward(grad.contiguous(), x, weight, coordinates, *needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None


_minkowski_depthwise.register_autograd(_backward, setup_context=_setup_context)


def minkowski_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, coordinates: torch.Tensor
) -> torch.Tensor:
    """Submanifold depthwise convolution of tokens `[T, C]` with a kernel `[C, 1, k, k]`, k odd.

    Args:
        coordinates: Image, row and column of each token, int32 `[T, 3]`, unique.

    Raises:
        RuntimeError: MinkowskiEngine is missing, or was built without CUDA and the tensors are on a GPU.
    """
    dtype = dispatch.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _minkowski_depthwise(x.contiguous(), weight, bias, coordinates)


@register_flop_formula(torch.ops.timm_convnextv2.minkowski_depthwise)
def _forward_flops(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3]


@register_flop_formula(torch.ops.timm_convnextv2.minkowski_depthwise_backward)
def _backward_flops(grad, x, weight, coordinates, need_x, need_weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[2] * weight[3] * (need_x + need_weight)
