"""Global Response Normalization with float32 statistics.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNorm`.
"""

import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm

__all__ = ["GlobalResponseNorm"]


class GlobalResponseNorm(TimmGlobalResponseNorm):
    """timm's GRN, same parameters and numbers, with three differences in how it is computed.

    `g = ||x||_2` over the tokens of an image, per channel; `n = g / (mean_c g + eps)`;
    `out = x * (1 + weight * n) + bias`.

    The sum of squares is accumulated in float32 whatever the input type (in float16 it overflows at activations of a
    few dozen), and the scale is applied in one pass over `x` where timm takes three. The per-image scale itself is
    small, `[B, 1, 1, C]`.

    Shape: `[B, H, W, C]` with `channels_last=True`, else `[B, C, H, W]`; the output has the input's shape and dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stats_dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        g = torch.linalg.vector_norm(x, ord=2, dim=self.spatial_dim, keepdim=True, dtype=stats_dtype)
        n = g / (g.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        scale = 1 + self.weight.view(self.wb_shape) * n
        return torch.addcmul(self.bias.view(self.wb_shape).to(x.dtype), x, scale.to(x.dtype))
