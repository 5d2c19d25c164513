# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of LayerNorm, and their launchers.

A program holds whole rows in registers: forward reads the input once and writes the tokens once, in their own types.

Source: Layer Normalization, https://arxiv.org/abs/1607.06450.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NUM_WARPS, check, same

# Elements a tile, 16 a thread, as in `.token_mlp`; a longer row takes more warps, up to the 32 of a block.
NORM_TILE = 2048
# The backward's partial sums: 1024 programs at most, as in `.depthwise`, and so many rows at least that float32 sums,
# written and read again, add at most a sixth to what is moved.
NORM_PROGRAMS = 1024
NORM_ROWS = 16


# The channels are a constant: the compiler then knows that rows of 40 begin at multiples of 16 bytes. A model has few
# widths. Pads of a row up to a power of two are loaded as zeros and not stored.


@triton.jit(do_not_specialize=["M"])
def _layer_norm(
    x, weight, bias, out, mean, rstd, M,
    EPS: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    rows = t < M - first
    inside = rows[:, None] & (c < C)[None, :]
    place = t[:, None] * C + c[None, :]
    value = tl.load(x + first * C + place, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(value, 1) / C
    value = tl.where(inside, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + EPS)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + first * C + place, (value * scale[:, None] * w + b).to(out.dtype.element_ty), mask=inside)
    tl.store(mean + first + t, centre, mask=rows)
    tl.store(rstd + first + t, scale, mask=rows)


@triton.jit(do_not_specialize=["M", "tokens"])
def _layer_norm_backward(
    grad, x, mean, rstd, weight, dx, sums, M, tokens,
    DX: tl.constexpr, SUMS: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * tokens
    count = tl.minimum(tokens, M - first).to(tl.int32)
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    grad += first * C
    x += first * C
    dx += first * C
    mean += first
    rstd += first
    d_weight = tl.full([BLOCK_T, BLOCK_C], 0.0, tl.float32)
    d_bias = tl.full([BLOCK_T, BLOCK_C], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < count)[:, None] & (c < C)[None, :]
        place = t[:, None] * C + c[None, :]
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(mean + t, mask=t < count, other=0.0)[:, None]
        scale = tl.load(rstd + t, mask=t < count, other=0.0)[:, None]
        value = (value - centre) * scale
        if SUMS:  # dy is zero outside
            d_weight += dy * value
            d_bias += dy
        if DX:
            dy *= w
            along = tl.sum(dy * value, 1)[:, None] / C
            change = (dy - value * along - tl.sum(dy, 1)[:, None] / C) * scale
            tl.store(dx + place, change.to(dx.dtype.element_ty), mask=inside)
    if SUMS:
        sums += tl.program_id(0) * 2 * C
        tl.store(sums + c, tl.sum(d_weight, 0), mask=c < C)
        tl.store(sums + C + c, tl.sum(d_bias, 0), mask=c < C)


def _blocks(rows: int, channels: int) -> dict[str, int]:
    """The constants of a launch."""
    block_c = triton.next_power_of_2(channels)
    block_t = min(triton.cdiv(NORM_TILE, block_c), triton.next_power_of_2(rows))
    warps = min(max(NUM_WARPS, block_c * NUM_WARPS // NORM_TILE), 32)
    return {"C": channels, "BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": warps}


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last axis in one read and one write."""
    check(x=x, weight=weight, bias=bias)
    C = x.shape[-1]
    same("weight", weight.shape, (C,))
    same("bias", bias.shape, (C,))
    out = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
    if x.numel():
        M, blocks = x.numel() // C, _blocks(x.numel() // C, C)
        with torch.cuda.device_of(x):
            _layer_norm[(triton.cdiv(M, blocks["BLOCK_T"]),)](x, weight, bias, out, mean, rstd, M, EPS=eps, **blocks)
    return out, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `layer_norm` in one read of `grad` and `x` and one write; sums of a program's rows beside it."""
    check(grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    C = x.shape[-1]
    same("grad", grad.shape, x.shape)
    for name, statistic in {"mean": mean, "rstd": rstd}.items():
        same(name, statistic.shape, (*x.shape[:-1], 1))
    same("weight", weight.shape, (C,))
    dx = torch.empty_like(x) if need_x else None
    if not x.numel():
        d_weight, d_bias = x.new_zeros(2, C, dtype=torch.float32) if need_weight else (None, None)
        return dx, d_weight, d_bias
    M, blocks = x.numel() // C, _blocks(x.numel() // C, C)
    block_t = blocks["BLOCK_T"]
    tokens = triton.cdiv(max(triton.cdiv(M, NORM_PROGRAMS), NORM_ROWS), block_t) * block_t
    programs = triton.cdiv(M, tokens)
    sums = x.new_empty(programs, 2, C, dtype=torch.float32) if need_weight else None
    if need_x or need_weight:
        with torch.cuda.device_of(x):
            _layer_norm_backward[(programs,)](
                grad, x, mean, rstd, weight, x if dx is None else dx, mean if sums is None else sums, M, tokens,
                DX=need_x, SUMS=need_weight, **blocks,
            )  # fmt: skip
    d_weight, d_bias = (None, None) if sums is None else sums.sum(0)
    return dx, d_weight, d_bias
