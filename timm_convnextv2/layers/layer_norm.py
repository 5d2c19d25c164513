"""LayerNorm outside the token MLP: a Triton kernel on CUDA; on CPU a faster backward, which adds up in float32.

PyTorch's own on CPU adds up the gradients of weight and bias in the type of the input. In bfloat16 that is off by 10 to
20 % after some thousand tokens, and the more the larger the maps.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import Tensor, nn

from ..ops.dispatch import autocast_dtype, backend, why_eager
from ..ops.layer_norm import fused_layer_norm


class _OfTokens(nn.LayerNorm if TYPE_CHECKING else object):
    """LayerNorm over the last axis, without float32 copies under autocast."""

    stock: type[nn.LayerNorm]  # timm's class

    # Whether only a convolution or Linear reads the output. Under autocast the output then has autocast's type, to
    # which that layer would round it; else PyTorch's type.
    feeds_conv = False

    @classmethod
    def adopt(cls, norm: nn.Module, feeds_conv: bool) -> None:
        """Turns timm's norm of the same name into this class in place if it has weight and bias."""
        # a norm made under `timm.layers.set_fast_norm` has other types under autocast
        plain = type(norm) is cls.stock and not norm._fast_norm
        if plain and norm.weight is not None and norm.bias is not None:
            norm.__class__ = cls
            assert isinstance(norm, cls)
            norm.feeds_conv = feeds_conv

    def normalize(self, x: Tensor) -> Tensor:
        """LayerNorm of tokens `[..., C]`."""
        if not torch.jit.is_scripting():
            if not self.why_eager(x):
                dtype = autocast_dtype(x)
                # PyTorch's type under autocast is float32 on CUDA, that of the input on CPU
                plain = torch.float32 if dtype is not None and backend(x.device) == "triton" else x.dtype
                dtype = dtype if dtype is not None and self.feeds_conv else plain
                return fused_layer_norm(x, self.weight, self.bias, self.eps, dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def why_eager(self, x: Tensor) -> str:
        """Why PyTorch's operations run on `x`; '' if an operation of `ops` does."""
        reason = why_eager(x, (self.weight, self.bias))
        if reason or backend(x.device) == "triton":
            return reason
        if x.device.type != "cpu":
            return "only the backend 'triton' has a kernel for it, and only the CPU a faster backward"
        if not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return "no gradient is needed, and the forward is PyTorch's in any case"
        return ""


class LayerNorm(_OfTokens, TimmLayerNorm):
    """timm's `LayerNorm` of `[..., C]`."""

    stock = TimmLayerNorm

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x)


class LayerNorm2d(_OfTokens, TimmLayerNorm2d):
    """timm's `LayerNorm2d` of `[B, C, H, W]`, channels-last."""

    stock = TimmLayerNorm2d

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
