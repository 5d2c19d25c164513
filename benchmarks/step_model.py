"""Bytes and operations of a pretraining step (forward, loss, backward, AdamW), kernel by kernel.

`fcmae_kernels` is written by hand, of the step under bfloat16 autocast with the backend 'triton'. `counted` counts what
PyTorch's own operations of any step read, write and compute, on tensors that have no memory. A kernel's bytes are its
inputs once and its outputs once: caches between kernels are not counted, nor what a kernel reads twice.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from timm_convnextv2 import FCMAE
from timm_convnextv2.models.masking import num_visible
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.ops import use_backend

__all__ = ["Kernel", "counted", "fcmae_kernels", "masked_dense_step", "total"]

HALF, FULL = 2, 4  # bytes of bfloat16 and of float32


class Kernel(NamedTuple):
    """A launch, or several alike.

    Attributes:
        part: What it belongs to, in the table.
        name: What it computes.
        flops: Multiplications and additions.
        bytes: Read and written.
        unit: 'tensor' (matrix products), or 'vector'.
        launches: How many kernels a GPU runs for it.
    """

    part: str
    name: str
    flops: float
    bytes: float
    unit: str = "vector"
    launches: int = 1


def _gemm(part: str, name: str, m: int, n: int, k: int, out: int = HALF, more: float = 0) -> Kernel:
    """`[m, k] @ [k, n]`; `more` bytes beside its operands and its result."""
    return Kernel(part, name, 2.0 * m * n * k, HALF * (m * k + k * n) + out * m * n + more, "tensor")


def _norm(part: str, T: int, C: int, read: int = HALF, write: int = HALF, launches: int = 4) -> tuple[Kernel, Kernel]:
    """LayerNorm of T tokens and its backward, as `ops.triton` has them; `read` and `write` bytes a number.

    The backward's `launches` are the kernel, the sum over its programs, and the gradients of weight and bias, copied.
    """
    elements, statistics, programs = float(T * C), 2.0 * FULL * T, min(1024, math.ceil(T / 16))
    sums = 2 * 2.0 * FULL * programs * C  # gradients of weight and bias, of each program: written and read
    return (
        Kernel(part, "LayerNorm", 8 * elements, (read + write) * elements + statistics),
        Kernel(
            part, "LayerNorm backward", 16 * elements, (write + 2 * read) * elements + statistics + sums,
            launches=launches,
        ),
    )  # fmt: skip


def _token_mlp(part: str, T: int, C: int, images: int, stream: int = HALF) -> Iterator[Kernel]:
    """As `ops.token_mlp` with the kernels of `ops.triton`; T tokens of C channels in all images together.

    The residual stream has `stream` bytes a number: in float32 the second Linear cannot add to it, and the mixer copies
    it to bfloat16 and its own gradient back.
    """
    F_, wide, narrow = 4 * C, 4.0 * C * T, float(C * T)
    rows = 3.0 * FULL * images * F_  # GRN's norms, scale and their gradients, of each image
    norm, norm_backward = _norm("LayerNorm", T, C, launches=6)  # gradients are added to zeros
    yield norm
    yield _gemm("GEMM", "first Linear", T, F_, C)
    yield Kernel("GELU, GRN", "gelu_square_sum", 16 * wide, HALF * wide + rows, launches=9)
    yield Kernel("GELU, GRN", "gelu_scale", 16 * wide, 2 * HALF * wide + rows)
    yield Kernel("residual", "shortcut + bias", narrow, 2 * stream * narrow)
    if stream == HALF:
        yield _gemm("GEMM", "second Linear", T, C, F_, more=HALF * narrow)
    else:
        yield _gemm("GEMM", "second Linear", T, C, F_)
        yield Kernel("residual", "sum", narrow, (HALF + 2 * stream) * narrow)
        for what in ("mixer's input", "mixer's gradient", "gradient"):
            yield Kernel("residual", f"cast of the {what}", 0, (HALF + stream) * narrow)
    yield Kernel("residual", "bias gradient", narrow, HALF * narrow)
    yield _gemm("GEMM", "second Linear, input gradient", T, F_, C)
    yield Kernel("GELU, GRN", "gelu_reductions", 18 * wide, 3 * HALF * wide + rows, launches=12)
    yield _gemm("GEMM", "second Linear, weight gradient", C, F_, T, more=(HALF + FULL) * C * F_)
    yield Kernel("GELU, GRN", "gelu_backward", 30 * wide, 3 * HALF * wide + rows)
    yield norm._replace(name="LayerNorm again")  # it was not kept
    yield _gemm("GEMM", "first Linear, weight gradient", F_, C, T, more=(HALF + FULL) * C * F_)
    yield _gemm("GEMM", "first Linear, input gradient", T, C, F_)
    yield norm_backward
    yield Kernel("residual", "sum of both gradients", narrow, 3 * stream * narrow)
    yield Kernel("weights", "casts to bfloat16", 0, 2 * (FULL + HALF) * 2.0 * C * F_, launches=8)


def _depthwise(T: int, C: int, k: int, index: float = 0) -> Iterator[Kernel]:
    """Forward and both gradients; `index` bytes say where neighbours lie."""
    taps, moved = 2.0 * k * k * T * C, 2.0 * HALF * T * C + index
    yield Kernel("depthwise", "depthwise", taps, moved, launches=2)
    yield Kernel("depthwise", "depthwise, input gradient", taps, moved, launches=2)
    yield Kernel("depthwise", "depthwise, weight gradient", taps, moved, launches=4)


def fcmae_kernels(model: FCMAE, batch: int, visible: int | None = None, optimizer: bool = True) -> list[Kernel]:
    """Every kernel of a step of `model` on `batch` images of its nominal size.

    Args:
        model: Its shape is all that counts; it may be on the meta device.
        batch: Images.
        visible: Patches of an image that the encoder computes; those that its mask leaves by default, all of them for
            what a dense encoder with masks costs where a compiler fuses it as well as our kernels are.
        optimizer: With AdamW's update.
    """
    h, w = model.grid(*model.img_size)
    packed = num_visible((h, w), model.mask_ratio)
    visible = packed if visible is None else visible
    index = visible < h * w
    stride, chans, k = model.stride, model.in_chans, 7
    pixels, encoder = batch * visible * stride**2 * chans, model.encoder
    dims = [info["num_chs"] for info in encoder.feature_info]
    reductions = [info["reduction"] for info in encoder.feature_info]
    stem: Any = encoder.stem[0]
    patch = stem.kernel_size[0]
    T = batch * visible * (stride // reductions[0]) ** 2
    found = [Kernel("stem", "pack the pixels", 0, 2 * FULL * pixels)] if index else []
    found += [
        Kernel("stem", "patches in bfloat16", 0, (FULL + HALF) * pixels),
        _gemm("stem", "stem", T, dims[0], patch**2 * chans),
        _gemm("stem", "stem, weight gradient", dims[0], patch**2 * chans, T),
        *_norm("stem", T, dims[0], HALF, FULL),
    ]
    for s, (C, reduction, stage) in enumerate(zip(dims, reductions, encoder.stages, strict=True)):
        p = stride // reduction
        T = batch * visible * p**2
        # the stem's norm gives float32 and begins the residual stream, which is bfloat16 behind a downsampling layer
        stream = HALF if s else FULL
        if s:
            wide = 4 * dims[s - 1]
            found += [
                *_norm("downsampling", 4 * T, dims[s - 1], FULL if s == 1 else HALF, HALF),
                _gemm("downsampling", "downsampling", T, C, wide),
                _gemm("downsampling", "downsampling, input gradient", T, wide, C),
                _gemm("downsampling", "downsampling, weight gradient", C, wide, T),
            ]
        windows = 8.0 * batch * visible * (p + k - 1) ** 2 if index else 0
        for _ in range(len(stage.blocks)):  # type: ignore[arg-type]
            found += [*_depthwise(T, C, k, windows), *_token_mlp(f"stage {s}", T, C, batch, stream)]
    found += _decoder(model, batch, batch * visible, batch * h * w, batch * (h * w - packed))
    if optimizer:
        parameters = sum(p.numel() for p in model.parameters())
        found.append(Kernel("AdamW", "AdamW, fused", 12 * parameters, 7 * FULL * parameters))
    return found


def _decoder(model: FCMAE, batch: int, seen: int, every: int, masked: int) -> list[Kernel]:
    """Projection, block, prediction and loss; all of it is the part 'decoder'."""
    D, C, P = model.proj.out_channels, model.num_features, model.pred.out_channels
    numbers = float(masked * P)
    found = [
        _gemm("", "projection", seen, D, C),
        _gemm("", "projection, input gradient", seen, C, D),
        _gemm("", "projection, weight gradient", D, C, seen),
        Kernel("", "unpack and its gradient", 0, 4.0 * HALF * every * D, launches=4),
        _gemm("", "prediction", masked, P, D),
        _gemm("", "prediction, input gradient", masked, D, P),
        _gemm("", "prediction, weight gradient", P, D, masked),
        # gather, normalise (read, write), cast the prediction, compare, and its gradient in both types
        Kernel("", "target and loss", 10 * numbers, numbers * (6 * FULL + (HALF + FULL) * 2 + 4 * FULL), launches=12),
    ]
    for _ in model.decoder:
        found += [*_depthwise(every, D, 7), *_token_mlp("", every, D, batch)]
    return [kernel._replace(part="decoder") for kernel in found]


# Counting


aten = torch.ops.aten
_MOVE_NOTHING = {
    aten.detach, aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided,
    aten.new_empty_strided,
}  # fmt: skip


class _Count(TorchDispatchMode):
    """Every operation that runs, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim" or func._overloadpacket in _MOVE_NOTHING:
            return out
        read, written = list(_tensors((args, kwargs))), list(_tensors(out))
        name, count = func._overloadpacket.__name__, flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else sum(t.numel() for t in written)
        grouped = "convolution" in name and any(type(a) is int and a > 1 for a in args)
        if grouped and name == "convolution_backward":  # PyTorch's count of the weight gradient knows no groups
            grad, _, weight = args[:3]
            flops = 2 * grad.numel() * weight[0].numel() * sum(args[-1][:2])
        unit = "tensor" if count and not grouped else "vector"
        moved = sum(_memory(t) for t in read) + sum(_memory(t) for t in written)
        self.kernels.append(Kernel(name, name, float(flops), float(moved), unit))
        return out


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _memory(x: torch.Tensor) -> int:
    """Bytes that a tensor covers; one that was expanded covers less than it has elements."""
    covered = 1
    for size, step in zip(x.shape, x.stride(), strict=True):
        covered *= size if step else 1
    return covered * x.element_size()


