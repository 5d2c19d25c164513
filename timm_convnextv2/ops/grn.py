"""Global Response Normalization with float32 statistics.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.grn.GlobalResponseNorm`.
"""

import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from timm.models import register_notrace_module
from torch.autograd import forward_ad

__all__ = ["GlobalResponseNorm", "global_response_norm"]

CHUNK_BYTES = 2**20  # of the input; what is done to a chunk finds it in the cache


def _stats_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spatial_norm(x: torch.Tensor, dim: tuple[int, int]) -> torch.Tensor:
    """L2 norm over two axes, kept as size 1, accumulated and returned in float32 (float64 for float64)."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, ord=2, dim=dim, keepdim=True, dtype=_stats_dtype(x))
    # On CPU vector_norm is not vectorised over axes that are not the last: this takes a quarter of its time. The clamp
    # keeps the gradient of an all-zero channel at zero, as vector_norm does.
    return x.to(_stats_dtype(x)).square().sum(dim=dim, keepdim=True).clamp(min=1e-30).sqrt()


def global_response_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dim: tuple[int, int], channel_dim: int
) -> torch.Tensor:
    """GRN in plain operations: the reference, and what compilers and exporters see.

    Args:
        x: `[B, H, W, C]` with `dim=(1, 2)`, `channel_dim=-1`; or `[B, C, H, W]` with `(2, 3)` and `1`.
        weight: Shaped to broadcast against `x`.
        bias: Likewise.
        eps: Added to the mean norm.
        dim: The two axes of the tokens.
        channel_dim: The axis of the channels.
    """
    g = _spatial_norm(x, dim)
    n = g / (g.mean(dim=channel_dim, keepdim=True) + eps)
    scale = 1 + weight * n
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


class _ChunkedGRN(torch.autograd.Function):
    """`global_response_norm` on channels-last tokens, a few images at a time, so that memory is passed over once.

    Plain operations pass over the tokens 5 times forward and 12 times backward; here it is 2 and 3 times.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, chunk, norms = torch.empty_like(x), max(1, CHUNK_BYTES // x[:1].nbytes), []
        for part, part_out in zip(x.split(chunk), out.split(chunk), strict=True):
            g = _spatial_norm(part, (1, 2))
            scale = 1 + weight * (g / (g.mean(dim=-1, keepdim=True) + eps))
            torch.addcmul(bias, part, scale, out=part_out)
            norms.append(g)
        ctx.save_for_backward(x, weight, bias, torch.cat(norms))
        ctx.eps, ctx.chunk = eps, chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of gradients was asked for: differentiate the plain form
            wanted = [v for v, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
            plain = global_response_norm(x, weight, bias, ctx.eps, (1, 2), -1)
            found = iter(torch.autograd.grad(plain, wanted, grad, create_graph=True, allow_unused=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(norms[:1]), torch.zeros_like(norms[:1])
        parts = (t.split(ctx.chunk) for t in (x, grad, grad_x, norms))
        for part, dy, dx, g in zip(*parts, strict=True):
            total = g.mean(dim=-1, keepdim=True) + ctx.eps
            n = g / total
            torch.mul(dy, part, out=dx)  # dx serves as scratch
            d_scale = dx.sum(dim=(1, 2), keepdim=True)
            grad_weight += (d_scale * n).sum(dim=0, keepdim=True)
            grad_bias += dy.sum(dim=(0, 1, 2))
            d_n = d_scale * weight
            d_g = (d_n - (d_n * n).mean(dim=-1, keepdim=True)) / total
            torch.mul(dy, 1 + weight * n, out=dx)
            dx.addcmul_(part, torch.where(g > 1e-15, d_g / g, 0.0))  # as the clamp: no gradient where all is zero
        return grad_x, grad_weight, grad_bias, None


def _watched() -> bool:
    """Whether a compiler, an exporter, `torch.func` or forward-mode differentiation looks on: they want plain ops."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@register_notrace_module  # one node in torch.fx graphs (timm's feature_cls='fx'), which cannot ask a dtype
class GlobalResponseNorm(TimmGlobalResponseNorm):
    """timm's GRN: same parameters, same numbers, fewer passes over the tokens.

    `g = ||x||_2` over the tokens of an image, per channel; `n = g / (mean_c g + eps)`;
    `out = x * (1 + weight * n) + bias`.

    The sum of squares is accumulated in float32 whatever the input type (in float16 it overflows), and the scale, a
    small `[B, 1, 1, C]`, is applied in one pass over `x` where timm takes three.

    Shape: `[B, H, W, C]` with `channels_last=True`, else `[B, C, H, W]`; the output has the input's shape and dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        if not torch.jit.is_scripting():
            full = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype and x.numel() > 0
            if full and x.device.type == "cpu" and self.channel_dim == -1 and x.is_contiguous() and not _watched():
                return _ChunkedGRN.apply(x, weight, bias, self.eps)
        return global_response_norm(x, weight, bias, self.eps, self.spatial_dim, self.channel_dim)
