#!/usr/bin/env python3
"""Object detection: torchvision's Faster R-CNN on a pretrained ConvNeXt V2, with the functions of this package.

    python examples/detection.py --model local-dir:output/demo/encoder
    python examples/detection.py --model hf-hub:USER/NAME --frozen

Trains a few steps on images with a black square or a white disc drawn into each, then looks for them in new
images. `build_detector` makes an ordinary detector of torchvision for a loop of your own; for images with annotations
in COCO's format, there is a command: `timm-convnextv2 detect train`.
"""

import argparse
import sys

import torch
from common import SHAPES, draw
from torchvision.ops import box_iou, masks_to_boxes

from timm_convnextv2.transfer import build_detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local-dir:FOLDER or hf-hub:USER/NAME")
    parser.add_argument("--frozen", action="store_true", help="train the pyramid and the heads only")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--img-size", type=int, default=48, help="of the images, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    fast = dict(out_channels=64, box_batch_size_per_image=64, rpn_post_nms_top_n_train=200)  # for a CPU
    detector = build_detector(args.model, 2, boxes_only=True, img_size=args.img_size, frozen=args.frozen, **fast)
    detector = detector.to(args.device)
    images, classes = draw(4 + args.steps * args.batch_size, args.img_size, detector.backbone.body.in_chans)
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
