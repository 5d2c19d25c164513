"""Figures of what a model found in images, beside the truth."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.images import displayable, save_figure


def as_rgb(image: Tensor, *, stretch: bool = False) -> Tensor:
    """Float `[C, H, W]` as RGB `[H, W, 3]` in 0..1; values are stretched if `stretch` or if they lie outside."""
    shown = displayable(image[None], torch.zeros(len(image)), torch.ones(len(image)))[0]
    low, high = shown.min(), shown.max()
    return (shown - low) / (high - low).clamp(min=1e-9) if stretch or low < 0 or high > 1 else shown


def save_rows(
    path: str | Path, rows: Sequence[Sequence[tuple[Any, str]]], size: tuple[float, float], title: str = "",
    legend: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Draws rows of images `[H, W, 3]` with their titles as a PNG of `size` inches; `legend` has matplotlib handles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, (image, text) in zip(axes.flat, chain(*rows), strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.axis("off")
        axis.set_title(text, fontsize=8, parse_math=False)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
