#!/usr/bin/env python3
"""Semantic segmentation: UPerNet on a pretrained ConvNeXt V2.

    python examples/segmentation.py --model local-dir:output/demo/encoder
    python examples/segmentation.py --model hf-hub:USER/NAME --frozen

Trains a few steps on images with a black square or a white disc drawn into each, then prints the overlap (IoU) on new
images. For your own images and masks there is a command, `timm-convnextv2 segment`; for a loop of your own, this page.
"""

import argparse
import sys

import torch
from common import SHAPES, draw
from torch import nn

from timm_convnextv2.transfer import build_segmenter
from timm_convnextv2.transfer.segmentation.metrics import Confusion


@torch.inference_mode()
def overlap(segmenter: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> list[float]:
    """Intersection over union of each class."""
    confusion = Confusion(len(SHAPES))
    confusion.add(segmenter.eval()(images).argmax(1), classes)
    return confusion.measures()["iou"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local-dir:FOLDER or hf-hub:USER/NAME")
    parser.add_argument("--frozen", action="store_true", help="train the heads only")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, help="of the images, in pixels (default: 5 times the stride)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    small = dict(channels=32, auxiliary_channels=32)  # for a CPU
    segmenter = build_segmenter(args.model, len(SHAPES), frozen=args.frozen, **small).to(args.device)
    backbone = segmenter.backbone
    size = args.img_size or 5 * backbone.strides[-1]
    images, classes = draw(32 + args.steps * args.batch_size, size, backbone.in_chans)
    images, classes = images.to(args.device), classes.to(args.device)

    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=1e-3)
    for step in range(args.steps):
        batch = slice(32 + step * args.batch_size, 32 + (step + 1) * args.batch_size)
        loss = sum(segmenter.train()(images[batch], classes[batch]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step + 1}/{args.steps}  loss {loss:.3f}")
    iou = overlap(segmenter, images[:32], classes[:32])
    print("IoU on 32 new images: " + ", ".join(f"{name} {x:.2f}" for name, x in zip(SHAPES, iou, strict=True)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
