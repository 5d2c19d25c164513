"""LayerNorm, Linear, GELU, GRN, Linear, drop path and residual as one differentiable operation.

Between forward and backward it keeps its input `x`, the pre-activation `h` and GRN's norms; LayerNorm and GELU are
recomputed, and with `recompute` (gradient checkpointing) the first Linear too, in place of keeping `h`. Where the
tokens of an image outnumber the channels enough, GRN's scale goes into the second Linear's weight, an image at a time,
and its bias into that Linear's. The CPU works on a few images at a time, so that what one step writes the next one
finds in the cache.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); the plain form is `ops.functional.token_mlp`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import autocast_dtype, backend
from .functional import norm_ratio, spatial_norm, stats_dtype, token_mlp
from .scratch import scratch

__all__ = ["fused_token_mlp"]

# Tuned on two CPU cores: of `h`, what stays in the cache, and the rows that a matrix product needs to be fast.
CHUNK_BYTES = 4 * 2**20
MIN_ROWS = 1024
FOLD_RATIO = 4  # tokens per channel from which scaling the weight is cheaper than scaling the tokens

aten = torch.ops.aten


def _chunk(B: int, T: int, hidden: int, dtype: torch.dtype, device: torch.device) -> int:
    """Images at a time. Half precision takes all at once: its sums over chunks would be rounded at each."""
    if device.type != "cpu" or dtype in (torch.float16, torch.bfloat16):
        return B
    rows = max(CHUNK_BYTES // (hidden * dtype.itemsize), MIN_ROWS)
    return min(B, max(1, rows // T))


def _folds(T: int, C: int, dtype: torch.dtype) -> bool:
    return T >= FOLD_RATIO * C and dtype in (torch.float32, torch.float64)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, its mean and its reciprocal standard deviation, in float32 or float64."""
    full = stats_dtype(x)
    return torch.native_layer_norm(x.to(full), x.shape[-1:], weight.to(full), bias.to(full), eps)


