"""Convolution whose kernel equals its stride, as a matrix product if that is faster."""

import torch
from torch import Tensor, nn

from ..ops.dispatch import autocast_dtype, backend, why_eager
from ..ops.patch_conv import patch_product


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` that uses a matrix product on CPU for maps one or two patches wide, such as packed maps.

    There the convolution's training step took 1.2 to 3 times as long; for wider maps the convolution is faster.
    """

    @classmethod
    def adopt(cls, conv: nn.Module) -> None:
        """Turns a convolution without overlap, padding or groups into this class in place; leaves others unchanged."""
        if (
            type(conv) is nn.Conv2d
            and conv.kernel_size == conv.stride
            and conv.kernel_size[0] == conv.kernel_size[1]
            and conv.padding == (0, 0)
            and conv.dilation == (1, 1)
            and conv.groups == 1
        ):
            conv.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.why_eager(x):
                k = self.kernel_size[0]
                B, C, H, W = x.shape
                patches = x.permute(0, 2, 3, 1).reshape(B, H // k, k, W // k, k, C).transpose(2, 3)
                return patch_product(patches.flatten(3), self.weight, self.bias).permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def why_eager(self, x: Tensor) -> str:
        """Why PyTorch's convolution runs on `x` `[B, C, H, W]`; '' if a matrix product does."""
        reason = why_eager(x, (self.weight, self.bias))
        if reason:
            return reason
        k = self.kernel_size[0]
        if x.device.type != "cpu":
            return "only the CPU's convolution is slow on narrow maps"
        if backend("cpu") == "triton":
            return "the backend 'triton' has no kernel for it"
        if autocast_dtype(x) is not None:
            return "autocast is on"
        if x.ndim != 4 or x.shape[3] > 2 * k:
            return "the map is wider than two patches, for which the convolution is faster"
        if x.shape[2] % k or x.shape[3] % k:
            return "its patches do not cover the map"
        return ""
