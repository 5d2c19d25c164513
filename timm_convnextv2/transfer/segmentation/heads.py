"""The UPerNet head of semantic segmentation, and the small auxiliary head that is trained with it.

Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding, 2018. The settings are those of
mmsegmentation's `UPerHead` and `FCNHead`, which produced ConvNeXt's results on ADE20K.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

BINS = (1, 2, 3, 6)  # grid sizes of the pooling
DROPOUT = 0.1  # fraction of channels dropped before the classifier


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes `[B, C, h, w]` bilinearly; corners are not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all maps, their fusion at the finest.

    `in_channels` are those of the maps, finest first.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), Conv2dNormActivation(coarsest, channels, 1)) for n in BINS
        )
        self.bottleneck = Conv2dNormActivation(coarsest + len(BINS) * channels, channels, 3)
        self.laterals = nn.ModuleList(Conv2dNormActivation(n, channels, 1) for n in finer)
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in finer)
        self.fuse = Conv2dNormActivation(len(in_channels) * channels, channels, 3)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `[B, num_classes, h, w]` at the size of the finest of the maps `[B, in_channels[i], h_i, w_i]`."""
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.pooled]
        x = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        levels = [x]
        for lateral, smooth, fine in reversed(list(zip(self.laterals, self.smooth, finer, strict=True))):
            x = lateral(fine) + resize(x, fine.shape[-2:])
            levels.insert(0, smooth(x))
        size = levels[0].shape[-2:]
        return self.classifier(self.fuse(torch.cat([resize(level, size) for level in levels], dim=1)))


class FCNHead(nn.Sequential):
    """One convolution and a classifier on one map `[B, in_channels, h, w]`: logits `[B, num_classes, h, w]`."""

    def __init__(self, in_channels: int, num_classes: int, channels: int) -> None:
        super().__init__(Conv2dNormActivation(in_channels, channels, 3), *_classifier(channels, num_classes))


def _classifier(channels: int, num_classes: int) -> nn.Sequential:
    last = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(nn.Dropout2d(DROPOUT), last)
