"""LayerNorm of the stem and of downsampling: a Triton kernel on CUDA, a faster and exact backward on CPU."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import Tensor, nn

from ..ops.dispatch import autocast_dtype, backend, why_eager
from ..ops.layer_norm import fused_layer_norm


class LayerNorm2d(TimmLayerNorm2d):
    """timm's `LayerNorm2d` of `[B, C, H, W]`, channels-last, without float32 copies under autocast."""

    # Whether only a convolution reads the output. Under autocast the output then has autocast's type, to which the
    # convolution would round it; else float32, as in plain PyTorch on CUDA.
    feeds_conv = False

    @classmethod
    def adopt(cls, norm: nn.Module, feeds_conv: bool) -> None:
        """Turns timm's LayerNorm of maps into this class in place if it has weight and bias."""
        # a norm made under `timm.layers.set_fast_norm` has other types under autocast
        plain = type(norm) is TimmLayerNorm2d and not norm._fast_norm
        if plain and norm.weight is not None and norm.bias is not None:
            norm.__class__ = cls
            assert isinstance(norm, LayerNorm2d)
            norm.feeds_conv = feeds_conv

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.why_eager(x):
                dtype = autocast_dtype(x)
                # without a convolution the type is PyTorch's: under autocast float32 on CUDA, that of the input on CPU
                plain = torch.float32 if dtype is not None and backend(x.device) == "triton" else x.dtype
                dtype = dtype if dtype is not None and self.feeds_conv else plain
                out = fused_layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps, dtype)
                return out.permute(0, 3, 1, 2)
        out = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return out.permute(0, 3, 1, 2)

    @torch.jit.unused
    def why_eager(self, x: Tensor) -> str:
        """Why PyTorch's operations run on `x` `[B, C, H, W]`; '' if an operation of `ops` does."""
        reason = why_eager(x, (self.weight, self.bias))
        if reason or backend(x.device) == "triton":
            return reason
        if x.device.type != "cpu":
            return "only the backend 'triton' has a kernel for it, and only the CPU a faster backward"
        if not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return "no gradient is needed, and the forward is PyTorch's in any case"
        return ""
