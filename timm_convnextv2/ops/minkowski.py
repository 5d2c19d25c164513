"""The packed depthwise convolution on MinkowskiEngine, the library of the official pretraining code.

It has the functions of `ops.torch_kernels` for that convolution. The engine finds neighbouring visible tokens in its
coordinate map and runs `MinkowskiChannelwiseConvolution` on them. The input's gradient is the same convolution with the
flipped kernel; the weight's gradient is a sum over the engine's pairs of neighbours.
"""

import collections
import collections.abc
import functools
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BUILD = (
    "It must be built from source, which takes minutes (docs/performance.md, 'MinkowskiEngine'): a BLAS with headers "
    "(`apt-get install libopenblas-dev`), `pip install 'setuptools<65' 'numpy<2' ninja`, `pip download --no-binary "
    ":all: --no-deps --no-build-isolation MinkowskiEngine==0.5.4`, and in the unpacked folder `python setup.py install "
    "--cpu_only --blas=openblas`."
)


@functools.cache
def engine() -> Any:
    """Imports MinkowskiEngine; a RuntimeError says how to build it if it is missing or built for another PyTorch."""
    lent = not hasattr(collections, "Sequence")  # its last release imports the name, which Python 3.10 removed
    if lent:
        collections.Sequence = collections.abc.Sequence  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return import_module("MinkowskiEngine")
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeError(f"MinkowskiEngine cannot be imported ({error}). {BUILD}") from error
    finally:
        if lent:
            del collections.Sequence  # pyright: ignore[reportAttributeAccessIssue]


class _Map(NamedTuple):
    """Tokens in the engine's coordinate map."""

    manager: Any
    key: Any
    order: Tensor | None  # rows of the tokens in the engine's order, `[T]`; None if it kept our order
    back: Tensor | None  # the inverse permutation


_maps = WeakTensorKeyDictionary()  # built once for the blocks of a stage, forward and backward


def _map(coordinates: Tensor) -> _Map:
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


def kernel_rows(weight: Tensor) -> Tensor:
    """A depthwise kernel `[C, 1, k, k]` in the engine's column-major layout, `[k * k, C]`."""
    return weight.squeeze(1).permute(2, 1, 0).flatten(0, 1)


def window_conv(x: Tensor, weight: Tensor, bias: Tensor | None, where: Tensor) -> Tensor:
    """Submanifold depthwise convolution of packed patches by the engine's own module; see `ops.window_depthwise`."""
    here, tokens = _map(where), x.flatten(0, 2)
    sparse = engine().SparseTensor(
        tokens if here.order is None else tokens[here.order],
        coordinate_map_key=here.key, coordinate_manager=here.manager,
    )  # fmt: skip
    bias = x.new_zeros(1, len(weight)) if bias is None else bias.unsqueeze(0)
    weights = {"kernel": kernel_rows(weight), "bias": bias}
    out = torch.func.functional_call(_module(len(weight), weight.shape[-1]), weights, (sparse,)).F
    return (out if here.back is None else out[here.back]).view(x.shape)


def window_conv_input_grad(grad: Tensor, weight: Tensor, where: Tensor) -> Tensor:
    """Gradient of `window_conv` for `x`."""
    return window_conv(grad, weight.flip(2, 3), None, where)


def window_conv_weight_grad(x: Tensor, grad: Tensor, where: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gradients for the weight, `[C, 1, k, k]`, from the pairs of tokens that each tap joins, and for the bias."""
    here, x, grad = _map(where), x.flatten(0, 2), grad.flatten(0, 2)
    full = torch.promote_types(x.dtype, torch.float32)
    bias = grad.sum(dim=0, dtype=full)
    if here.order is not None:
        x, grad = x[here.order], grad[here.order]
    rows = x.new_zeros(k * k, x.shape[1], dtype=full)
    for tap, pairs in here.manager.kernel_map(here.key, here.key, 1, k, 1).items():
        source, target = pairs.long().to(x.device)
        rows[tap] = (x[source] * grad[target]).sum(dim=0, dtype=full)
    return rows.view(k, k, -1).permute(2, 1, 0).unsqueeze(1).contiguous(), bias
