"""Triton kernels of the token MLP's middle (GELU and GRN) and of the packed depthwise convolution.

Plain functions from tensors to tensors, without autograd. Inputs are contiguous and float32, bfloat16 or float16; all
arithmetic in registers is float32 and a result is rounded once. Every reduction is deterministic: programs write
partial sums, which torch adds up; no atomics.

The block sizes below follow from bytes and from the registers that the compiler takes for sm_90. No figure was taken on
a GPU yet.

Source: GELU, https://arxiv.org/abs/1606.08415 (exact form); GRN, ConvNeXt V2 (https://arxiv.org/abs/2301.00808).
"""

import torch
import triton
import triton.language as tl

__all__ = [
    "depthwise_forward",
    "depthwise_input_grad",
    "depthwise_weight_grad",
    "gelu_backward",
    "gelu_reductions",
    "gelu_scale",
    "gelu_square_sum",
]

NUM_WARPS = 4

# Token MLP. 2048 elements a tile are 16 a thread, two 16-byte loads of a half type; twice that takes 224 registers.
GELU_TILE = 2048
GELU_CHANNELS = (128, 64, 32)
# Tokens a program walks over: partial sums in float32 then add about 1 % to what is moved.
GELU_TOKENS = 256

# Depthwise convolution: neighbouring tokens share most of the rows they gather, through the L1 cache. Two tokens a
# thread share the loads of the weight, and a row of seven taps unrolled takes 130 registers.
CONV_TILE = 2048
CONV_CHANNELS = (64, 32)
# Its weight gradient holds a row of taps times this tile in accumulators: 32 registers a thread for 8 taps.
CONV_GRAD_TILE = 512
CONV_GRAD_CHANNELS = (32,)
CONV_GRAD_PROGRAMS = 1024  # about as many as a large GPU runs at a time; bounds the partial sums to a few MB

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


def _check(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError for what a kernel would read wrongly."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    for name, tensor in given.items():
        dtypes = (torch.int64,) if name == "index" else _DTYPES
        if tensor.dtype not in dtypes or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {' or '.join(map(str, dtypes))} tensor on {device}, got {tensor.dtype} "
                f"on {tensor.device} with strides {tensor.stride()}."
            )


def _same(name: str, got: tuple, expected: tuple) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(got)}.")


def _channel_block(channels: int, sizes: tuple[int, ...]) -> int:
    """The size that leaves the fewest lanes idle, the larger one of equals."""
    return min(sizes, key=lambda size: triton.cdiv(channels, size) * size)


# ---------------------------------------------------------------------------------------------------------------------
# Token MLP
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gelu_place(T, F, parts, TOKENS: tl.constexpr, BLOCK_F: tl.constexpr):
    """What a program works on: its image, number of tokens, where they begin in `[B, T, F]`, row of the partial sums
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
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * _SQRT_HALF)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_square_sum(h, sums, T, F, parts, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    h += first
    total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < count)[:, None] & (f < F)[None, :]
        x = tl.load(h + t[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
        a = x * _normal_cdf(x)
        total += a * a
    tl.store(sums + slot * F + f, tl.sum(total, 0), mask=f < F)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_scale(h, scale, bias, out, T, F, parts, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    s = tl.load(scale + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h += first
    out += first
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < count)[:, None] & (f < F)[None, :]
        place = t[:, None] * F + f[None, :]
        x = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        y = x * _normal_cdf(x) * s + beta
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "parts"])
def _gelu_reductions(
    h, grad, scale, bias, out, d_scale, d_bias, T, F, parts,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    b, count, first, slot, f = _gelu_place(T, F, parts, TOKENS, BLOCK_F)
    s = tl.load(scale + b * F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h += first
    grad += first
    out += first
    scale_total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    bias_total = tl.full([BLOCK_T, BLOCK_F], 0.0, tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < count)[:, None] & (f < F)[None, :]
        place = t[:, None] * F + f[None, :]
        x = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        a = x * _normal_cdf(x)
        scale_total += dy * a
        bias_total += dy
        if OUT:
            tl.store(out + place, (a * s + beta).to(out.dtype.element_ty), mask=inside)
    tl.store(d_scale + slot * F + f, tl.sum(scale_total, 0), mask=f < F)
    tl.store(d_bias + slot * F + f, tl.sum(bias_total, 0), mask=f < F)


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
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < count)[:, None] & (f < F)[None, :]
        place = t[:, None] * F + f[None, :]
        x = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        cdf = _normal_cdf(x)
        slope = cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        dx = slope * (dy * s + p * (x * cdf))
        total += dx  # zero outside: there x and dy are
        tl.store(dh + place, dx.to(dh.dtype.element_ty), mask=inside)
    tl.store(db + slot * F + f, tl.sum(total, 0), mask=f < F)


def _gelu_launch(h: torch.Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """Parts an image is cut into, the grid, and the constants of a launch."""
    B, T, F = h.shape
    block_f = _channel_block(F, GELU_CHANNELS)
    parts = triton.cdiv(T, GELU_TOKENS)
    blocks = {
        "TOKENS": GELU_TOKENS,
        "BLOCK_T": min(GELU_TILE // block_f, triton.next_power_of_2(T)),
        "BLOCK_F": block_f,
        "num_warps": NUM_WARPS,
    }
    return parts, (B * parts * triton.cdiv(F, block_f),), blocks


def gelu_square_sum(h: torch.Tensor) -> torch.Tensor:
    """`sum_t gelu(h)^2` in one read; nothing of the size of `h` is written.

    Args:
        h: `[B, T, F]`.

    Returns:
        Float32 `[B, F]`.
    """
    _check(h=h)
    B, T, F = h.shape
    if not h.numel():
        return h.new_zeros(B, F, dtype=torch.float32)
    parts, grid, blocks = _gelu_launch(h)
    sums = h.new_empty(B, parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_square_sum[grid](h, sums, T, F, parts, **blocks)
    return sums.sum(1)


def gelu_scale(h: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`gelu(h) * scale + bias` in one read and one write.

    Args:
        h: `[B, T, F]`.
        scale: `[B, F]`.
        bias: `[F]`.

    Returns:
        `[B, T, F]` in the dtype of `h`.
    """
    _check(h=h, scale=scale, bias=bias)
    B, T, F = h.shape
    _same("scale", scale.shape, (B, F))
    _same("bias", bias.shape, (F,))
    out = torch.empty_like(h)
    if h.numel():
        parts, grid, blocks = _gelu_launch(h)
        with torch.cuda.device_of(h):
            _gelu_scale[grid](h, scale, bias, out, T, F, parts, **blocks)
    return out


