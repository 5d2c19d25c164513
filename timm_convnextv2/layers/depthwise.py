"""Depthwise convolution whose backward, in training on CPU, is `ops.depthwise`'s."""

import torch
from torch import nn

from ..ops.depthwise import HAS_ONEDNN, MAX_COLUMNS, depthwise_conv
from ..ops.dispatch import autocast_dtype, backend, watched

__all__ = ["DepthwiseConv2d", "is_plain_depthwise"]


def is_plain_depthwise(conv: nn.Module) -> bool:
    """Whether the operations here compute what `conv` does: depthwise, stride and dilation 1, 'same' zero padding."""
    return (
        type(conv) in (nn.Conv2d, DepthwiseConv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` whose backward, in training on CPU, is this module's."""

    @classmethod
    def adopt(cls, conv: nn.Module) -> None:
        """Turns a plain depthwise convolution into this one in place; leaves any other as it is."""
        if is_plain_depthwise(conv):
            conv.__class__ = cls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._differs(x):
                return depthwise_conv(x.contiguous(memory_format=torch.channels_last), self.weight, self.bias)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _differs(self, x: torch.Tensor) -> bool:
        """Whether the backward would be another one than PyTorch's, and may: the one place of that rule."""
        return (
            not isinstance(x, torch.fx.Proxy)
            and not watched()
            and torch.is_grad_enabled()
            and (x.requires_grad or self.weight.requires_grad)
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.ndim == 4
            and x.numel() > 0
            and autocast_dtype(x) is None
            and self.kernel_size[0] > MAX_COLUMNS
            and backend("cpu") == "torch"
            and HAS_ONEDNN
            and is_plain_depthwise(self)
        )
