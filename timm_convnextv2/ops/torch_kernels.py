"""The kernels of the fused operations in PyTorch calls: the twin of `ops.triton`, with the same functions.

The activation `a = gelu(h)` is computed once and passed from function to function. It lies in scratch memory: the next
call of `gelu` overwrites it, and so does `gelu_scale`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import spatial_norm, stats_dtype
from .gemm import bias_grad, scratch, weight_grad

# Whether `gelu` returns the activation. Folding GRN's scale into the second Linear's weight needs it, because a matrix
# product then reads it.
KEEPS_ACTIVATION = True

aten = torch.ops.aten


def _scratch_like(x: Tensor, slot: str) -> Tensor:
    return scratch(slot, tuple(x.shape), x.dtype, x.device)  # a tuple: torch is slower with its own Size


# LayerNorm, over the last axis.


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens in `dtype`; their mean and reciprocal standard deviation, `[..., 1]` in float32 or float64."""
    full = stats_dtype(x)
    tokens, mean, rstd = torch.native_layer_norm(x.to(full), x.shape[-1:], weight.to(full), bias.to(full), eps)
    return tokens.to(dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, in its dtype, and of weight and bias, in float32 or float64; None if not needed."""
    w = weight.to(stats_dtype(x))
    # the last `w` stands for the bias, of which only the shape counts
    known = (grad.to(w.dtype), x.to(w.dtype), x.shape[-1:], mean, rstd, w, w)
    dx = d_weight = d_bias = None
    # On CPU one call for all three gradients takes longer than these two calls.
    if need_x:
        dx = aten.native_layer_norm_backward(*known, [True, False, False])[0].to(x.dtype)
    if need_weight:
        d_weight, d_bias = aten.native_layer_norm_backward(*known, [False, True, True])[1:]
    return dx, d_weight, d_bias


# Token MLP. `h` and `act` are [b, T, F]; norms, scale, pull and their gradients [b, 1, F] in float32 or float64.


def gelu(h: Tensor) -> Tensor | None:
    """`gelu(h)`, which the functions below take as `act`; None from kernels that recompute it."""
    return aten.gelu.out(h, out=_scratch_like(h, "act"))


def gelu_norms(h: Tensor, act: Tensor) -> Tensor:
    """L2 norms of `gelu(h)` over the tokens, `[b, 1, F]`."""
    if act.is_cuda or act.dtype != stats_dtype(act):
        return spatial_norm(act.unsqueeze(1), (1, 2)).squeeze(1)
    squares = torch.mul(act, act, out=_scratch_like(act, "product"))
    return squares.sum(dim=1, keepdim=True).clamp_(min=1e-30).sqrt_()


def gelu_scale(h: Tensor, act: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`gelu(h) * scale + bias`, `[b, T, F]` in the dtype of `h`; `bias` is `[F]` or `[b, 1, F]`."""
    return torch.addcmul(bias.to(act.dtype), act, scale.to(act.dtype), out=act)


def gelu_reductions(
    h: Tensor, act: Tensor, grad: Tensor, scale: Tensor, bias: Tensor, need_out: bool
) -> tuple[Tensor, Tensor | None]:
    """The scale's gradient `sum_t grad * gelu(h)`, `[b, 1, F]`, and `gelu(h) * scale + bias` if needed."""
    product = torch.mul(grad, act, out=_scratch_like(act, "product"))
    d_scale = product.sum(dim=1, keepdim=True, dtype=stats_dtype(grad))
    if not need_out:
        return d_scale, None
    return d_scale, torch.addcmul(bias.to(act.dtype), act, scale.to(act.dtype), out=product)


def gelu_backward(h: Tensor, act: Tensor, grad: Tensor, scale: Tensor | None, pull: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu'(h) * (grad * scale + pull * gelu(h))`: the gradient of `h` through the scaling and through the norms.

    Args:
        grad: Gradient of `gelu_scale`'s output, like `h`; may be overwritten.
        scale: `[b, 1, F]`; None if `grad` contains it already.
        pull: `[b, 1, F]`, the gradient of the norms divided by the norms.

    Returns:
        The gradient of `h`; its sum over images and tokens, `[F]` in float32 or float64.
    """
    if grad.dtype == stats_dtype(grad):
        grad = grad if scale is None else grad.mul_(scale)
        grad.addcmul_(act, pull)
    else:  # pull can overflow float16 although its product with the activation fits
        full = scratch("full", tuple(grad.shape), pull.dtype, grad.device)
        full = full.copy_(grad) if scale is None else torch.mul(grad, scale, out=full)
        grad = grad.copy_(full.addcmul_(act, pull))
    dh = aten.gelu_backward.grad_input(grad, h, grad_input=grad)
    return dh, dh.sum(dim=(0, 1), dtype=stats_dtype(dh))


# Packed depthwise convolution: x [N, p, p, C], weight [C, 1, k, k], index [N, p + k - 1, p + k - 1]; see
# `ops.depthwise.window_depthwise`.


def window_conv(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Submanifold depthwise convolution of packed patches, `[N, p, p, C]`."""
    windows = _gather(_with_zero(x), index)
    return F.conv2d(windows, weight, bias, groups=len(weight)).permute(0, 2, 3, 1).contiguous()


def window_conv_input_grad(grad: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Gradient of `window_conv` for `x`. Neighbourhood is mutual: the same operation with the flipped kernel."""
    return window_conv(grad, weight.flip(2, 3), None, index)


def window_conv_weight_grad(x: Tensor, grad: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gradients of `window_conv` for the weight, `[C, 1, k, k]`, and the bias, `[C]`, in float32 or float64."""
    p, maps, tokens = x.shape[1], grad.permute(0, 3, 1, 2), _with_zero(x)

    def part(patches: slice, first: int, width: int) -> tuple[Tensor, tuple[int, int]]:
        return _gather(tokens, index[patches, :, first : first + p + width - 1]), (0, 0)

    return weight_grad(maps, k, part), bias_grad(maps)


def _with_zero(x: Tensor) -> Tensor:
    """`[N, p, p, C]` as tokens `[N * p * p + 1, C]`, the last of them zero."""
    C = x.shape[-1]
    tokens = scratch("tokens", (x.numel() // C + 1, C), x.dtype, x.device)
    return torch.cat([x.view(-1, C), x.new_zeros(1, C)], out=tokens)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens at `index` `[n, h, w]` as channels-last `[n, C, h, w]`; scratch memory on CPU."""
    windows = scratch("windows", (index.numel(), tokens.shape[1]), tokens.dtype, tokens.device)
    torch.index_select(tokens, 0, index.flatten(), out=windows)
    return windows.view(*index.shape, -1).permute(0, 3, 1, 2)
