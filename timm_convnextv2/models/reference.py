"""The plain reference: dense convolutions on whole images, with the mask applied before and after each of them.

It is slow on purpose and independent of the packed code, as the paper's section 3 describes it. Tests compare the
packed model with it; benchmarks use it as their baseline.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fcmae import FCMAE, FCMAEOutput, normalize_target, patchify


def _grn(x: Tensor, grn: Any, keep: Tensor) -> Tensor:
    """GRN over the kept tokens of each image; `x` `[B, H, W, C]`, `keep` `[B, H, W, 1]`."""
    g = (x.to(torch.promote_types(x.dtype, torch.float32)) * keep).square().sum(dim=(1, 2), keepdim=True)
    g = torch.where(g > 0, g, 1).sqrt() * (g > 0)  # the gradient of sqrt at 0 is not finite
    n = (g / (g.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
    return x + grn.weight * (x * n) + grn.bias


def _block(block: Any, x: Tensor, keep: Tensor) -> Tensor:
    """One block on `[B, C, H, W]`; `keep` `[B, 1, H, W]` is 1 at visible positions."""
    mlp = block.mlp
    y = block.conv_dw(x * keep) * keep
    y = y.permute(0, 2, 3, 1)
    y = F.layer_norm(y, block.norm.normalized_shape, block.norm.weight, block.norm.bias, block.norm.eps)
    y = mlp.act(F.linear(y, mlp.fc1.weight.flatten(1), mlp.fc1.bias))
    if hasattr(mlp, "grn"):
        y = _grn(y, mlp.grn, keep.permute(0, 2, 3, 1))
    y = F.linear(y, mlp.fc2.weight.flatten(1), mlp.fc2.bias)
    if block.gamma is not None:
        y = y * block.gamma
    return x + block.drop_path(y.permute(0, 3, 1, 2))


def reference_features(model: FCMAE, images: Tensor, mask: Tensor) -> Tensor:
    """Encoder features `[B, D, h, w]`, zero at removed patches; `mask` bool `[B, h, w]`, True = removed."""
    x = model.encoder.stem(images)
    for stage in model.encoder.stages:
        x = stage.downsample(x)
        scale = x.shape[-1] // mask.shape[-1]
        keep = (~mask).repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1).to(x.dtype)
        x = x * keep
        for block in stage.blocks:
            x = _block(block, x, keep)
    return x * (~mask).unsqueeze(1)


def _channel_loss(pred: Tensor, target: Tensor, mask: Tensor, channels: Tensor, normalize: bool) -> Tensor:
    """The loss image by image, over the remaining channels only; shapes as in `FCMAEOutput`."""
    losses = []
    for own_pred, own, gone, removed in zip(pred, target, mask.flatten(1), channels, strict=True):
        own_pred, own = (x[gone].unflatten(-1, (-1, len(removed)))[..., ~removed].flatten(1) for x in (own_pred, own))
        losses.append(F.mse_loss(own_pred, normalize_target(own)[0] if normalize else own))
    return torch.stack(losses).mean()


def reference_forward(model: FCMAE, images: Tensor, mask: Tensor, channels: Tensor | None = None) -> FCMAEOutput:
    """Loss and prediction of `model` on `[B, C, H, W]` images, computed densely with the model's own parameters.

    `mask` is bool `[B, h, w]` and `channels` bool `[B, C]`, True = removed.
    """
    if channels is not None:
        images = torch.where(channels[:, :, None, None], 0, images)
    gap = mask.unsqueeze(1)
    x = model.proj(reference_features(model, images, mask))
    x = torch.where(gap, model.mask_token, x)
    everything = torch.ones_like(x[:, :1])
    for block in model.decoder:
        x = _block(block, x, everything)
    pred = model.pred(x).flatten(2).transpose(1, 2)

    dtype = torch.promote_types(images.dtype, torch.float32)
    target = patchify(images, model.stride).to(dtype)
    if channels is not None:
        return FCMAEOutput(_channel_loss(pred.to(dtype), target, mask, channels, model.norm_pix_loss), pred, mask)
    target = normalize_target(target)[0] if model.norm_pix_loss else target
    per_patch = (pred.to(dtype) - target).square().mean(dim=-1)
    weight = mask.flatten(1).to(dtype)
    return FCMAEOutput((per_patch * weight).sum() / weight.sum(), pred, mask)
