"""Small images with a line each on one page, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .images import save_figure

__all__ = ["save_contact_sheet"]

_COLUMNS = 8


def save_contact_sheet(images: Sequence[tuple[np.ndarray | None, str]], path: str | Path, title: str = "") -> None:
    """Draws images in rows of eight.

    Args:
        images: `(image, text)`; `[H, W, 3]` in [0, 1], None for one that cannot be shown.
        path: PNG to write.
        title: Line above.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(4, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.6 * columns, 0.4 + 1.9 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_visible(False)
    for axis, (image, text) in zip(axes, images, strict=False):
        axis.set_visible(True)
        if image is None:
            axis.set_aspect("equal")
            axis.plot([0, 1, None, 0, 1], [0, 1, None, 1, 0], color="#c0392b", linewidth=1)
        else:
            axis.imshow(image, interpolation="nearest", vmin=0, vmax=1)
        axis.set_title(text, fontsize=6)
    if title:
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path)
