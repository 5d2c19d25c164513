"""What both tasks show: figures of what a model found in images, beside the truth; names in messages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.formats.files import printable
from ..files import whole_file
from ..report.images import displayable


def as_rgb(image: Tensor, *, stretch: bool = False) -> Tensor:
    """Float `[C, H, W]` as RGB `[H, W, 3]` in 0..1; values are stretched if `stretch` or if they lie outside."""
    shown = displayable(image[None], torch.zeros(len(image)), torch.ones(len(image)))[0]
    low, high = shown.min(), shown.max()
    return (shown - low) / (high - low).clamp(min=1e-9) if stretch or low < 0 or high > 1 else shown


def save_image(path: str | Path, image: Any) -> None:
    """Writes uint8 `[H, W, 3]` as a PNG; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        Image.fromarray(image).save(part, format="png")


def first(names: Iterable[Any], limit: int = 3) -> str:
    """The first of some names, for a message."""
    names = [printable(str(name)[:200]) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
