"""FCMAE: fully convolutional masked autoencoder around a timm ConvNeXt V2.

Source: section 3 of https://arxiv.org/abs/2301.00808; `models/fcmae.py` of github.com/facebookresearch/ConvNeXt-V2, but
GRN's statistics are those of each image, as in the code that trained the published weights (see its issue 86).

Data flow and shapes: images `[B, C, H, W]` -> mask `[B, h, w]`, True = removed -> packed map of visible pixels
`[B, C, K * stride, stride]` -> encoder `[B, D, K, 1]` -> projected tokens in the grid, mask token elsewhere
`[B, h * w, decoder_dim]` -> decoder block -> predicted pixels of the removed patches
`[B, h * w - K, stride^2 * C]` -> loss.
"""

from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .convnextv2 import ConvNeXtV2, ConvNeXtV2Block
from .masking import check_mask, num_visible, random_mask
from .packing import PackedLayout


class FCMAEOutput(NamedTuple):
    """Output of `FCMAE`.

    Attributes:
        loss: Scalar mean squared error over the removed patches' pixels; float32, or float64 for float64 images.
        pred: Predicted pixels of all patches, `[B, h * w, stride^2 * C]`, in (row, column, channel) order, normalised
            per patch if `norm_pix_loss`; None if `return_pred=False`.
        mask: Bool `[B, h, w]`, True = removed.
    """

    loss: Tensor
    pred: Tensor | None
    mask: Tensor


def patchify(images: Tensor, stride: int) -> Tensor:
    """`[B, C, H, W]` as patches `[B, h * w, stride^2 * C]`, pixels in (row, column, channel) order."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // stride, stride, W // stride, stride)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, stride * stride * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The inverse of `patchify`: `[B, h * w, stride^2 * C]` as images `[B, C, h * stride, w * stride]`."""
    h, w = grid
    x = patches.reshape(patches.shape[0], h, w, stride, stride, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, h * stride, w * stride)


