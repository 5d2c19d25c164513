"""The token MLP of a ConvNeXt V2 block: Linear, activation, GRN, Linear.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

import torch
import torch.nn.functional as F
from timm.layers import GlobalResponseNormMlp
from torch import nn

from .grn import GlobalResponseNorm

__all__ = ["PointwiseConv2d", "TokenMlp"]


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution weights, applied to channels-last tokens `[..., Cin]` as a matrix product, which is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TokenMlp(GlobalResponseNormMlp):
    """timm's `GlobalResponseNormMlp` on channels-last tokens, whether its weights are `Linear` or 1x1 `Conv2d`.

    timm runs the second kind (`use_conv=True`, atto to nano) as convolutions on `[B, C, H, W]`.

    Shape: `[B, H, W, C]` to `[B, H, W, C]`.
    """

    @classmethod
    def adopt(cls, mlp: GlobalResponseNormMlp) -> None:
        """Turns timm's module into this one in place: parameters and their names stay."""
        mlp.__class__ = cls
        for fc in (mlp.fc1, mlp.fc2):
            if isinstance(fc, nn.Conv2d):
                fc.__class__ = PointwiseConv2d
        mlp.grn.__class__ = GlobalResponseNorm
        mlp.grn.spatial_dim, mlp.grn.channel_dim, mlp.grn.wb_shape = (1, 2), -1, (1, 1, 1, -1)
