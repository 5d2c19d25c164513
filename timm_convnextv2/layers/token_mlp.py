"""The token MLP of a ConvNeXt V2 block: LayerNorm, Linear, activation, GRN, Linear, drop path, residual.

Source: ConvNeXt V2, section 3 (https://arxiv.org/abs/2301.00808); `timm.layers.GlobalResponseNormMlp`.
"""

import torch
import torch.nn.functional as F
from timm.layers import GELU, DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, drop_path
from torch import nn

from ..ops.dispatch import autocast_dtype, backend, watched
from ..ops.functional import stats_dtype
from ..ops.token_mlp import fused_token_mlp
from .grn import GlobalResponseNorm

__all__ = ["PointwiseConv2d", "TokenMlp"]


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution weights, applied to channels-last tokens `[..., Cin]` as a matrix product, which is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class TokenMlp(GlobalResponseNormMlp):
    """timm's `GlobalResponseNormMlp` on channels-last tokens, whether its weights are `Linear` or 1x1 `Conv2d`.

    timm runs the second kind (`use_conv=True`, atto to nano) as convolutions on `[B, C, H, W]`.

    Shape: `[B, H, W, C]` to `[B, H, W, C]`.

    Attributes:
        recompute: Whether `fused` computes its pre-activation again in the backward, rather than keep it.
    """

    recompute = False

    @classmethod
    def adopt(cls, mlp: GlobalResponseNormMlp) -> None:
        """Turns timm's module into this one in place: parameters and their names stay."""
        mlp.__class__ = cls
        for fc in (mlp.fc1, mlp.fc2):
            if isinstance(fc, nn.Conv2d):
                fc.__class__ = PointwiseConv2d
        mlp.grn.__class__ = GlobalResponseNorm
        mlp.grn.spatial_dim, mlp.grn.channel_dim, mlp.grn.wb_shape = (1, 2), -1, (1, 1, 1, -1)

    def can_fuse(self, x: torch.Tensor, norm: nn.Module, path: nn.Module) -> bool:
        """Whether `fused` computes what the modules do, one after the other, and may: the one place of that rule.

        It may not where somebody looks between them (hooks, exporters, tracers), or replaced one by another kind.

        Args:
            x: The mixer's output, `[B, C, H, W]`.
            norm: The norm before the MLP.
            path: The drop path after it.
        """
        if not isinstance(x, torch.Tensor) or isinstance(x, torch.fx.Proxy) or watched():
            return False
        if backend(x.device) == "reference" or x.numel() == 0 or not x.is_floating_point():
            return False
        linear = (nn.Linear, PointwiseConv2d)
        return (
            type(norm) in (LayerNorm, LayerNorm2d, nn.LayerNorm)
            and norm.weight is not None
            and norm.bias is not None
            and type(self.fc1) in linear
            and type(self.fc2) in linear
            and self.fc1.bias is not None
            and self.fc2.bias is not None
            and type(self.act) in (nn.GELU, GELU)
            and getattr(self.act, "approximate", "none") == "none"
            and type(self.grn) is GlobalResponseNorm
            and type(path) in (DropPath, nn.Identity)
            and not (self.training and (self.drop1.p or self.drop2.p))
            and not any(
                map(_hooked, (self, norm, self.fc1, self.act, self.drop1, self.grn, self.fc2, self.drop2, path))
            )
            and (x.dtype == self.fc1.weight.dtype or autocast_dtype(x) is not None)
        )

    def fused(self, x: torch.Tensor, shortcut: torch.Tensor, norm: nn.Module, path: nn.Module) -> torch.Tensor:
        """`shortcut + path(mlp(norm(x)))` as one operation, where `can_fuse` allows it.

        Args:
            x: The mixer's output, `[B, C, H, W]`.
            shortcut: `[B, C, H, W]`.
            norm: The norm before the MLP.
            path: The drop path after it.

        Returns:
            `[B, C, H, W]`, channels-last.
        """
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