def gelu_reductions(
    h: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, out: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the backward of `gelu_scale` sums, and its output again, in one read of `h` and `grad` and one write.

    Args:
        h: `[B, T, F]`.
        grad: Gradient of the output, like `h`.
        scale: `[B, F]`.
        bias: `[F]`.
        out: Whether the output is wanted too.

    Returns:
        `sum_t grad * gelu(h)`, float32 `[B, F]`; `sum_{b,t} grad`, float32 `[F]`; `gelu(h) * scale + bias` in the
        dtype of `h`, or None.
    """
    _check(h=h, grad=grad, scale=scale, bias=bias)
    B, T, F = h.shape
    _same("grad", grad.shape, h.shape)
    _same("scale", scale.shape, (B, F))
    _same("bias", bias.shape, (F,))
    activation = torch.empty_like(h) if out else None
    if not h.numel():
        return h.new_zeros(B, F, dtype=torch.float32), h.new_zeros(F, dtype=torch.float32), activation
    parts, grid, blocks = _gelu_launch(h)
    d_scale, d_bias = h.new_empty(2, B, parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_reductions[grid](
            h, grad, scale, bias, activation if out else h, d_scale, d_bias, T, F, parts, OUT=out, **blocks
        )
    return d_scale.sum(1), d_bias.sum((0, 1)), activation


def gelu_backward(
    h: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, pull: torch.Tensor, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu'(h) * (grad * scale + pull * gelu(h))`: the gradient of `h` through the scaling and through the norms.

    Args:
        h: `[B, T, F]`.
        grad: Gradient of `gelu_scale`'s output, like `h`.
        scale: `[B, F]`.
        pull: `[B, F]`, what the norms add: their gradient over the norm.
        inplace: Write the result into the memory of `grad`.

    Returns:
        The gradient of `h`, `[B, T, F]` in its dtype; its sum over images and tokens before rounding, float32 `[F]`.
    """
    _check(h=h, grad=grad, scale=scale, pull=pull)
    B, T, F = h.shape
    _same("grad", grad.shape, h.shape)
    _same("scale", scale.shape, (B, F))
    _same("pull", pull.shape, (B, F))
    if inplace and grad.dtype != h.dtype:
        raise ValueError(f"inplace needs grad in the dtype of h, {h.dtype}, got {grad.dtype}.")
    dh = grad if inplace else torch.empty_like(h)
    if not h.numel():
        return dh, h.new_zeros(F, dtype=torch.float32)
    parts, grid, blocks = _gelu_launch(h)
    db = h.new_empty(B * parts, F, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _gelu_backward[grid](h, grad, scale, pull, dh, db, T, F, parts, **blocks)
    return dh, db.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Packed depthwise convolution
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _window_corner(t, P: tl.constexpr, K: tl.constexpr):
    """Where in the index the window of flat token `t` begins: the first tap of its first row, int64."""
    side: tl.constexpr = P + K - 1
    return (t // (P * P)).to(tl.int64) * (side * side) + t % (P * P) // P * side + t % P


@triton.jit(do_not_specialize=["M"])
def _depthwise(
    x, weight, bias, index, out, M, C,
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
    x, grad, index, sums, M, C, tokens,
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


def _check_packed(name: str, x: torch.Tensor, index: torch.Tensor, k: int) -> None:
    N, p = x.shape[:2]
    _same(name, x.shape, (N, p, p, x.shape[-1]))
    _same("index", index.shape, (N, p + k - 1, p + k - 1))
    if k % 2 == 0:
        raise ValueError(f"The kernel size must be odd, got {k}.")


def _depthwise_launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, turned: bool
) -> torch.Tensor:
    p, C, k = x.shape[1], x.shape[-1], weight.shape[-1]
    _same("weight", weight.shape, (C, 1, k, k))
    out = torch.empty_like(x)
    if not x.numel():
        return out
    tokens = x.numel() // C
    block_c = _channel_block(C, CONV_CHANNELS)
    block_t = CONV_TILE // block_c
    taps = weight.view(C, k * k).t().contiguous()  # tiny; the channels of a tap side by side
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(C, block_c))
    with torch.cuda.device_of(x):
        _depthwise[grid](
            x, taps, bias, index, out, tokens, C,
            P=p, K=k, TURNED=turned, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def depthwise_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Submanifold depthwise convolution of packed patches, without a window or a dense map in memory.

    Args:
        x: Packed patches `[N, p, p, C]`.
        weight: Kernel `[C, 1, k, k]`, k odd.
        bias: `[C]` or None.
        index: For each patch its tokens with a border of `k // 2`, int64 `[N, p + k - 1, p + k - 1]` into the
            `N * p * p` tokens, `N * p * p` where there is none.

    Returns:
        `[N, p, p, C]` in the dtype of `x`.
    """
    _check(x=x, weight=weight, bias=bias, index=index)
    _check_packed("x", x, index, weight.shape[-1])
    if bias is not None:
        _same("bias", bias.shape, (x.shape[-1],))
    return _depthwise_launch(x, weight, bias, index, turned=False)


def depthwise_input_grad(grad: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gradient of `depthwise_forward` for `x`. Neighbourhood is mutual: the same kernel, turned round.

    Args:
        grad: Gradient of the output, `[N, p, p, C]`.
        weight: `[C, 1, k, k]`.
        index: As forward.

    Returns:
        `[N, p, p, C]` in the dtype of `grad`.
    """
    _check(grad=grad, weight=weight, index=index)
    _check_packed("grad", grad, index, weight.shape[-1])
    return _depthwise_launch(grad, weight, None, index, turned=True)


def depthwise_weight_grad(
    x: torch.Tensor, grad: torch.Tensor, index: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `depthwise_forward` for the weight and the bias (which costs next to nothing beside the weight's).

    Args:
        x: Packed patches `[N, p, p, C]`.
        grad: Gradient of the output, likewise.
        index: As forward.
        k: Size of the kernel.

    Returns:
        Float32 `[C, 1, k, k]` and `[C]`.
    """
    _check(x=x, grad=grad, index=index)
    _check_packed("x", x, index, k)
    _same("grad", grad.shape, x.shape)
    p, C = x.shape[1], x.shape[-1]
    if not x.numel():
        return x.new_zeros(C, 1, k, k, dtype=torch.float32), x.new_zeros(C, dtype=torch.float32)
    tokens = x.numel() // C
    block_c = _channel_block(C, CONV_GRAD_CHANNELS)
    block_t = CONV_GRAD_TILE // block_c
    blocks = triton.cdiv(C, block_c)
    parts = min(triton.cdiv(tokens, 4 * block_t), triton.cdiv(CONV_GRAD_PROGRAMS, blocks * k))
    per_part = triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t
    parts = triton.cdiv(tokens, per_part)  # none is empty
    sums = x.new_empty(parts, k * k + 1, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _depthwise_weight_grad[(k, parts, blocks)](
            x, grad, index, sums, tokens, C, per_part,
            P=p, K=k, TAPS=triton.next_power_of_2(k), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    sums = sums.sum(0)
    return sums[:-1].t().reshape(C, 1, k, k).contiguous(), sums[-1]
