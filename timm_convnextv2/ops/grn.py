"""Global Response Normalization with float32 statistics.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.grn.GlobalResponseNorm`.
"""

import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from timm.models import register_notrace_module

__all__ = ["GlobalResponseNorm", "global_response_norm", "norm_ratio", "spatial_norm", "stats_dtype"]


def stats_dtype(x: torch.Tensor) -> torch.dtype:
    """What statistics of `x` are accumulated in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spatial_norm(x: torch.Tensor, dim: tuple[int, int]) -> torch.Tensor:
    """L2 norm over two axes, kept as size 1, accumulated and returned in float32 (float64 for float64)."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, ord=2, dim=dim, keepdim=True, dtype=stats_dtype(x))
    # On CPU vector_norm is not vectorised over axes that are not the last: this takes a quarter of its time. The clamp
    # keeps the gradient of an all-zero channel at zero, as vector_norm does.
    return x.to(stats_dtype(x)).square().sum(dim=dim, keepdim=True).clamp(min=1e-30).sqrt()


def norm_ratio(g: torch.Tensor, eps: float, channel_dim: int = -1) -> torch.Tensor:
    """GRN's `n = g / (mean_c g + eps)` of the norms `g`."""
    return g / (g.mean(dim=channel_dim, keepdim=True) + eps)


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
    scale = 1 + weight * norm_ratio(spatial_norm(x, dim), eps, channel_dim)
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


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
        return global_response_norm(x, weight, bias, self.eps, self.spatial_dim, self.channel_dim)
