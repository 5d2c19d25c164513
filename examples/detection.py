#!/usr/bin/env python3
"""Object detection: torchvision's Faster R-CNN on a pretrained ConvNeXt V2.

    python examples/detection.py --model local-dir:output/embedded/encoder
    python examples/detection.py --model hf-hub:USER/NAME --frozen

Trains a few steps on images with a black square or a white disc drawn into each, then looks for them in new
images. For your own data take `build_detector`, which needs timm and torchvision only.
"""

import argparse
import sys
from typing import Any

import timm
import torch
from common import SHAPES, draw
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign, box_iou, masks_to_boxes


def build_detector(
    backbone: nn.Module,
    num_classes: int,
    *,
    frozen: bool = False,
    out_channels: int = 256,
    min_size: int | None = None,
    max_size: int | None = None,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid on the four stages of a backbone.

    It is called as torchvision's are: images are a list of float `[C, H, W]` in 0..1 of any sizes, C the backbone's;
    it normalises them as in pretraining. Labels are 1..num_classes, 0 is the background.

    Args:
        backbone: `timm.create_model(NAME, pretrained=True, features_only=True)`.
        num_classes: Classes of objects.
        frozen: Train the pyramid and the heads only.
        out_channels: Channels of the pyramid.
        min_size: Pixels that the shorter side is resized to; 25 times the backbone's stride if None (800 for 32).
        max_size: Limit for the longer side; 42 times the stride if None.
        options: More of FasterRCNN's (`box_score_thresh`, ...).

    Raises:
        ValueError: The backbone has strides that are not powers of two.
    """
    backbone.requires_grad_(not frozen)
    strides = backbone.feature_info.reduction()  # [4, 8, 16, 32]; with patch_size=1 [1, 2, 4, 8]
    if any(stride & (stride - 1) for stride in strides):
        raise ValueError(f"The backbone has strides {strides}; torchvision's RoIAlign takes powers of two only.")
    # the names of the modules whose outputs are the feature maps; what torchvision runs is the same chain of modules
    levels = backbone.return_layers
    # a ConvNeXt's maps come without a norm, hence one in the pyramid; LayerNorm does not mind small batches
    channels = backbone.feature_info.channels()
    pyramid = BackboneWithFPN(backbone, levels, channels, out_channels, norm_layer=LayerNorm2d)
    sizes = [8 * stride for stride in (*strides, 2 * strides[-1])]  # the pyramid adds a map of twice the stride
    config = timm.data.resolve_model_data_config(backbone)
    return FasterRCNN(
        pyramid,
        num_classes + 1,
        min_size=min_size or 25 * strides[-1],
        max_size=max_size or 42 * strides[-1],
        size_divisible=strides[-1],
        image_mean=config["mean"],
        image_std=config["std"],
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(list(levels.values()), output_size=7, sampling_ratio=2),
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local-dir:FOLDER or hf-hub:USER/NAME")
    parser.add_argument("--frozen", action="store_true", help="train the pyramid and the heads only")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--img-size", type=int, default=48, help="of the images, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from timm_convnextv2.checkpoint import load_model  # timm.create_model, and the proof that the weights were loaded

    torch.manual_seed(0)
    backbone = load_model(args.model, features_only=True)
    size = dict(min_size=args.img_size, max_size=args.img_size)
    fast = dict(out_channels=64, box_batch_size_per_image=64, rpn_post_nms_top_n_train=200)  # for a CPU
    detector = build_detector(backbone, 2, frozen=args.frozen, **size, **fast).to(args.device)
    in_chans = detector.backbone.body["stem_0"].in_channels
    images, classes = draw(4 + args.steps * args.batch_size, args.img_size, in_chans)
    images = list(images.to(args.device))
    targets = [dict(boxes=masks_to_boxes(mask[None] > 0), labels=mask.max()[None]) for mask in classes.to(args.device)]

    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=5e-4)
    for step in range(args.steps):
        batch = slice(4 + step * args.batch_size, 4 + (step + 1) * args.batch_size)
        loss = sum(detector(images[batch], targets[batch]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step + 1}/{args.steps}  loss {loss:.3f}")

    with torch.inference_mode():
        found = detector.eval()(images[:4])
    for target, boxes in zip(targets[:4], found, strict=True):
        text = "nothing found"
        if len(boxes["boxes"]):  # the most likely one is first
            iou = box_iou(boxes["boxes"][:1], target["boxes"]).item()
            text = f"found a {SHAPES[boxes['labels'][0]]}, score {boxes['scores'][0]:.2f}, IoU {iou:.2f}"
        print(f"new image with a {SHAPES[target['labels'][0]]}: {text}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
