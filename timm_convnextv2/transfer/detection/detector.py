"""Detectors: torchvision's Mask R-CNN and Faster R-CNN with a feature pyramid on the stages of any timm model.

detector = build_detector("local-dir:runs/mine/encoder", num_classes=20)
losses = detector(images, targets)       in train mode, as torchvision's detectors

detector = open_detector("output/run/model")      what `timm-convnextv2 detect train` exports
"""

import inspect
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ...checkpoint.transfer import load_weights, read_transfer, write_transfer
from ...console import closest
from ..backbone import Backbone, create_backbone, open_backbone


class Pyramid(nn.Module):
    """A feature pyramid on the maps of a backbone, and one coarser map.

    Args:
        backbone: See there.
        out_channels: Channels of all maps.
    """

    def __init__(self, backbone: Backbone, out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = backbone, out_channels
        # a ConvNeXt's maps come without a norm, hence one in the pyramid; LayerNorm does not mind small batches
        self.fpn = FeaturePyramidNetwork(
            backbone.channels, out_channels, extra_blocks=LastLevelMaxPool(), norm_layer=LayerNorm2d
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name, '0' the finest: `[B, out_channels, h, w]` each."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def build_detector(
    backbone: str | Backbone,
    num_classes: int,
    *,
    boxes_only: bool = False,
    img_size: int | None = None,
    in_chans: int | None = None,
    pretrained: bool = True,
    drop_path_rate: float | None = None,
    frozen: bool = False,
    out_channels: int = 256,
    min_size: int | None = None,
    max_size: int | None = None,
    **options: Any,
) -> FasterRCNN:
    """Mask R-CNN, or Faster R-CNN, with a feature pyramid on the last four stages of a backbone.

    It is called as torchvision's are: images are a list of float `[C, H, W]` in 0..1 of any sizes, C the backbone's; it
    normalises them as in pretraining and resizes them. Labels are 1..num_classes, 0 is the background.

    Args:
        backbone: A model of timm, `local-dir:FOLDER`, `hf-hub:USER/NAME`; or a `Backbone`.
        num_classes: Classes of objects.
        boxes_only: Faster R-CNN, which finds boxes and no masks.
        img_size: Pixels that the longer side is resized to, in place of `min_size` and `max_size`.
        in_chans: Channels of the images; the model's own if None.
        pretrained: Load the backbone's weights.
        drop_path_rate: Of the backbone in training.
        frozen: Train the pyramid and the heads only.
        out_channels: Channels of the pyramid.
        min_size: Pixels that the shorter side is resized to; 25 times the backbone's stride if None (800 for 32).
        max_size: Limit for the longer side; 42 times the stride if None.
        options: More of torchvision's `MaskRCNN` or `FasterRCNN` (`box_score_thresh`, ...).

    Raises:
        ValueError: The model cannot be had, or has strides that RoIAlign cannot take.
    """
    _check_options(options)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1.")
    if isinstance(backbone, str):
        backbone = create_backbone(backbone, pretrained=pretrained, in_chans=in_chans, drop_path_rate=drop_path_rate)
    elif in_chans not in (None, backbone.in_chans) or drop_path_rate is not None:
        raise ValueError("in_chans and drop_path_rate are those of the Backbone: give them to create_backbone.")
    backbone.requires_grad_(not frozen)
    strides = backbone.strides  # [4, 8, 16, 32]; with patch_size=1 [1, 2, 4, 8]
    if any(stride & (stride - 1) for stride in strides):
        raise ValueError(
            f"The backbone has strides {strides}; torchvision's RoIAlign takes powers of two only. Take an encoder "
            "with another --patch-size."
        )
    if img_size is not None:
        min_size = max_size = img_size
    pyramid = Pyramid(backbone, out_channels)
    sizes = [8 * stride for stride in (*strides, 2 * strides[-1])]  # the pyramid adds a map of twice the stride
    names = [str(i) for i in range(len(strides))]
    settings: dict[str, Any] = dict(
        min_size=min_size or 25 * strides[-1],
        max_size=max_size or 42 * strides[-1],
        size_divisible=strides[-1],
        image_mean=backbone.mean,
        image_std=backbone.std,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        **options,
    )
    if not boxes_only:
        settings["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    detector = (FasterRCNN if boxes_only else MaskRCNN)(pyramid, num_classes + 1, **settings)
    made_of: Any = dict(
        num_classes=num_classes, boxes_only=boxes_only, out_channels=out_channels,
        min_size=settings["min_size"], max_size=settings["max_size"], options=options,
    )  # fmt: skip
    detector.made_of = made_of  # what `open_detector` needs
    return detector


def _check_options(options: dict[str, Any]) -> None:
    """Refuses options that torchvision does not have: it takes any, and ignores what it does not know."""
    known = {*inspect.signature(FasterRCNN).parameters, *inspect.signature(MaskRCNN).parameters}
    known |= {"fixed_size", "_skip_resize"}  # of its transform
    for name in options:
        if name not in known:
            raise ValueError(f"torchvision's detectors have no option {name}.{closest(name, known)}")


def export_detector(
    detector: FasterRCNN,
    folder: str | os.PathLike,
    *,
    classes: Sequence[str],
    metrics: dict[str, float] | None = None,
    dataset: str | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """Writes a detector as a folder that `open_detector` reads: `config.json`, `model.safetensors`, `README.md`.

    Args:
        detector: From `build_detector`.
        folder: Where to; it is made if needed.
        classes: Names of the labels 1, 2, ...
        metrics: On the validation images, see `average_precision`; the README states them.
        dataset: Name of the data set that they were measured on.
        info: How it was made, for a table in the README.

    Raises:
        ValueError: The names are not as many as the classes, or a weight is not finite.
        WriteError: (an OSError) A file cannot be written.
    """
    made_of: dict[str, Any] = {**detector.made_of}  # pyright: ignore
    if len(classes) != made_of["num_classes"]:
        raise ValueError(f"{len(classes)} names of classes for a detector of {made_of['num_classes']}.")
    config = dict(
        task="detection", classes=list(classes), backbone=backbone_of(detector).record(), detector=made_of
    )  # fmt: skip
    return write_transfer(folder, detector, config, metrics=metrics, dataset=dataset, info=info)


def backbone_of(detector: FasterRCNN) -> Backbone:
    """The backbone below the pyramid."""
    pyramid: Any = detector.backbone
    return pyramid.body


def open_detector(folder: str | os.PathLike) -> FasterRCNN:
    """A detector that `export_detector` wrote, in eval mode on the CPU.

    Args:
        folder: Its folder, that of the run (RUN or RUN/model), or `hf-hub:USER/NAME`.

    Raises:
        ValueError: The folder has none, or its files do not fit each other.
    """
    place, config = read_transfer(folder, "detection")
    try:
        made_of = dict(config["detector"])
        options = made_of.pop("options")
        detector = build_detector(open_backbone(config["backbone"]), **made_of, **options)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"The detector in '{folder}' cannot be opened ({type(e).__name__}: {e}).") from e
    load_weights(detector, place)
    return detector.eval()


def classes_of(folder: str | os.PathLike) -> list[str]:
    """Names of the labels 1, 2, ... of a detector that `export_detector` wrote.

    Raises:
        ValueError: The folder has none.
    """
    return list(read_transfer(folder, "detection")[1]["classes"])
