# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton kernels of the token MLP's middle (GELU and GRN), and their launchers.

They compute GELU anew where they need it, in registers, so that the activation is never in memory by itself.

Source: GELU, https://arxiv.org/abs/1606.08415 (exact form); GRN, ConvNeXt V2 (https://arxiv.org/abs/2301.00808).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NUM_WARPS, channel_block, check, same

KEEPS_ACTIVATION = False  # see `ops.torch_kernels`

# 2048 elements a tile are 16 a thread, two 16-byte loads of a half type; twice that takes 224 registers.
GELU_TILE = 2048
GELU_CHANNELS = (128, 64, 32)
# Tokens a program walks over: partial sums in float32 then add about 1 % to what is moved.
GELU_TOKENS = 256

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu_place(T, F, parts, TOKENS: tl.constexpr, BLOCK_F: tl.constexpr):
    """The work of a program: its image, number of tokens, where they begin in `[B, T, F]`, row of the partial sums
    and channels.

    Channel blocks come first, so that programs that run together read whole rows.
    """
    blocks = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    f = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    slot = pid // blocks
    b = (slot // parts).to(tl.int64)
    first = slot % parts * TOKENS
    return b, tl.minimum(TOKENS, T - first), (b * T + first) * F, slot.to(tl.int64), f


@triton.jit
def _gelu_tile(h, start, count, f, F, BLOCK_T: tl.constexpr):
    """Places, mask and float32 values of `BLOCK_T` tokens of a program from its token `start` on."""
    t = start + tl.arange(0, BLOCK_T)
    inside = (t < count)[:, None] & (f < F)[None, :]
    place = t[:, None] * F + f[None, :]
    return place, inside, tl.load(h + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * _SQRT_HALF)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_square_sum(h, sums, T, F, parts, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    h += first
    total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        _, _, x = _gelu_tile(h, start, count, f, F, BLOCK_T)
        a = x * _normal_cdf(x)
        total += a * a
    tl.store(sums + slot * F + f, tl.sum(total, 0), mask=f < F)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_scale(
    h, scale, bias, bias_step, out, T, F, parts,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    s = tl.load(scale + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + b * bias_step + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h += first
    out += first
    for start in range(0, count, BLOCK_T):
        place, inside, x = _gelu_tile(h, start, count, f, F, BLOCK_T)
        y = x * _normal_cdf(x) * s + beta
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_reductions(
    h, grad, scale, bias, out, d_scale, T, F, parts,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    s = tl.load(scale + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h += first
    grad += first
    out += first
    total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        place, inside, x = _gelu_tile(h, start, count, f, F, BLOCK_T)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        a = x * _normal_cdf(x)
        total += dy * a
        if OUT:
            tl.store(out + place, (a * s + beta).to(out.dtype.element_ty), mask=inside)
    tl.store(d_scale + slot * F + f, tl.sum(total, 0), mask=f < F)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_backward(
    h, grad, scale, pull, dh, db, T, F, parts,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    s = tl.load(scale + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    p = tl.load(pull + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h += first
    grad += first
    dh += first
    total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        place, inside, x = _gelu_tile(h, start, count, f, F, BLOCK_T)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        cdf = _normal_cdf(x)
        slope = cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        dx = slope * (dy * s + p * (x * cdf))
        total += dx  # x and dy are zero outside, so is their product
        tl.store(dh + place, dx.to(dh.dtype.element_ty), mask=inside)
    tl.store(db + slot * F + f, tl.sum(total, 0), mask=f < F)


def _gelu_launch(h: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """Parts an image is cut into, the grid, and the constants of a launch."""
    B, T, F = h.shape
    block_f = channel_block(F, GELU_CHANNELS)
    parts = triton.cdiv(T, GELU_TOKENS)
    blocks = {
        "TOKENS": GELU_TOKENS,
        "BLOCK_T": min(GELU_TILE // block_f, triton.next_power_of_2(T)),
        "BLOCK_F": block_f,
        "num_warps": NUM_WARPS,
    }
    return parts, (B * parts * triton.cdiv(F, block_f),), blocks


def gelu(h: Tensor) -> None:
    """No activation: the other functions compute it anew from `h`, and take None for it."""


def gelu_square_sum(h: Tensor) -> Tensor:
    """`sum_t gelu(h)^2` of `[B, T, F]` in one read, float32 `[B, F]`; nothing of the size of `h` is written."""
    check(h=h)
    B, T, F = h.shape
    if not h.numel():
        return h.new_zeros(B, F, dtype=torch.float32)
    parts, grid, blocks = _gelu_launch(h)
    sums = h.new_empty(B, parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_square_sum[grid](h, sums, T, F, parts, **blocks)
    return sums.sum(1)


def gelu_norms(h: Tensor, act: None) -> Tensor:
    """L2 norms of `gelu(h)` over the tokens of `[B, T, F]`, float32 `[B, 1, F]`."""
    return gelu_square_sum(h).unsqueeze(1).clamp_(min=1e-30).sqrt_()


def gelu_scale(h: Tensor, act: None, scale: Tensor, bias: Tensor) -> Tensor:
    """`gelu(h) * scale + bias` in one read and one write."""
    check(h=h, scale=scale, bias=bias)
    B, T, F = h.shape
    same("scale", scale.shape, (B, 1, F))
    same("bias", bias.shape, (B, 1, F) if bias.ndim == 3 else (F,))
    out = torch.empty_like(h)
    if h.numel():
        parts, grid, blocks = _gelu_launch(h)
        with torch.cuda.device_of(h):
            _gelu_scale[grid](h, scale, bias, F if bias.ndim == 3 else 0, out, T, F, parts, **blocks)
    return out


def gelu_reductions(
    h: Tensor, act: None, grad: Tensor, scale: Tensor, bias: Tensor, need_out: bool
) -> tuple[Tensor, Tensor | None]:
    """What the backward of `gelu_scale` sums, and its output again, in one read of `h` and `grad` and one write."""
    check(h=h, grad=grad, scale=scale, bias=bias)
    B, T, F = h.shape
    same("grad", grad.shape, h.shape)
    same("scale", scale.shape, (B, 1, F))
    same("bias", bias.shape, (F,))
    out = torch.empty_like(h) if need_out else None
    if not h.numel():
        return h.new_zeros(B, 1, F, dtype=torch.float32), out
    parts, grid, blocks = _gelu_launch(h)
    d_scale = h.new_empty(B, parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_reductions[grid](
            h, grad, scale, bias, h if out is None else out, d_scale, T, F, parts, OUT=need_out, **blocks
        )
    return d_scale.sum(1, keepdim=True), out


def gelu_backward(h: Tensor, act: None, grad: Tensor, scale: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu'(h) * (grad * scale + pull * gelu(h))`: the gradient of `h` through the scaling and through the norms."""
    check(h=h, grad=grad, scale=scale, pull=pull)
    B, T, F = h.shape
    same("grad", grad.shape, h.shape)
    same("scale", scale.shape, (B, 1, F))
    same("pull", pull.shape, (B, 1, F))
    dh = grad if grad.dtype == h.dtype else torch.empty_like(h)
    if not h.numel():
        return dh, h.new_zeros(F, dtype=torch.float32)
    parts, grid, blocks = _gelu_launch(h)
    db = h.new_empty(B * parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_backward[grid](h, grad, scale, pull, dh, db, T, F, parts, **blocks)
    return dh, db.sum(0)