def _out_dtype(shortcut: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(shortcut.dtype, dtype)


def _forward(
    x: Tensor, shortcut: Tensor, keep: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor,
    grn_weight: Tensor, grn_bias: Tensor, w2: Tensor, b2: Tensor, norm_eps: float, grn_eps: float, dtype: torch.dtype,
    save: bool, recompute: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(out [B, T, C], h [B, T, 4C], norms [B, 1, 4C])`; h and norms are empty without `save`, h with `recompute`."""
    B, T, C = x.shape
    hidden = len(w1)
    with torch.autocast(x.device.type, enabled=False):
        w, b, second = w1.to(dtype), b1.to(dtype), w2.to(dtype)
        fold = _folds(T, C, dtype) and not triton
        # GRN's bias in the second Linear's takes one more reading of its weight, or no pass of its own beside the scale
        bias = torch.addmv(b2, w2, grn_bias) if fold or triton else b2
        out = torch.empty(B, T, len(w2), dtype=_out_dtype(shortcut, dtype), device=x.device)
        n = _chunk(B, T, hidden, dtype, x.device)
        shape = (n, T, hidden)
        keep_h = save and not recompute
        h = x.new_empty(B, T, hidden, dtype=dtype) if keep_h else scratch("h", shape, dtype, x.device)
        a = None if triton else scratch("act", shape, dtype, x.device)
        squares = None if triton else scratch("product", shape, dtype, x.device)
        norms = []
        for i in range(0, B, n):
            j = min(i + n, B)
            here = h[i:j] if keep_h else h[: j - i]
            tokens = _normalise(x[i:j], norm_weight, norm_bias, norm_eps)[0].to(dtype).view(-1, C)
            torch.addmm(b, tokens, w.t(), out=here.view(-1, hidden))
            kept = None if keep is None else keep[i:j].view(-1, 1, 1)
            if triton:
                from . import triton_kernels

                g = triton_kernels.gelu_square_sum(here).unsqueeze(1).clamp_(min=1e-30).sqrt_()
            else:
                act = aten.gelu.out(here, out=a[: j - i])
                g = _token_norm(act, squares[: j - i])
            norms.append(g)
            scale = 1 + grn_weight * norm_ratio(g, grn_eps)
            scale = scale if kept is None else scale * kept
            constant = bias if kept is None else bias * kept
            to = torch.add(shortcut[i:j], constant, out=out[i:j])
            if triton:
                none = torch.zeros_like(grn_bias)
                act = triton_kernels.gelu_scale(here, scale.squeeze(1), none)
            elif fold:
                to.baddbmm_(act, (second * scale).transpose(1, 2))
                continue
            else:
                shift = grn_bias if kept is None else grn_bias * kept
                torch.addcmul(shift.to(dtype), act, scale.to(dtype), out=act)
            if to.dtype == dtype:
                to.view(-1, len(w2)).addmm_(act.view(-1, hidden), second.t())
            else:
                to.add_(F.linear(act, second))
        if not save:
            return out, x.new_empty(0), x.new_empty(0)
        return out, h if keep_h else x.new_empty(0), norms[0] if len(norms) == 1 else torch.cat(norms)


_token_mlp = torch.library.custom_op("timm_convnextv2::token_mlp", _forward, mutates_args=())


@_token_mlp.register_fake
def _(x, shortcut, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, norm_eps, grn_eps, dtype, save,
      recompute, triton):  # fmt: skip
    B, T, _ = x.shape
    out = x.new_empty(B, T, len(w2), dtype=_out_dtype(shortcut, dtype))
    if not save:
        return out, x.new_empty(0), x.new_empty(0)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    h = x.new_empty(0) if recompute else x.new_empty(B, T, len(w1), dtype=dtype)
    return out, h, x.new_empty(B, 1, len(w1), dtype=full)


@torch.library.custom_op("timm_convnextv2::token_mlp_backward", mutates_args=())
def _token_mlp_backward(
    grad: Tensor, x: Tensor, h: Tensor, norms: Tensor, keep: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    w1: Tensor, b1: Tensor, grn_weight: Tensor, grn_bias: Tensor, w2: Tensor, norm_eps: float, grn_eps: float,
    dtype: torch.dtype, triton: bool, need_x: bool, need_first: bool, need_second: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, LayerNorm, first Linear, GRN, second Linear; those that nobody needs are of no use."""
    B, T, C = x.shape
    hidden, out_chans = len(w1), len(w2)
    recompute = h.numel() == 0
    with torch.autocast(x.device.type, enabled=False):
        w, second = w1.to(dtype), w2.to(dtype)
        full = dtype in (torch.float32, torch.float64)
        fold = _folds(T, C, dtype) and not triton
        n = _chunk(B, T, hidden, dtype, x.device)
        dx = torch.empty_like(x)
        d_norm = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        d_first, d_second = torch.empty_like(w1), torch.empty_like(w2)
        d_first_bias, d_grn = torch.zeros_like(b1), torch.zeros_like(grn_weight)
        d_sum = torch.zeros(out_chans, dtype=w2.dtype, device=x.device)
        shape = (n, T, hidden)
        da_buffer = scratch("h", shape, dtype, x.device)
        act_buffer = None if triton else scratch("act", shape, dtype, x.device)
        product = None if triton or fold else scratch("product", shape, dtype, x.device)
        for i in range(0, B, n):
            j = min(i + n, B)
            part, g = x[i:j].to(stats_dtype(x)), norms[i:j]
            if recompute:
                tokens, mean, rstd = _normalise(part, norm_weight, norm_bias, norm_eps)
                here = scratch("pre", shape, dtype, x.device)[: j - i]
                torch.addmm(b1.to(dtype), tokens.to(dtype).view(-1, C), w.t(), out=here.view(-1, hidden))
            else:
                here = h[i:j]
            dy = grad[i:j]
            dy = (dy if keep is None else dy * keep[i:j].view(-1, 1, 1)).to(dtype)
            flat = dy.view(-1, out_chans)
            ratio, total = norm_ratio(g, grn_eps), g.mean(dim=-1, keepdim=True) + grn_eps
            scale = 1 + grn_weight * ratio
            d_sum += flat.sum(dim=0, dtype=stats_dtype(dy)).to(d_sum.dtype)

            da = da_buffer[: j - i]
            if fold:
                act = aten.gelu.out(here, out=act_buffer[: j - i])
                pairs = torch.bmm(dy.transpose(1, 2), act)  # [b, out_chans, 4C]
                d_scale = torch.linalg.vecdot(pairs, second, dim=1).unsqueeze(1)
                if need_second:
                    part_second = pairs.mul_(scale).sum(dim=0).addr_(flat.sum(dim=0), grn_bias)
                    d_second = d_second.add_(part_second) if i else part_second
                torch.bmm(dy, second * scale, out=da)
            else:
                torch.mm(flat, second, out=da.view(-1, hidden))
                if triton:
                    from . import triton_kernels

                    d_scale, _, act = triton_kernels.gelu_reductions(here, da, scale.squeeze(1), grn_bias)
                    d_scale = d_scale.unsqueeze(1)
                    if need_second:
                        _accumulate(d_second, flat.t(), act.view(-1, hidden), i)
                else:
                    act = aten.gelu.out(here, out=act_buffer[: j - i])
                    scaled = torch.mul(da, act, out=product[: j - i])
                    d_scale = scaled.sum(dim=1, keepdim=True, dtype=stats_dtype(da))
                    if need_second:
                        torch.addcmul(grn_bias.to(dtype), act, scale.to(dtype), out=scaled)
                        _accumulate(d_second, flat.t(), scaled.view(-1, hidden), i)
                    if full:
                        da.mul_(scale)
            d_grn += (d_scale * ratio).sum(dim=(0, 1)).to(d_grn.dtype)
            if not (need_x or need_first):
                continue
            d_ratio = d_scale * grn_weight
            d_g = (d_ratio - (d_ratio * ratio).mean(dim=-1, keepdim=True)) / total
            pull = torch.where(g > 1e-15, d_g / g, 0.0)  # no gradient where all is zero: its sqrt has none
            if triton:
                dh, d_bias = triton_kernels.gelu_backward(here, da, scale.squeeze(1), pull.squeeze(1), inplace=True)
                d_first_bias += d_bias.to(d_first_bias.dtype)
            else:
                if full:
                    da.addcmul_(act, pull)
                else:  # the pull can be too large for float16, and its product with the activation fit
                    da = (da * scale).addcmul_(act, pull).to(dtype)
                dh = aten.gelu_backward.grad_input(da, here, grad_input=da)
                d_first_bias += dh.sum(dim=(0, 1), dtype=stats_dtype(dh)).to(d_first_bias.dtype)
            dh = dh.view(-1, hidden)
            if not recompute:
                tokens, mean, rstd = _normalise(part, norm_weight, norm_bias, norm_eps)
            if need_first:
                _accumulate(d_first, dh.t(), tokens.to(dtype).view(-1, C), i)
            d_tokens = (dh @ w).view_as(part).to(part.dtype)
            d_part, *found = aten.native_layer_norm_backward(
                d_tokens, part, [C], mean, rstd, norm_weight.to(part.dtype), norm_bias.to(part.dtype),
                [need_x, need_first, need_first],
            )  # fmt: skip
            if need_x and n < B:
                dx[i:j] = d_part
            elif need_x:
                dx = d_part.to(x.dtype)
            if need_first:
                for total_grad, more in zip(d_norm, found, strict=True):
                    total_grad += more
        d_grn_bias = (w2.t() @ d_sum).to(grn_bias.dtype)
        return dx, *d_norm, d_first, d_first_bias, d_grn, d_grn_bias, d_second, d_sum


def _token_norm(act: Tensor, squares: Tensor) -> Tensor:
    """`[b, 1, F]` L2 norms over the tokens of `[b, T, F]`, in float32 (float64 for float64)."""
    if act.is_cuda or act.dtype != stats_dtype(act):
        return spatial_norm(act.unsqueeze(1), (1, 2)).squeeze(1)
    return torch.mul(act, act, out=squares).sum(dim=1, keepdim=True).clamp_(min=1e-30).sqrt_()


def _accumulate(total: Tensor, a: Tensor, b: Tensor, index: int) -> None:
    """`total += a @ b`, or `total = a @ b` at index 0; `total` may have the higher precision."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(index > 0), out=total)
    elif index:
        total += a @ b
    else:
        total.copy_(a @ b)


@_token_mlp_backward.register_fake
def _(grad, x, h, norms, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, norm_eps, grn_eps, dtype,
      triton, need_x, need_first, need_second):  # fmt: skip
    like = (x, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2)
    return *(torch.empty_like(t) for t in like), w2.new_empty(len(w2))


# What `torch.utils.flop_counter` counts, the matrix products of the plain form: an operation it does not know has none.


@register_flop_formula(torch.ops.timm_convnextv2.token_mlp)
def _forward_flops(x, shortcut, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * (w1[0] * w1[1] + w2[0] * w2[1])


@register_flop_formula(torch.ops.timm_convnextv2.token_mlp_backward)
def _backward_flops(grad, x, h, norms, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, norm_eps,
                    grn_eps, dtype, triton, need_x, need_first, need_second, **kwargs) -> int:  # fmt: skip
    tokens, first, second = 2 * x[0] * x[1], w1[0] * w1[1], w2[0] * w2[1]
    recompute = math.prod(h) == 0
    return tokens * ((need_x + need_first + recompute) * first + ((need_x or need_first) + need_second) * second)


def _setup_context(ctx, inputs, output) -> None:
    x, shortcut, keep, *parameters = inputs[:11]
    _, h, norms = output
    ctx.mark_non_differentiable(h, norms)
    ctx.set_materialize_grads(False)  # a gradient of `h` would be zeros of its size
    ctx.save_for_backward(x, h, norms, keep, *parameters)
    ctx.norm_eps, ctx.grn_eps, ctx.dtype, _, _, ctx.triton = inputs[11:]
    ctx.shortcut_dtype = shortcut.dtype


def _backward(ctx, grad, _grad_h, _grad_norms):
    if grad is None:
        return (None,) * 17
    x, h, norms, keep, *parameters = ctx.saved_tensors
    grad = grad.contiguous()  # the shortcut's too: what is upstream then finds it in channels-last memory
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():  # a gradient of gradients was asked for: differentiate the plain form
        wanted = [t for t, need in zip((x, *parameters), (needs[0], *needs[3:11]), strict=True) if need]
        with torch.autocast(x.device.type, enabled=False):
            plain = _plain(x, keep, *parameters, ctx.norm_eps, ctx.grn_eps)
            found = iter(torch.autograd.grad(plain, wanted, grad.to(plain.dtype), create_graph=True))
        grads = [next(found) if need else None for need in (needs[0], *needs[3:11])]
    else:
        found = _token_mlp_backward(
            grad, x, h, norms, keep, *parameters[:-1], ctx.norm_eps, ctx.grn_eps, ctx.dtype, ctx.triton,
            needs[0], any(needs[3:7]), any(needs[7:11]),
        )  # fmt: skip
        grads = [value if need else None for value, need in zip(found, (needs[0], *needs[3:11]), strict=True)]
    shortcut = grad.to(ctx.shortcut_dtype) if needs[1] else None
    return grads[0], shortcut, None, *grads[1:], None, None, None, None, None, None


_token_mlp.register_autograd(_backward, setup_context=_setup_context)


def _plain(x, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, norm_eps, grn_eps) -> Tensor:
    """The branch without the residual, in plain operations, `[B, T, C]`."""
    out = token_mlp(x, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2, norm_eps, grn_eps)
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
        keep: Drop path's factor of each image, `[B]`, or None. It is not differentiated.
        norm_weight: LayerNorm's, `[C]`.
        norm_bias: `[C]`.
        w1: First Linear, `[4C, C]`.
        b1: `[4C]`.
        grn_weight: `[4C]`.
        grn_bias: `[4C]`.
        w2: Second Linear, `[C, 4C]`.
        b2: `[C]`.
        norm_eps: LayerNorm's epsilon.
        grn_eps: GRN's.
        recompute: Compute the pre-activation again in the backward, rather than keep it: a sixth of the step's
            matrix products for two thirds of what it keeps.

    Returns:
        `[B, T, C]`, in the type that the residual sum has in plain PyTorch.
    """
    dtype = autocast_dtype(x) or x.dtype
    tensors = (x, shortcut, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Between it and its function an operation takes 0.2 ms on CPU, which small models notice at inference.
    direct = not save and type(x) is Tensor and not torch.compiler.is_compiling()
    return (_forward if direct else _token_mlp)(
        x.contiguous(), shortcut, keep, norm_weight, norm_bias, w1, b1, grn_weight, grn_bias, w2, b2,
        norm_eps, grn_eps, dtype, save, recompute, backend(x.device) == "triton",
    )[0]  # fmt: skip
