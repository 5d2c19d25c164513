"""LayerNorm, Linear, GELU, GRN, Linear, drop path and residual as one differentiable operation.

It saves its input `x`, the pre-activation `h` and GRN's norms for the backward, which recomputes LayerNorm and GELU;
with `recompute` (gradient checkpointing) it recomputes the first Linear too and does not save `h`. If an image has many
more tokens than channels, GRN's scale is folded into the second Linear's weight image by image, and its bias into that
Linear's bias (only with kernels that keep the activation). The CPU works on a few images at a time, so that each step
finds the previous step's output in the cache.

LayerNorm and everything between the two Linears are done by the kernels: `ops.torch_kernels` or `ops.triton`.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); the plain form is `ops.functional.token_mlp`.
"""

import math
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .functional import differentiable_gradients, norm_ratio, stats_dtype, token_mlp
from .gemm import linear, onednn_is_faster, scratch

# Tuned on two CPU cores: the part of `h` that stays in the cache, and the rows that a fast matrix product needs.
CHUNK_BYTES = 4 * 2**20
MIN_ROWS = 1024
FOLD_RATIO = 4  # tokens per channel from which scaling the weight is cheaper than scaling the tokens


class Weights(NamedTuple):
    """Parameters of the token MLP, in the order of the operations' arguments."""

    norm_weight: Tensor  # LayerNorm's, [C]
    norm_bias: Tensor
    w1: Tensor  # first Linear, [F, C]
    b1: Tensor
    grn_weight: Tensor  # [F]
    grn_bias: Tensor
    w2: Tensor  # second Linear, [C, F]
    b2: Tensor
    norm_eps: float
    grn_eps: float


class Needs(NamedTuple):
    """Which gradients are needed: of x; of LayerNorm and the first Linear; of GRN and the second Linear."""

    x: bool
    first: bool
    second: bool


_WEIGHTS_SCHEMA = (
    "Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor grn_weight, Tensor grn_bias, Tensor w2, "
    "Tensor b2, float norm_eps, float grn_eps"
)


