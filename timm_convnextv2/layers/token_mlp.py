"""The token MLP of a ConvNeXt V2 block: LayerNorm, Linear, activation, GRN, Linear, drop path, residual.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.layers import GELU, DropPath, GlobalResponseNormMlp, drop_path
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import Tensor, nn

from ..ops.dispatch import why_eager
from ..ops.functional import stats_dtype
from ..ops.token_mlp import fused_token_mlp
from .grn import GlobalResponseNorm
from .layer_norm import LayerNorm, LayerNorm2d

NORMS = (LayerNorm, LayerNorm2d, TimmLayerNorm, TimmLayerNorm2d, nn.LayerNorm)


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution applied to channels-last tokens `[..., Cin]` as a matrix product, which is faster."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class TokenMlp(GlobalResponseNormMlp):
    """timm's `GlobalResponseNormMlp` of `[B, H, W, C]`, with `Linear` or 1x1 `Conv2d` weights (atto to nano)."""

    if TYPE_CHECKING:  # nn.Module types them as Tensor | Module
        fc1: Any
        fc2: Any

    recompute = False  # whether `fused` recomputes its pre-activation in the backward instead of saving it

    @classmethod
    def adopt(cls, mlp: GlobalResponseNormMlp) -> None:
        """Turns timm's module into this class in place; parameters and their names stay."""
        mlp.__class__ = cls
        for fc in (mlp.fc1, mlp.fc2):
            if isinstance(fc, nn.Conv2d):
                fc.__class__ = PointwiseConv2d
        grn: Any = mlp.grn
        grn.__class__ = GlobalResponseNorm
        grn.spatial_dim, grn.channel_dim, grn.wb_shape = (1, 2), -1, (1, 1, 1, -1)

    def why_eager(self, x: Tensor, norm: Any, path: nn.Module) -> str:
        """Why `fused` may not replace the modules on the mixer's output `x` `[B, C, H, W]`; '' if it may.

        It computes the same only if norm, MLP and drop path are of known types and nothing intercepts them.
        """
        if type(norm) not in NORMS or norm.weight is None or norm.bias is None:
            return "its norm is not a LayerNorm with weight and bias"
        for fc in (self.fc1, self.fc2):
            if type(fc) not in (nn.Linear, PointwiseConv2d) or fc.bias is None:
                return "a Linear was replaced by another kind of module, or has no bias"
        if type(self.act) not in (nn.GELU, GELU) or getattr(self.act, "approximate", "none") != "none":
            return "its activation is not the exact GELU"
        if type(self.grn) is not GlobalResponseNorm:
            return "its GRN was replaced by another kind of module"
        if type(path) not in (DropPath, nn.Identity):
            return "its drop path was replaced by another kind of module"
        if self.training and (self.drop1.p or self.drop2.p):
            return "it has dropout"
        weights = [w for m in (norm, self.fc1, self.grn, self.fc2) for w in (m.weight, m.bias)]
        return why_eager(x, weights, (self, norm, self.fc1, self.act, self.drop1, self.grn, self.fc2, self.drop2, path))

    def fused(self, x: Tensor, shortcut: Tensor, norm: Any, path: nn.Module) -> Tensor:
        """`shortcut + path(mlp(norm(x)))` of `[B, C, H, W]` as one operation; only if `why_eager` gives ''."""
        B, C, H, W = x.shape
        keep = None
        if type(path) is DropPath and path.training and path.drop_prob:
            keep = drop_path(x.new_ones(B, dtype=stats_dtype(x)), path.drop_prob, True, path.scale_by_keep)
        out = fused_token_mlp(
            x.permute(0, 2, 3, 1).reshape(B, H * W, C), shortcut.permute(0, 2, 3, 1).reshape(B, H * W, -1), keep,
            norm.weight, norm.bias, self.fc1.weight.flatten(1), self.fc1.bias, self.grn.weight, self.grn.bias,
            self.fc2.weight.flatten(1), self.fc2.bias, norm.eps, self.grn.eps,
            self.recompute,
        )  # fmt: skip
        return out.view(B, H, W, -1).permute(0, 3, 1, 2)
