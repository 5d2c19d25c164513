"""The matrix product of a convolution whose kernel is its stride."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _PatchProduct(torch.autograd.Function):
    """Patches `[..., k * k * C]` times the weight `[O, C, k, k]`, of which no second copy is kept."""

    @staticmethod
    def forward(patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        patches, weight = ctx.saved_tensors
        out_chans, C, k, _ = weight.shape
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad @ weight.permute(0, 2, 3, 1).flatten(1) if need_x else None
        flat = grad.flatten(0, -2)
        grad_weight = None
        if need_weight:
            grad_weight = (flat.t() @ patches.flatten(0, -2)).view(out_chans, k, k, C).permute(0, 3, 1, 2)
        return grad_x, grad_weight, flat.sum(dim=0) if need_bias else None


def patch_product(patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Patches `[..., k * k * C]`, pixels in (row, column, channel) order, times `[O, C, k, k]`: `[..., O]`."""
    return _PatchProduct.apply(patches, weight, bias)