def _chunk(B: int, T: int, hidden: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of images per chunk."""
    if device.type != "cpu":
        return B
    rows = max(CHUNK_BYTES // (hidden * dtype.itemsize), MIN_ROWS)
    return min(B, max(1, rows // T))


def _folds(kernels: ModuleType, T: int, C: int, dtype: torch.dtype) -> bool:
    """Whether GRN's scale is folded into the second Linear's weight."""
    return kernels.KEEPS_ACTIVATION and T >= FOLD_RATIO * C and dtype in (torch.float32, torch.float64)


def _first_linear(tokens: Tensor, b: Tensor, w: Tensor, out: Tensor | None = None, slot: str = "") -> Tensor:
    """The pre-activation of normalised tokens `[b, T, C]`, in `out` if given; `slot` as for `linear`."""
    shape = (*tokens.shape[:2], len(w))
    flat = None if out is None else out.view(-1, len(w))
    return linear(tokens.view(-1, w.shape[1]), w, b, flat, slot).view(shape)


def _out_dtype(shortcut: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(shortcut.dtype, dtype)


# Forward


def _forward(
    x: Tensor, shortcut: Tensor, keep: Tensor | None, p: Weights, dtype: torch.dtype, save: bool, recompute: bool,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(out [B, T, C], h [B, T, F], norms [B, 1, F])`; h and norms are empty without `save`, h with `recompute`."""
    B, T, C = x.shape
    hidden = len(p.w1)
    w1, b1, w2 = p.w1.to(dtype), p.b1.to(dtype), p.w2.to(dtype)
    fold = _folds(kernels, T, C, dtype)
    # passing GRN's bias through the second Linear costs one more read of its weight
    b2 = torch.addmv(p.b2, p.w2, p.grn_bias) if fold else p.b2
    out = torch.empty(B, T, len(w2), dtype=_out_dtype(shortcut, dtype), device=x.device)
    n, keep_h, norms = _chunk(B, T, hidden, dtype, x.device), save and not recompute, []
    h = x.new_empty(B, T, hidden, dtype=dtype) if keep_h and n < B else None
    here = x.new_empty(0)
    for i in range(0, B, n):
        images = slice(i, min(i + n, B))
        tokens = kernels.layer_norm(x[images], p.norm_weight, p.norm_bias, p.norm_eps, dtype)[0]
        here = _first_linear(tokens, b1, w1, out=None if h is None else h[images], slot="" if keep_h else "h")
        del tokens
        act = kernels.gelu(here)
        g = kernels.gelu_norms(here, act)
        norms.append(g)
        kept = None if keep is None else keep[images].view(-1, 1, 1)
        scale = _times(1 + p.grn_weight * norm_ratio(g, p.grn_eps), kept)
        if fold:
            total = torch.add(shortcut[images], _times(b2, kept), out=out[images])
            total.baddbmm_(act, (w2 * scale).transpose(1, 2))
        else:
            scaled = kernels.gelu_scale(here, act, scale, _times(p.grn_bias, kept))
            _second_linear(scaled, w2, b2, kept, shortcut[images], out=out[images])
    if not save:
        return out, x.new_empty(0), x.new_empty(0)
    h = (here if h is None else h) if keep_h else x.new_empty(0)
    return out, h, norms[0] if len(norms) == 1 else torch.cat(norms)


def _times(value: Tensor, kept: Tensor | None) -> Tensor:
    return value if kept is None else value * kept


def _second_linear(a: Tensor, w: Tensor, b: Tensor, kept: Tensor | None, shortcut: Tensor, out: Tensor) -> None:
    """`shortcut + kept * b + a @ w.T` into `out`, which may have a higher precision than `a`."""
    flat = a.view(-1, a.shape[-1])
    if onednn_is_faster(flat, w) and kept is None and out.dtype == a.dtype:  # as many passes as below
        torch.add(shortcut, linear(flat, w, b).view_as(out), out=out)
        return
    torch.add(shortcut, _times(b, kept), out=out)
    if out.dtype == a.dtype and not onednn_is_faster(flat, w):
        out.view(-1, len(w)).addmm_(flat, w.t())
    else:
        out += linear(flat, w).view_as(out)


def _run(x, shortcut, keep, *rest) -> tuple[Tensor, Tensor, Tensor]:
    dtype, save, recompute, kernels = rest[10:]
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, shortcut, keep, Weights(*rest[:10]), dtype, save, recompute, dispatch.kernels(kernels))


