"""The token MLP of a ConvNeXt V2 block: Linear, activation, GRN, Linear.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

import torch
import torch.nn.functional as F
from timm.layers import GlobalResponseNormMlp

from .grn import GlobalResponseNorm

__all__ = ["TokenMlp"]


class TokenMlp(GlobalResponseNormMlp):
    """timm's `GlobalResponseNormMlp` on channels-last tokens, whether its weights are `Linear` or 1x1 `Conv2d`.

    timm runs the second kind (`use_conv=True`, atto to nano) as convolutions on `[B, C, H, W]`; as matrix products the
    same weights are faster.

    Shape: `[B, H, W, C]` to `[B, H, W, C]`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias)
        x = self.act(x)
        x = self.drop1(x)
        x = self.grn(x)
        x = F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias)
        return self.drop2(x)

    @classmethod
    def adopt(cls, mlp: GlobalResponseNormMlp) -> None:
        """Turns timm's module into this one in place: parameters and their names stay."""
        mlp.__class__ = cls
        mlp.grn.__class__ = GlobalResponseNorm
        mlp.grn.spatial_dim, mlp.grn.channel_dim, mlp.grn.wb_shape = (1, 2), -1, (1, 1, 1, -1)
