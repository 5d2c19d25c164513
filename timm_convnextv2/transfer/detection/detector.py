"""Detectors: torchvision's Mask R-CNN and Faster R-CNN with a feature pyramid on the stages of any timm model.

detector = build_detector("local-dir:runs/mine/encoder", num_classes=20)
losses = detector(images, targets)       in train mode, as torchvision's detectors
"""

import inspect
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ...checkpoint.task_folder import open_task, write_task
from ...console import closest
from ...layers import LayerNorm2d
from ...runs.device import check_device
from ..backbone import Backbone, create_backbone, open_backbone


class Pyramid(nn.Module):
    """A feature pyramid on the maps of a backbone, and one coarser map; all have `out_channels` channels."""

    def __init__(self, backbone: Backbone, out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = backbone, out_channels
        # ConvNeXt's maps are not normalised, so the pyramid has a norm; LayerNorm works with small batches
        more: Any = dict(extra_blocks=LastLevelMaxPool(), norm_layer=LayerNorm2d)
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels, **more)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name, '0' is the finest: `[B, out_channels, h, w]` each."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def build_detector(
    backbone: str | Backbone, num_classes: int, *, boxes_only: bool = False, img_size: int | None = None,
    frozen: bool = False, out_channels: int = 256, min_size: int | None = None, max_size: int | None = None,
    **options: Any
) -> FasterRCNN:  # fmt: skip
    """Mask R-CNN, or Faster R-CNN, with a feature pyramid on the last four stages of a backbone.

    It is called like torchvision's detectors: images are a list of float `[C, H, W]` in 0..1 of any sizes. It
    normalises them as in pretraining and resizes them. Labels are 1..num_classes, 0 is the background.

    Args:
        backbone: A `Backbone`, or the name of a model with its weights, see `create_backbone`.
        img_size: Pixels that the longer side is resized to, instead of `min_size` and `max_size`.
        frozen: Train the pyramid and the heads only.
        min_size: Pixels that the shorter side is resized to; 25 times the backbone's stride if None (800 for 32).
        max_size: Limit of the longer side; 42 times the stride if None.
        options: More options of torchvision's `MaskRCNN` or `FasterRCNN` (`box_score_thresh`, ...).
    """
    known = {*inspect.signature(FasterRCNN).parameters, *inspect.signature(MaskRCNN).parameters}
    known |= {"fixed_size", "_skip_resize"}  # options of its transform
    for name in sorted(options.keys() - known):  # torchvision silently ignores them
        raise ValueError(f"torchvision's detectors have no option {name}.{closest(name, known)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1.")
    backbone = create_backbone(backbone) if isinstance(backbone, str) else backbone
    backbone.requires_grad_(not frozen)
    strides = backbone.strides  # [4, 8, 16, 32]; with patch_size=1 [1, 2, 4, 8]
    if any(stride & (stride - 1) for stride in strides):
        raise ValueError(
            f"The backbone has strides {strides}; torchvision's RoIAlign supports powers of two only. Use an encoder "
            "with another --patch-size."
        )
    min_size, max_size = img_size or min_size or 25 * strides[-1], img_size or max_size or 42 * strides[-1]
    sizes = [8 * stride for stride in (*strides, 2 * strides[-1])]  # the pyramid adds a map of twice the stride
    names = [str(i) for i in range(len(strides))]
    settings: dict[str, Any] = dict(
        min_size=min_size, max_size=max_size, size_divisible=strides[-1], image_mean=backbone.mean,
        image_std=backbone.std, box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes)), **options
    )  # fmt: skip
    if not boxes_only:
        settings["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    kind: Any = FasterRCNN if boxes_only else MaskRCNN
    detector = kind(Pyramid(backbone, out_channels), num_classes + 1, **settings)
    sizes = dict(out_channels=out_channels, min_size=min_size, max_size=max_size)
    detector.made_of = dict(num_classes=num_classes, boxes_only=boxes_only, **sizes, options=options)  # for the export
    return detector


def export_detector(detector: Any, folder: str | os.PathLike, *, classes: Sequence[str], **about: Any) -> Path:
    """Writes a folder that `open_detector` reads; `about` has `metrics`, `dataset` and `info`, see `write_task`.

    `classes` are the names of the labels 1, 2, ...
    """
    if len(classes) != detector.made_of["num_classes"]:
        raise ValueError(f"{len(classes)} class names for a detector of {detector.made_of['num_classes']} classes.")
    record = detector.backbone.body.record()
    config = dict(task="detection", classes=list(classes), backbone=record, detector=dict(detector.made_of))
    return write_task(folder, detector, config, **about)


def open_detector(folder: str | os.PathLike) -> FasterRCNN:
    """A detector that `export_detector` wrote, in eval mode; `folder` is RUN, RUN/model or `hf-hub:USER/NAME`."""
    return open_with_classes(folder)[0]


def open_with_classes(folder: str | os.PathLike) -> tuple[Any, list[str]]:
    """The same, with the names of the labels 1, 2, ..."""

    def build(config: dict[str, Any]) -> FasterRCNN:
        made_of = dict(config["detector"])
        options = made_of.pop("options")
        return build_detector(open_backbone(config["backbone"]), **made_of, **options)

    return open_task(folder, "detection", build)


def open_exported(name: str, device: str, nodata: float | None) -> tuple[Any, list[str]]:
    """The same on a device; `nodata` replaces the value that its backbone records unless it is None."""
    where = check_device(device)
    detector, classes = open_with_classes(name)
    detector.backbone.body.read_with(nodata)
    return detector.to(where), classes
