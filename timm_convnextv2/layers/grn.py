"""Global Response Normalization: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808)."""

import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from timm.models import register_notrace_module

from ..ops.functional import global_response_norm


@register_notrace_module  # torch.fx (timm's feature_cls='fx') cannot trace the check of the dtype
class GlobalResponseNorm(TimmGlobalResponseNorm):
    """timm's GRN with the same parameters and numbers: float32 sums of squares, and one pass over `x` instead of three.

    `g = ||x||_2` over the tokens of an image, per channel; `n = g / (mean_c g + eps)`;
    `out = x * (1 + weight * n) + bias`. Shape: `[B, H, W, C]` with `channels_last=True`, else `[B, C, H, W]`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        return global_response_norm(x, weight, bias, self.eps, self.spatial_dim, self.channel_dim)
