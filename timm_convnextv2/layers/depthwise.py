"""Depthwise convolution that uses `ops.depthwise` for its backward when it trains on CPU."""

import torch
from torch import Tensor, nn

from ..ops.depthwise import depthwise_conv
from ..ops.dispatch import autocast_dtype, backend, why_eager
from ..ops.gemm import HAS_ONEDNN, MAX_COLUMNS


def is_plain_depthwise(conv: nn.Module) -> bool:
    """Whether `conv` is depthwise with an odd square kernel, stride and dilation 1 and 'same' zero padding."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in (nn.Conv2d, DepthwiseConv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
    )


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight gradient on CPU is computed by columns of the kernel, which is faster."""

    @classmethod
    def adopt(cls, conv: nn.Module) -> None:
        """Turns a plain depthwise convolution into this class in place; leaves any other unchanged."""
        if is_plain_depthwise(conv):
            conv.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.why_eager(x):
                dtype = autocast_dtype(x) or x.dtype
                bias = None if self.bias is None else self.bias.to(dtype)
                x = x.to(dtype).contiguous(memory_format=torch.channels_last)
                return depthwise_conv(x, self.weight.to(dtype), bias)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def why_eager(self, x: Tensor) -> str:
        """Why PyTorch's convolution runs on `x` `[B, C, H, W]`; '' if `ops.depthwise` does."""
        grad = torch.is_grad_enabled()
        reason = why_eager(x, (self.weight, self.bias)) if grad else ""
        if reason:
            return reason
        if not (grad and (x.requires_grad or self.weight.requires_grad)):
            return "no gradient is needed, and the forward is PyTorch's in any case"
        if not HAS_ONEDNN or x.device.type != "cpu":
            return "only oneDNN on CPU has a weight gradient that is slow"
        if backend("cpu") == "triton":
            return "the backend 'triton' has no kernel for it"
        if not is_plain_depthwise(self) or self.kernel_size[0] <= MAX_COLUMNS:
            return f"it is not a depthwise convolution of stride 1 with more than {MAX_COLUMNS} columns"
        if x.ndim != 4 or x.dtype == torch.float64:
            return "the input is not [B, C, H, W], or is float64, which oneDNN does not support"
        return ""
