"""A segmenter: UPerNet on any backbone of timm, and the folder it is exported to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint.task_folder import open_task, write_task
from ...layers import LayerNorm2d
from ..backbone import Backbone, create_backbone, open_backbone
from .heads import FCNHead, UPerHead, resize

IGNORE_INDEX = 255
AUXILIARY_WEIGHT = 0.4  # from mmsegmentation's configurations of UPerNet


class Segmenter(nn.Module):
    """UPerNet; `num_classes` includes the background if there is one.

    The auxiliary head is used in training only, and not at all with 0 channels. `ignore_index` is the value of pixels
    without a class in the targets.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, num_classes: int, *, channels: int = 512, auxiliary_channels: int = 256,
        ignore_index: int = IGNORE_INDEX, classes: Sequence[str] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2 (the background counts).")
        names = [str(i) for i in range(num_classes)] if classes is None else list(classes)
        if len(names) != num_classes:
            raise ValueError(f"{len(names)} class names for {num_classes} classes.")
        self.backbone, self.classes, self.ignore_index = backbone, names, ignore_index
        self.sizes = dict(channels=channels, auxiliary_channels=auxiliary_channels)
        # ConvNeXt's maps are not normalised; the official segmentation code adds the same norms
        self.norms = nn.ModuleList(LayerNorm2d(n) for n in backbone.channels)
        self.head = UPerHead(backbone.channels, num_classes, channels)
        self.auxiliary = FCNHead(backbone.channels[-2], num_classes, auxiliary_channels) if auxiliary_channels else None
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Losses in train mode (`loss_seg`, and `loss_aux`, weighted), logits `[B, num_classes, H, W]` in eval mode.

        Images are float `[B, C, H, W]` in 0..1, of any size, normalised here; targets are classes, int64 `[B, H, W]`.
        """
        if self.training and targets is None:
            raise ValueError("A segmenter in train mode needs images and targets; call eval() for logits.")
        if self.training and len(images) < 2:
            raise ValueError("A segmenter cannot train on a batch of one image (batch normalisation); use two or more.")
        height, width = images.shape[-2:]
        stride = self.backbone.strides[-1]
        # pad to whole patches, or a ConvNeXt would ignore the rest at the right and at the bottom
        x = F.pad((images - self.mean) / self.std, (0, -width % stride, 0, -height % stride))
        maps = [norm(features) for norm, features in zip(self.norms, self.backbone(x), strict=True)]

        def full(logits: Tensor) -> Tensor:
            return resize(logits.float(), x.shape[-2:])[..., :height, :width]

        logits = full(self.head(maps))
        if targets is None or not self.training:
            return logits
        losses = {"loss_seg": self._loss(logits, targets)}
        if self.auxiliary is not None:
            losses["loss_aux"] = AUXILIARY_WEIGHT * self._loss(full(self.auxiliary(maps[-2])), targets)
        return losses

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the pixels with a class; 0 if there are none."""
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)


def build_segmenter(backbone: str | Backbone, num_classes: int, *, frozen: bool = False, **options: Any) -> Segmenter:
    """UPerNet with random heads on a backbone: a `Backbone`, or the name of a model with its weights.

    `frozen` trains the heads only; `options` are more arguments of `Segmenter`.
    """
    backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
    backbone.requires_grad_(not frozen)
    return Segmenter(backbone, num_classes, **options)


def export_segmenter(model: Segmenter, folder: str | Path, **about: Any) -> Path:
    """Writes a folder that `open_segmenter` reads; `about` has `metrics`, `dataset` and `info`, see `write_task`."""
    own = {**model.sizes, "ignore_index": model.ignore_index}
    config = dict(task="segmentation", classes=model.classes, backbone=model.backbone.record(), segmenter=own)
    return write_task(folder, model, config, **about)


def open_segmenter(folder: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """A segmenter that `export_segmenter` wrote, in eval mode; `folder` is RUN, RUN/model or `hf-hub:USER/NAME`."""

    def build(config: dict[str, Any]) -> Segmenter:
        classes = config["classes"]
        return Segmenter(open_backbone(config["backbone"]), len(classes), classes=classes, **config["segmenter"])

    return open_task(folder, "segmentation", build)[0].to(device)
