"""A segmenter: UPerNet on any backbone of timm; its folder on the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ...checkpoint.transfer import load_weights, read_transfer, write_transfer
from ..backbone import Backbone, create_backbone, open_backbone
from .heads import FCNHead, UPerHead, resize

IGNORE_INDEX = 255
AUXILIARY_WEIGHT = 0.4  # of mmsegmentation's configurations of UPerNet


class Segmenter(nn.Module):
    """UPerNet; made by `build_segmenter` and `open_segmenter`.

    Args:
        backbone: Its last four maps are read.
        num_classes: Classes, the background (where there is one) included.
        channels: Of the head.
        auxiliary_channels: Of the auxiliary head, which only trains; 0 for none.
        ignore_index: In the targets, of pixels without a class.
        classes: Names of the classes, '0', '1', ... if None.

    Attributes:
        classes: Names of the classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 512,
        auxiliary_channels: int = 256,
        ignore_index: int = IGNORE_INDEX,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2 (the background counts).")
        names = [str(i) for i in range(num_classes)] if classes is None else list(classes)
        if len(names) != num_classes:
            raise ValueError(f"There are {len(names)} names for {num_classes} classes.")
        self.backbone, self.classes, self.ignore_index = backbone, names, ignore_index
        self.sizes = dict(channels=channels, auxiliary_channels=auxiliary_channels)
        # a ConvNeXt's maps come without a norm; the official segmentation code adds the same ones
        self.norms = nn.ModuleList(LayerNorm2d(n) for n in backbone.channels)
        self.head = UPerHead(backbone.channels, num_classes, channels)
        self.auxiliary = FCNHead(backbone.channels[-2], num_classes, auxiliary_channels) if auxiliary_channels else None
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Losses in train mode, logits in eval mode.

        Args:
            images: Float `[B, C, H, W]`, as `data.load_image` gives them and uint8 divided by 255; any H and W. They
                are normalised here.
            targets: Classes of the pixels, int64 `[B, H, W]`; in train mode only.

        Returns:
            In train mode a dict of scalars: `loss_seg`, and `loss_aux` (weighted). In eval mode logits
            `[B, num_classes, H, W]`.

        Raises:
            ValueError: Train mode has no targets, or one image only (batch normalisation needs several).
        """
        if self.training and targets is None:
            raise ValueError("A segmenter in train mode takes images and targets; call eval() for logits.")
        if self.training and len(images) < 2:
            raise ValueError("A batch of one image cannot train a segmenter (batch normalisation); give two or more.")
        height, width = images.shape[-2:]
        stride = self.backbone.strides[-1]
        # whole patches, or a ConvNeXt would leave out what remains at the right and at the bottom
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
        """Cross-entropy, its mean over the pixels with a class; 0 where none has one."""
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)


def build_segmenter(
    name: str,
    num_classes: int,
    in_chans: int | None = None,
    *,
    pretrained: bool = True,
    frozen: bool = False,
    channels: int = 512,
    auxiliary_channels: int = 256,
    ignore_index: int = IGNORE_INDEX,
    classes: Sequence[str] | None = None,
    drop_path_rate: float | None = None,
    **kwargs: Any,
) -> Segmenter:
    """UPerNet on a backbone, which comes with its weights; the heads are random.

    Args:
        name: A model of timm, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        num_classes: Classes, the background (where there is one) included.
        in_chans: Channels of the images; the model's own if None.
        pretrained: Load the backbone's weights; else they are random.
        frozen: Train the heads only.
        channels: Of the head; the paper's 512.
        auxiliary_channels: Of the auxiliary head; 0 for none.
        ignore_index: In the targets, of pixels without a class.
        classes: Names of the classes.
        drop_path_rate: Of the backbone in training.
        kwargs: More of `timm.create_model`.

    Raises:
        ValueError: See `create_backbone` and `Segmenter`.
    """
    backbone = create_backbone(name, pretrained=pretrained, in_chans=in_chans, drop_path_rate=drop_path_rate, **kwargs)
    backbone.requires_grad_(not frozen)
    return Segmenter(
        backbone, num_classes, channels=channels, auxiliary_channels=auxiliary_channels, ignore_index=ignore_index,
        classes=classes,
    )  # fmt: skip


def export_segmenter(
    model: Segmenter,
    folder: str | Path,
    *,
    metrics: dict[str, Any] | None = None,
    dataset: str | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """Writes a folder that `open_segmenter` opens: config.json, model.safetensors and README.md.

    Args:
        model: The segmenter.
        folder: Made where it is missing; files of these names are replaced.
        metrics: On the validation images, see `Confusion.measures`; the README states them.
        dataset: Name of the data set that they were measured on.
        info: How it was made, for a table in the README.

    Returns:
        The folder.

    Raises:
        ValueError: A weight is not finite.
        WriteError: (an OSError) A file cannot be written.
    """
    config = dict(
        task="segmentation", classes=model.classes, backbone=model.backbone.record(),
        segmenter={**model.sizes, "ignore_index": model.ignore_index},
    )  # fmt: skip
    return write_transfer(folder, model, config, metrics=metrics, dataset=dataset, info=info)


def open_segmenter(folder: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter of a folder, in eval mode; needs this package, and no network.

    Args:
        folder: Written by `export_segmenter`, such as `model` in the folder of a run, or that of the run; or
            `hf-hub:USER/NAME`.
        device: Where it goes.

    Raises:
        ValueError: There is no such folder, or its files do not fit together.
    """
    place, config = read_transfer(folder, "segmentation")
    try:
        classes = config["classes"]
        model = Segmenter(open_backbone(config["backbone"]), len(classes), classes=classes, **config["segmenter"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"The segmenter in '{folder}' cannot be opened ({type(e).__name__}: {e}).") from e
    load_weights(model, place)
    return model.eval().to(device)
