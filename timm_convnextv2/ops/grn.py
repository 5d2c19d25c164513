"""Global Response Normalization with float32 statistics.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.grn.GlobalResponseNorm`.
"""

import torch
from timm.layers import register_notrace_module
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm

__all__ = ["GlobalResponseNorm"]


def _spatial_norm(x: torch.Tensor, dim: tuple[int, int]) -> torch.Tensor:
    """L2 norm over two axes, kept as size 1, accumulated and returned in float32 (float64 for float64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_cuda:
        return torch.linalg.vector_norm(x, ord=2, dim=dim, keepdim=True, dtype=dtype)
    # On CPU vector_norm is not vectorised over axes that are not the last: this takes a quarter of its time. The clamp
    # keeps the gradient of an all-zero channel at zero, as vector_norm does.
    return x.to(dtype).square().sum(dim=dim, keepdim=True).clamp(min=1e-30).sqrt()


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
        g = _spatial_norm(x, self.spatial_dim)
        n = g / (g.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        scale = 1 + self.weight.view(self.wb_shape) * n
        return torch.addcmul(self.bias.view(self.wb_shape).to(x.dtype), x, scale.to(x.dtype))
