# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of the packed depthwise convolution, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NUM_WARPS, channel_block, check, same

# Neighbouring tokens share most of the rows they gather, through the L1 cache. Two tokens a thread share the loads of
# the weight, and a row of seven taps unrolled takes 110 registers.
CONV_TILE = 2048
CONV_CHANNELS = (64, 32)
# The weight gradient holds a row of taps times this tile in accumulators: 32 registers a thread for 8 taps.
CONV_GRAD_TILE = 512
CONV_GRAD_CHANNELS = (32,)
CONV_GRAD_PROGRAMS = 1024  # about as many as a large GPU runs at a time; bounds the partial sums to a few MB

# The channels are a constant, as in `.layernorm`: whatever row is gathered, the compiler knows that one of 40 begins at
# a multiple of 16 bytes, and loads 16 at a time.


@triton.jit
def _window_corner(t, P: tl.constexpr, K: tl.constexpr):
    """Where in the index the window of flat token `t` begins: the first tap of its first row, int64."""
    side: tl.constexpr = P + K - 1
    return (t // (P * P)).to(tl.int64) * (side * side) + t % (P * P) // P * side + t % P


@triton.jit(do_not_specialize=["M"])
def _depthwise(
    x, weight, bias, index, out, M, C: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    corner = index + _window_corner(t, P, K)
    total = tl.full([BLOCK_T, BLOCK_C], 0.0, tl.float32)
    for i in range(K):
        for j in tl.static_range(K):  # unrolled: a row of taps is in flight together
            tap = i * K + j
            if TURNED:
                tap = K * K - 1 - tap
            w = tl.load(weight + tap * C + c, mask=c < C, other=0.0).to(tl.float32)
            row = tl.load(corner + i * (P + K - 1) + j, mask=t < M, other=M)
            there = (row < M)[:, None] & (c < C)[None, :]
            value = tl.load(x + row[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
            total += value * w[None, :]
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    inside = (t < M)[:, None] & (c < C)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * C + c[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "tokens"])
def _depthwise_weight_grad(
    x, grad, index, sums, M, tokens, C: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of the kernel's taps, as an axis of the tile (`TAPS` is `K` rounded up to a power of two).

    Rows are the first axis of the grid: programs that read the same tokens run together.
    """
    i, part = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, TAPS)
    total = tl.full([TAPS, BLOCK_T, BLOCK_C], 0.0, tl.float32)
    bias_total = tl.full([BLOCK_T, BLOCK_C], 0.0, tl.float32)
    last = tl.minimum(part * tokens + tokens, M)
    for start in range(part * tokens, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < last)[:, None] & (c < C)[None, :]
        dy = tl.load(grad + t.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        bias_total += dy
        place = index + i * (P + K - 1) + _window_corner(t, P, K)[None, :] + j[:, None]
        row = tl.load(place, mask=(t < last)[None, :] & (j < K)[:, None], other=M)
        there = (row < M)[:, :, None] & (c < C)[None, None, :]
        value = tl.load(x + row[:, :, None] * C + c[None, None, :], mask=there, other=0.0).to(tl.float32)
        total += value * dy[None, :, :]
    sums += part.to(tl.int64) * (K * K + 1) * C
    inside = (j < K)[:, None] & (c < C)[None, :]
    tl.store(sums + (i * K + j)[:, None] * C + c[None, :], tl.sum(total, 1), mask=inside)
    if i == 0:
        tl.store(sums + K * K * C + c, tl.sum(bias_total, 0), mask=c < C)


def _check_packed(name: str, x: Tensor, index: Tensor, k: int) -> None:
    N, p = x.shape[:2]
    same(name, x.shape, (N, p, p, x.shape[-1]))
    same("index", index.shape, (N, p + k - 1, p + k - 1))
    if k % 2 == 0:
        raise ValueError(f"The kernel size must be odd, got {k}.")


def _depthwise_launch(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, turned: bool) -> Tensor:
    p, C, k = x.shape[1], x.shape[-1], weight.shape[-1]
    same("weight", weight.shape, (C, 1, k, k))
    out = torch.empty_like(x)
    if not x.numel():
        return out
    tokens = x.numel() // C
    block_c = channel_block(C, CONV_CHANNELS)
    block_t = CONV_TILE // block_c
    taps = weight.view(C, k * k).t().contiguous()  # tiny; the channels of a tap side by side
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(C, block_c))
    with torch.cuda.device_of(x):
        _depthwise[grid](
            x, taps, bias, index, out, tokens,
            C=C, P=p, K=k, TURNED=turned, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def window_conv(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Submanifold depthwise convolution of packed patches, without a window or a dense map in memory."""
    weight = weight.contiguous()
    check(x=x, weight=weight, bias=bias, index=index)
    _check_packed("x", x, index, weight.shape[-1])
    if bias is not None:
        same("bias", bias.shape, (x.shape[-1],))
    return _depthwise_launch(x, weight, bias, index, turned=False)


def window_conv_input_grad(grad: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Gradient of `window_conv` for `x`. Neighbourhood is mutual: the same operation with the flipped kernel."""
    weight = weight.contiguous()
    check(grad=grad, weight=weight, index=index)
    _check_packed("grad", grad, index, weight.shape[-1])
    return _depthwise_launch(grad, weight, None, index, turned=True)


def window_conv_weight_grad(x: Tensor, grad: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gradients of `window_conv` for the weight and the bias (which costs next to nothing beside the weight's)."""
    check(x=x, grad=grad, index=index)
    _check_packed("x", x, index, k)
    same("grad", grad.shape, x.shape)
    p, C = x.shape[1], x.shape[-1]
    if not x.numel():
        return x.new_zeros(C, 1, k, k, dtype=torch.float32), x.new_zeros(C, dtype=torch.float32)
    tokens = x.numel() // C
    block_c = channel_block(C, CONV_GRAD_CHANNELS)
    block_t = CONV_GRAD_TILE // block_c
    blocks = triton.cdiv(C, block_c)
    parts = min(triton.cdiv(tokens, 4 * block_t), triton.cdiv(CONV_GRAD_PROGRAMS, blocks * k))
    per_part = triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t
    parts = triton.cdiv(tokens, per_part)  # none is empty
    sums = x.new_empty(parts, k * k + 1, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _depthwise_weight_grad[(k, parts, blocks)](
            x, grad, index, sums, tokens, per_part,
            C=C, P=p, K=k, TAPS=triton.next_power_of_2(k), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    sums = sums.sum(0)
    return sums[:-1].t().reshape(C, 1, k, k).contiguous(), sums[-1]