def counted(step: Callable[[], object]) -> list[Kernel]:
    """PyTorch's operations that `step` runs, in order."""
    with _Count() as count:
        step()
    return count.kernels


def masked_dense_step(model: FCMAE, batch: int, autocast: bool = True) -> list[Kernel]:
    """What a dense encoder with masks runs in plain PyTorch operations (`models.reference`), forward and backward.

    Nothing is computed: the tensors are fake, and on the CPU, where autocast does not send LayerNorm to float32 as it
    does on CUDA; it is sent there by hand.
    """

    def in_float32(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return real(x.float() if autocast else x, *args, **kwargs)

    real = F.layer_norm
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape))
        images = torch.empty(batch, model.in_chans, *model.img_size)
        mask = torch.empty(batch, *model.grid(*model.img_size), dtype=torch.bool)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = reference_forward(model, images, mask).loss
            loss.backward()

        with use_backend("eager"), mock.patch.object(F, "layer_norm", in_float32):
            return counted(step)


def total(kernels: Iterable[Kernel], unit: str | None = None) -> tuple[float, float]:
    """FLOPs and bytes of those of a unit, or of all."""
    chosen = [k for k in kernels if unit in (None, k.unit)]
    return sum(k.flops for k in chosen), sum(k.bytes for k in chosen)