_token_mlp = torch.library.custom_op(
    "timm_convnextv2::token_mlp", _run, mutates_args=(),
    schema=f"(Tensor x, Tensor shortcut, Tensor? keep, {_WEIGHTS_SCHEMA}, ScalarType dtype, bool save, bool recompute, "
    "str kernels) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_token_mlp.register_fake
def _(x, shortcut, keep, *rest):
    p, (dtype, save, recompute, _) = Weights(*rest[:10]), rest[10:]
    B, T, _ = x.shape
    out = x.new_empty(B, T, len(p.w2), dtype=_out_dtype(shortcut, dtype))
    if not save:
        return out, x.new_empty(0), x.new_empty(0)
    h = x.new_empty(0) if recompute else x.new_empty(B, T, len(p.w1), dtype=dtype)
    return out, h, x.new_empty(B, 1, len(p.w1), dtype=torch.promote_types(dtype, torch.float32))


# Backward


class _Backward:
    """Gradients summed over chunks of images, and the values that all chunks share; `dtype` is the products' type."""

    def __init__(self, x: Tensor, p: Weights, dtype: torch.dtype, kernels: ModuleType, needs: Needs) -> None:
        B, T, C = x.shape
        self.p, self.dtype, self.kernels, self.needs = p, dtype, kernels, needs
        self.w1, self.w2 = p.w1.to(dtype), p.w2.to(dtype)
        self.chunk, self.fold = _chunk(B, T, len(p.w1), dtype, x.device), _folds(kernels, T, C, dtype)
        self.x = torch.empty_like(x)
        full = stats_dtype(p.w1)  # a sum over chunks must not be rounded at each
        self.first, self.second = torch.empty_like(p.w1, dtype=full), torch.empty_like(p.w2, dtype=full)
        zeros = partial(torch.zeros_like, dtype=full)
        self.norm, self.first_bias = [zeros(p.norm_weight), zeros(p.norm_bias)], zeros(p.b1)
        self.grn_weight, self.second_bias = zeros(p.grn_weight), zeros(p.b2)

    def add(self, images: slice, x: Tensor, h: Tensor | None, g: Tensor, dy: Tensor) -> None:
        """Adds the gradients of some images, given their `x`, pre-activation (None: recompute), norms and gradient."""
        p, started = self.p, images.start > 0
        normalised = None
        if h is None:
            normalised = self._normalise(x)
            h = _first_linear(normalised[0], p.b1.to(self.dtype), self.w1, slot="pre")
        self.second_bias += dy.view(-1, dy.shape[-1]).sum(dim=0, dtype=stats_dtype(dy))
        ratio = norm_ratio(g, p.grn_eps)
        scale, act = 1 + p.grn_weight * ratio, self.kernels.gelu(h)
        d_scale, da = (self._folded_second_linear if self.fold else self._second_linear)(dy, h, act, scale, started)
        self.grn_weight += (d_scale * ratio).sum(dim=(0, 1))
        if not (self.needs.x or self.needs.first):
            return
        pull = _grn_pull(d_scale * p.grn_weight, g, ratio, p.grn_eps)
        dh, d_bias = self.kernels.gelu_backward(h, act, da, None if self.fold else scale, pull)
        self.first_bias += d_bias
        self._first_linear(images, dh.view(-1, len(p.w1)), x, normalised or self._normalise(x))

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm in the matrix products' type, its mean and its reciprocal standard deviation."""
        return self.kernels.layer_norm(x, self.p.norm_weight, self.p.norm_bias, self.p.norm_eps, self.dtype)

    def _second_linear(
        self, dy: Tensor, h: Tensor, act: Tensor | None, scale: Tensor, started: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of GRN's scale, `[b, 1, F]`, and of its output, `[b, T, F]`."""
        hidden, flat = h.shape[-1], dy.view(-1, dy.shape[-1])
        da = linear(flat, self.w2.t(), slot="h").view(h.shape)
        d_scale, out = self.kernels.gelu_reductions(h, act, da, scale, self.p.grn_bias, self.needs.second)
        if out is not None:
            _accumulate(self.second, flat.t(), out.view(-1, hidden), started)
        return d_scale, da

    def _folded_second_linear(
        self, dy: Tensor, h: Tensor, act: Tensor, scale: Tensor, started: bool
    ) -> tuple[Tensor, Tensor]:
        """The same with the scale folded into the weight; the gradient of GRN's output includes the scale."""
        pairs = torch.bmm(dy.transpose(1, 2), act)  # [b, C, F]
        d_scale = torch.linalg.vecdot(pairs, self.w2, dim=1).unsqueeze(1)
        if self.needs.second:
            total = dy.view(-1, dy.shape[-1]).sum(dim=0)
            part = pairs.mul_(scale).sum(dim=0).addr_(total, self.p.grn_bias)
            self.second = self.second.add_(part) if started else part
        da = torch.bmm(dy, self.w2 * scale, out=scratch("h", h.shape, self.dtype, dy.device))
        return d_scale, da

    def _first_linear(self, images: slice, dh: Tensor, x: Tensor, normalised: tuple[Tensor, Tensor, Tensor]) -> None:
        """First Linear and LayerNorm, from the gradient `dh` `[b * T, F]` of the pre-activation."""
        tokens, mean, rstd = normalised
        C, needs = x.shape[-1], self.needs
        if needs.first:
            _accumulate(self.first, dh.t(), tokens.view(-1, C), images.start > 0)
        d_tokens = linear(dh, self.w1.t()).view_as(x)
        dx, *found = self.kernels.layer_norm_backward(d_tokens, x, mean, rstd, self.p.norm_weight, needs.x, needs.first)
        if needs.x and len(x) < len(self.x):
            self.x[images] = dx
        elif needs.x:
            self.x = dx
        if needs.first:
            for total, more in zip(self.norm, found, strict=True):
                total += more

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of x and of the eight parameters."""
        grn_bias = self.p.w2.t().to(self.second_bias.dtype) @ self.second_bias
        found = (*self.norm, self.first, self.first_bias, self.grn_weight, grn_bias, self.second, self.second_bias)
        return self.x, *(total.to(weight.dtype) for total, weight in zip(found, self.p[:8], strict=True))


def _grn_pull(d_ratio: Tensor, g: Tensor, ratio: Tensor, eps: float) -> Tensor:
    """What the norms `g` add to the gradient per unit of activation: their own gradient divided by them."""
    d_g = (d_ratio - (d_ratio * ratio).mean(dim=-1, keepdim=True)) / (g.mean(dim=-1, keepdim=True) + eps)
    return torch.where(g > 1e-15, d_g / g, 0.0)  # a channel of zeros gets no gradient: sqrt has none at 0


def _accumulate(total: Tensor, a: Tensor, b: Tensor, started: bool) -> None:
    """`total += a @ b`, or `total = a @ b` if not `started`; `total` may have the higher precision."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(started), out=total)
    elif started:
        total += a @ b
    else:
        total.copy_(a @ b)


@torch.library.custom_op(
    "timm_convnextv2::token_mlp_backward", mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor h, Tensor norms, Tensor? keep, {_WEIGHTS_SCHEMA}, ScalarType dtype, "
    "str kernels, bool need_x, bool need_first, bool need_second) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _token_mlp_backward(grad, x, h, norms, keep, *rest):
    """Gradients of x and of the eight parameters; outputs whose `need_*` flag is False are placeholders."""
    dtype, kernels, *needs = rest[10:]
    with torch.autocast(x.device.type, enabled=False):
        run = _Backward(x, Weights(*rest[:10]), dtype, dispatch.kernels(kernels), Needs(*needs))
        for i in range(0, len(x), run.chunk):
            images = slice(i, min(i + run.chunk, len(x)))
            dy = _times(grad[images], None if keep is None else keep[images].view(-1, 1, 1)).to(dtype)
            run.add(images, x[images], h[images] if h.numel() else None, norms[images], dy)
        return run.gradients()


@_token_mlp_backward.register_fake
def _(grad, x, h, norms, keep, *rest):
    p = Weights(*rest[:10])
    return *(torch.empty_like(t) for t in (x, *p[:7])), p.w2.new_empty(len(p.w2))


# `torch.utils.flop_counter` counts nothing for an operation without a formula: count the plain form's products.


@register_flop_formula(torch.ops.timm_convnextv2.token_mlp)
def _forward_flops(x, shortcut, keep, *rest, **kwargs) -> int:
    p = Weights(*rest[:10])
    return 2 * x[0] * x[1] * (math.prod(p.w1) + math.prod(p.w2))


@register_flop_formula(torch.ops.timm_convnextv2.token_mlp_backward)
def _backward_flops(grad, x, h, norms, keep, *rest, **kwargs) -> int:
    p, needs, recompute = Weights(*rest[:10]), Needs(*rest[12:]), math.prod(h) == 0
    first = (needs.x + needs.first + recompute) * math.prod(p.w1)
    return 2 * x[0] * x[1] * (first + ((needs.x or needs.first) + needs.second) * math.prod(p.w2))


def _setup_context(ctx, inputs, output) -> None:
    x, shortcut, keep, *parameters = inputs[:11]
    _, h, norms = output
    ctx.mark_non_differentiable(h, norms)
    ctx.set_materialize_grads(False)  # else autograd would materialise zeros of the size of `h`
    ctx.save_for_backward(x, h, norms, keep, *parameters)
    ctx.norm_eps, ctx.grn_eps, ctx.dtype, _, _, ctx.kernels = inputs[11:]
    ctx.shortcut_dtype = shortcut.dtype


def _backward(ctx, grad, _grad_h, _grad_norms):
    if grad is None:
        return (None,) * 17
    x, h, norms, keep, *parameters = ctx.saved_tensors
    p = Weights(*parameters, norm_eps=ctx.norm_eps, grn_eps=ctx.grn_eps)
    grad = grad.contiguous()  # also for the shortcut: upstream layers then get channels-last memory
    needs = ctx.needs_input_grad
    wanted = (needs[0], *needs[3:11])
    if torch.is_grad_enabled():  # double backward: differentiate the plain form
        grads = differentiable_gradients(partial(_plain, keep, ctx.norm_eps, ctx.grn_eps), (x, *p[:8]), wanted, grad)
    else:
        groups = (needs[0], any(needs[3:7]), any(needs[7:11]))
        found = _token_mlp_backward(grad, x, h, norms, keep, *p, ctx.dtype, ctx.kernels, *groups)
        grads = [value if need else None for value, need in zip(found, wanted, strict=True)]
    shortcut = grad.to(ctx.shortcut_dtype) if needs[1] else None
    return grads[0], shortcut, None, *grads[1:], None, None, None, None, None, None


_token_mlp.register_autograd(_backward, setup_context=_setup_context)


def _plain(keep: Tensor | None, norm_eps: float, grn_eps: float, x: Tensor, *parameters: Tensor) -> Tensor:
    out = token_mlp(x, *parameters, norm_eps=norm_eps, grn_eps=grn_eps)
    return out if keep is None else out * keep.view(-1, 1, 1).to(out.dtype)


def fused_token_mlp(
    x: Tensor, shortcut: Tensor, keep: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor,
    grn_weight: Tensor, grn_bias: Tensor, w2: Tensor, b2: Tensor, norm_eps: float = 1e-6, grn_eps: float = 1e-6,
    recompute: bool = False,
) -> Tensor:  # fmt: skip
    """`shortcut + keep * (Linear2(GRN(GELU(Linear1(LayerNorm(x))))))`, with float32 statistics.

    Under autocast the Linears, GELU and GRN's scale run in its type, the LayerNorm's and GRN's statistics in float32.

    Args:
        x: Tokens `[B, T, C]`; GRN's statistics are those of each image, `[T, 4C]`.
        shortcut: Added to the result, `[B, T, C]`.
        keep: Drop path's factor per image, `[B]`, or None; not differentiated.
        norm_weight: `[C]`, as `norm_bias`, of LayerNorm.
        w1: First Linear, `[4C, C]`, with `b1` `[4C]`.
        grn_weight: `[4C]`, as `grn_bias`.
        w2: Second Linear, `[C, 4C]`, with `b2` `[C]`.
        recompute: Recompute the pre-activation in the backward instead of saving it: a sixth more matrix products for
            two thirds less saved memory.

    Returns:
        `[B, T, C]`, in the type that the residual sum has in plain PyTorch.
    """
    dtype = dispatch.autocast_dtype(x) or x.dtype
    p = Weights(norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, norm_eps, grn_eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, shortcut, *p[:8]))
    # A custom operation costs 0.2 ms per call on CPU, which matters for small models at inference.
    direct = not (save or torch.compiler.is_compiling() or dispatch.dispatch_mode_active()) and type(x) is Tensor
    run = _run if direct else _token_mlp
    return run(x.contiguous(), shortcut, keep, *p, dtype, save, recompute, dispatch.kernels_name(x.device))[0]
