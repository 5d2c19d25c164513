#!/usr/bin/env python3
"""Semantic segmentation: a feature pyramid and a small head on a pretrained ConvNeXt V2.

    python examples/segmentation.py --model local-dir:output/embedded/encoder
    python examples/segmentation.py --model hf-hub:USER/NAME --frozen

Trains a few steps on images with a black square or a white disc drawn into each, then prints the overlap (IoU) on new
images. For your own data take `build_segmenter`, which needs timm and torchvision only.
"""

import argparse
import sys

import timm
import torch
import torch.nn.functional as F
from common import SHAPES, draw
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.transforms import Normalize


class Segmenter(nn.Module):
    """Pyramid over the four feature maps, joined at the finest, one 3x3 convolution, classes; see `build_segmenter`."""

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int) -> None:
        super().__init__()
        config = timm.data.resolve_model_data_config(backbone)
        levels = backbone.feature_info.channels()
        self.stride = backbone.feature_info.reduction()[-1]
        self.normalize = Normalize(config["mean"], config["std"])
        self.backbone = backbone
        # a ConvNeXt's maps come without a norm, hence one in the pyramid; LayerNorm does not mind small batches
        self.pyramid = FeaturePyramidNetwork(levels, channels, norm_layer=LayerNorm2d)
        self.head = nn.Sequential(
            Conv2dNormActivation(len(levels) * channels, channels, norm_layer=LayerNorm2d),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes, H, W]` of float images `[B, C, H, W]` in 0..1, of any size."""
        height, width = images.shape[-2:]
        # whole patches, or a ConvNeXt would leave out what remains at the right and at the bottom
        x = F.pad(self.normalize(images), (0, -width % self.stride, 0, -height % self.stride))
        maps = self.pyramid({str(i): features for i, features in enumerate(self.backbone(x))}).values()
        finest = next(iter(maps)).shape[-2:]
        joined = torch.cat([F.interpolate(m, size=finest, mode="bilinear") for m in maps], dim=1)
        logits = F.interpolate(self.head(joined), size=x.shape[-2:], mode="bilinear")
        return logits[..., :height, :width]


def build_segmenter(backbone: nn.Module, num_classes: int, *, frozen: bool = False, channels: int = 128) -> Segmenter:
    """A network from float images `[B, C, H, W]` in 0..1 to logits `[B, num_classes, H, W]`, for any H and W.

    It normalises the images as in pretraining; C is the backbone's.

    Args:
        backbone: `timm.create_model(NAME, pretrained=True, features_only=True)`.
        num_classes: Number of classes, the background (where there is one) included.
        frozen: Train the pyramid and the head only.
        channels: Channels of the pyramid and the head.
    """
    return Segmenter(backbone.requires_grad_(not frozen), num_classes, channels)


@torch.inference_mode()
def overlap(segmenter: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> list[float]:
    """Intersection over union of each class."""
    found = segmenter.eval()(images).argmax(1)
    pairs = [(found == c, classes == c) for c in range(len(SHAPES))]
    return [((a & b).sum() / (a | b).sum().clamp(min=1)).item() for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local-dir:FOLDER or hf-hub:USER/NAME")
    parser.add_argument("--frozen", action="store_true", help="train the pyramid and the head only")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, help="of the images, in pixels (default: 5 times the stride)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from timm_convnextv2.checkpoint import load_model  # timm.create_model, and the proof that the weights were loaded

    torch.manual_seed(0)
    backbone = load_model(args.model, features_only=True)
    segmenter = build_segmenter(backbone, len(SHAPES), frozen=args.frozen, channels=32).to(args.device)
    in_chans, size = segmenter.backbone["stem_0"].in_channels, args.img_size or 5 * segmenter.stride
    images, classes = draw(32 + args.steps * args.batch_size, size, in_chans)
    images, classes = images.to(args.device), classes.to(args.device)

    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=1e-3)
    for step in range(args.steps):
        batch = slice(32 + step * args.batch_size, 32 + (step + 1) * args.batch_size)
        loss = F.cross_entropy(segmenter.train()(images[batch]), classes[batch])
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
