"""Depthwise convolution on packed patches, reading each patch with a border of its visible neighbours."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["is_plain_depthwise", "window_depthwise"]


def is_plain_depthwise(conv: nn.Module) -> bool:
    """Whether `window_depthwise` computes what `conv` does: depthwise, stride and dilation 1, 'same' zero padding."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.padding_mode == "zeros"
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


def _windows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, p, p, C]` at `index` `[N, q, q]`, zeros where it is `N * p * p`, as channels-last `[N, C, q, q]`."""
    C = x.shape[-1]
    tokens = torch.cat([x.reshape(-1, C), x.new_zeros(1, C)])
    return tokens.index_select(0, index.flatten()).view(*index.shape, C).permute(0, 3, 1, 2)


class _WindowDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, index):
        ctx.save_for_backward(x, weight, index)
        ctx.has_bias = bias is not None
        return F.conv2d(_windows(x, index), weight, bias, groups=len(weight)).permute(0, 2, 3, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, index = ctx.saved_tensors
        grad, C = grad.contiguous(), len(weight)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            # neighbourhood is mutual: the transpose is the same operation with the kernel turned round
            grad_x = F.conv2d(_windows(grad, index), weight.flip(2, 3), groups=C).permute(0, 2, 3, 1)
        if need_weight or need_bias:
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad.permute(0, 3, 1, 2), _windows(x, index), weight, [C] if ctx.has_bias else None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], C, [False, need_weight, need_bias],
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None


def window_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Submanifold depthwise convolution of packed patches; work and memory go with the number of patches.

    Its gradient can be taken once.

    Args:
        x: Packed patches `[N, p, p, C]`.
        weight: Kernel `[C, 1, k, k]`, k odd.
        bias: `[C]` or None.
        index: For each patch its tokens with a border of `k // 2`, int64 `[N, p + k - 1, p + k - 1]` into the
            `N * p * p` tokens, `N * p * p` where there is none (removed, or outside of the image).

    Returns:
        `[N, p, p, C]`.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _WindowDepthwise.apply(x, weight, bias, index)
