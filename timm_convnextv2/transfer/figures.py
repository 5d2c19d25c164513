"""Figures of what a model found in images, beside the truth."""

import torch
from torch import Tensor

from ..report.images import displayable


def as_rgb(image: Tensor, *, stretch: bool = False) -> Tensor:
    """Float `[C, H, W]` as RGB `[H, W, 3]` in 0..1; values are stretched if `stretch` or if they lie outside."""
    shown = displayable(image[None], torch.zeros(len(image)), torch.ones(len(image)))[0]
    low, high = shown.min(), shown.max()
    return (shown - low) / (high - low).clamp(min=1e-9) if stretch or low < 0 or high > 1 else shown