def normalize_target(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch (last axis) normalised by its mean and *unbiased* variance; that mean and deviation, `[..., 1]`."""
    n = patches.shape[-1]
    shrink = (n - 1) / n  # ratio of the biased variance, which LayerNorm computes, to the unbiased one
    normal, mean, rstd = torch.native_layer_norm(patches, [n], None, None, 1e-6 * shrink)
    return normal * shrink**0.5, mean, 1 / (rstd * shrink**0.5)


def channel_loss(pred: Tensor, target: Tensor, channels: Tensor, norm_pix_loss: bool) -> Tensor:
    """The loss without removed channels: the mean over each image's remaining pixels, then over the images.

    `pred` and `target` are patches `[B, M, n]` in (row, column, channel) order; `channels` is bool `[B, C]`, True =
    removed. `norm_pix_loss` normalises each patch by its remaining pixels.
    """
    kept = (~channels).to(target.dtype)
    weight = kept.repeat(1, target.shape[-1] // kept.shape[1]).unsqueeze(1)
    count = weight.sum(-1, keepdim=True)
    if norm_pix_loss:
        mean = (target * weight).sum(-1, keepdim=True) / count
        variance = ((target - mean).square() * weight).sum(-1, keepdim=True) / (count - 1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (((pred - target).square() * weight).sum(-1, keepdim=True) / count).mean()


class FCMAE(nn.Module):
    """Masked autoencoder whose encoder computes the visible patches only.

        model = timm.create_model("fcmae_convnextv2_atto", mask_ratio=0.6)
        out = model(images)  # images float [B, 3, H, W]; draws a mask. `FCMAEOutput`: loss, pred and mask
        out.loss.backward()
        model.encoder.forward_features(images)  # features of whole images, [B, 320, H / 32, W / 32]

    Args:
        img_size: Nominal size, an int or (H, W), for checks and records; `forward` takes any multiple of the stride.
        patch_size: Stem patch size, 1 to 7. The encoder's `stride`, the side of a patch of the mask, is 8 x
            `patch_size`; also 32 for `patch_size=2`, for which timm's ConvNeXt adds a downsampling layer.
        mask_ratio: Fraction of patches to remove if no mask is given.
        norm_pix_loss: Normalise the target per patch.
        **encoder_kwargs: Passed to `ConvNeXtV2` (`depths`, `dims`, `kernel_sizes`, `drop_path_rate`, ...).
            `use_grn=False, ls_init_value=1e-6` gives the ConvNeXt V1 of the ablation, whose decoder has no GRN either.
    """

    if TYPE_CHECKING:  # set by timm's factory, or typed by nn.Module as Tensor | Module
        pretrained_cfg: dict[str, Any]
        encoder: ConvNeXtV2

    base_model: str | None = None  # Hub model that the weights started from; set by timm's factory

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 4,
        mask_ratio: float = 0.6,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        norm_pix_loss: bool = True,
        num_classes: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **encoder_kwargs,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(
                f"An FCMAE model has no classifier, got num_classes={num_classes}. Give it to the exported encoder."
            )
        for option, needed in (("stem_type", "patch"), ("output_stride", 32)):
            if encoder_kwargs.get(option, needed) != needed:
                raise ValueError(
                    f"The sparse encoder needs {option}={needed!r}, so that only the mixer crosses patch borders; got "
                    f"{encoder_kwargs[option]!r}. Other values work in the convnextv2_* models."
                )
        if decoder_depth < 1:
            raise ValueError(
                f"decoder_depth={decoder_depth}: without a block masked patches never see the visible ones; use 1."
            )
        dd = {"device": device, "dtype": dtype}
        self.encoder = ConvNeXtV2(in_chans=in_chans, patch_size=patch_size, num_classes=0, **encoder_kwargs, **dd)
        for stage in self.encoder.stages:
            for conv in (m for m in stage.downsample.modules() if isinstance(m, nn.Conv2d)):
                if conv.kernel_size != conv.stride:
                    raise ValueError(
                        f"--patch-size {patch_size} is too large: from 8 on, timm's ConvNeXt dilates its last "
                        "downsampling layer, which then crosses patch borders. The published models have 4."
                    )
            if any(k % 2 == 0 for block in stage.blocks for k in block.conv_dw.kernel_size):
                raise ValueError(f"The mixer needs odd kernel_sizes, got {encoder_kwargs['kernel_sizes']}.")
        self.stride = self.encoder.feature_info[-1]["reduction"]
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.in_chans = in_chans
        self.num_classes = 0
        self.num_features = self.encoder.num_features
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        num_visible(self.grid(*self.img_size), mask_ratio)  # checks size and ratio before anything depends on them

        self.proj = nn.Conv2d(self.num_features, decoder_dim, kernel_size=1, **dd)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1, **dd))
        use_grn = encoder_kwargs.get("use_grn", True)
        self.decoder = nn.Sequential(
            *[ConvNeXtV2Block(decoder_dim, use_grn=use_grn, ls_init_value=None, **dd) for _ in range(decoder_depth)]
        )
        self.pred = nn.Conv2d(decoder_dim, self.stride**2 * in_chans, kernel_size=1, **dd)
        for module in (self.proj, *self.decoder.modules(), self.pred):
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]  (all have a bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Image size in patches; a ValueError names the nearest sizes that work if the stride does not divide it."""
        s = self.stride
        if height % s or width % s or min(height, width) < s:
            raise ValueError(
                f"Image size {height}x{width} (height x width) is not a multiple of the encoder's stride {s}; the "
                f"nearest that work: {self._nearest_sizes(height, width)}. A smaller stem (--patch-size) gives a "
                "smaller stride."
            )
        return height // s, width // s

    def _nearest_sizes(self, height: int, width: int) -> str:
        """The nearest sizes whose grid `mask_ratio` can split into visible and removed patches."""
        s = self.stride
        for more in range(1, 65):  # a high ratio may need more patches than the nearest multiples have
            pairs = product(*({max(s, v // s * s), -(-v // s) * s, (v // s + more) * s} for v in (height, width)))
            fits = [(h, w) for h, w in pairs if 0 < int(h * w // s**2 * (1 - self.mask_ratio)) < h * w // s**2]
            if height == width:
                fits = [(h, w) for h, w in fits if h == w]
            if fits:
                fits.sort(key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
                return " or ".join(f"{h}x{w}" for h, w in fits[:2])
        return f"multiples of {s}"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Saves memory by recomputing activations; see `ConvNeXtV2.set_grad_checkpointing`."""
        self.encoder.set_grad_checkpointing(enable)

    def visible(self, images: Tensor, mask: Tensor | None = None) -> PackedLayout:
        """The layout of images `[B, in_chans, H, W]`, from a mask (bool `[B, h, w]`, True = removed) or random."""
        if images.ndim != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            raise ValueError(
                f"images must be float [B, {self.in_chans}, H, W], got {images.dtype} {list(images.shape)}. The number "
                "of channels is set with timm.create_model(..., in_chans=...)."
            )
        grid = self.grid(*images.shape[-2:])
        if not len(images):
            raise ValueError("There are no images in this batch: images must be [B, C, H, W] with B at least 1.")
        if mask is None:
            keep = num_visible(grid, self.mask_ratio)
            mask = random_mask(images.shape[0], grid, self.mask_ratio, device=images.device)
        else:
            keep = check_mask(mask, images.shape[0], grid)
        return PackedLayout(mask, keep, device=images.device)

    def forward_features(self, images: Tensor) -> NoReturn:
        """Refused: an FCMAE sees the visible patches only."""
        raise ValueError("An FCMAE has no features of whole images: use `model.encoder.forward_features(images)`.")

    def forward_encoder(self, images: Tensor, layout: PackedLayout) -> Tensor:
        """Features of the visible patches, in `layout.ids` order: `[B, K, num_features]`."""
        x = self.encoder.forward_packed(layout.pack(images, self.stride), layout)
        return x.squeeze(-1).transpose(1, 2)

    def forward_decoder(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Decoded features of all patches, `[B, h * w, decoder_dim]`, from visible tokens `[B, K, num_features]`."""
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
        x = layout.unpack(x, self.mask_token.flatten())
        x = x.view(x.shape[0], *layout.grid, -1).permute(0, 3, 1, 2)
        return self.decoder(x).permute(0, 2, 3, 1).flatten(1, 2)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | PackedLayout | None = None,
        return_pred: bool = True,
        channels: Tensor | None = None,
    ) -> FCMAEOutput:
        """Masks, encodes, decodes, and compares the predicted patches with the image.

        Args:
            images: Float `[B, in_chans, H, W]`, H and W multiples of `stride`.
            mask: Bool `[B, h, w]`, True = removed, the same number in each image; random if None. A `PackedLayout`
                from `self.visible(images, mask)` is checked already, so that a compiled forward has static shapes and
                does not wait for the device.
            return_pred: Predict all patches; if False, only the removed ones, which the loss needs.
            channels: Bool `[B, in_chans]`, True = removed: such a channel is 0 at the input and excluded from the
                loss. Each image must keep at least one (`masking.random_channels`).
        """
        if channels is not None:
            if channels.dtype != torch.bool or channels.shape != images.shape[:2]:
                raise ValueError(
                    f"channels must be bool [B, in_chans] = {list(images.shape[:2])} (True = removed), got "
                    f"{channels.dtype} {list(channels.shape)}."
                )
            images = images.masked_fill(channels[:, :, None, None], 0)
        layout = mask if isinstance(mask, PackedLayout) else self.visible(images, mask)
        total = layout.grid[0] * layout.grid[1]
        if not 0 < layout.num_visible < total:
            raise ValueError(
                "The loss needs at least one visible and one masked patch in each image; this mask leaves "
                f"{layout.num_visible} of {total} visible. Use `model.encoder` for features of whole images."
            )
        x = self.forward_decoder(self.forward_encoder(images, layout), layout)
        weight, bias = self.pred.weight.flatten(1), self.pred.bias
        pred = F.linear(x, weight, bias) if return_pred else None
        pred_masked = F.linear(layout.take_masked(x), weight, bias) if pred is None else layout.take_masked(pred)

        dtype = torch.promote_types(images.dtype, torch.float32)
        pred_masked, target = pred_masked.to(dtype), layout.masked_patches(images, self.stride).to(dtype)
        if channels is not None:
            loss = channel_loss(pred_masked, target, channels, self.norm_pix_loss)
        else:
            loss = F.mse_loss(pred_masked, normalize_target(target)[0] if self.norm_pix_loss else target)
        return FCMAEOutput(loss, pred, layout.mask)
