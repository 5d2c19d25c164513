"""The histograms of the channels of a data set, as a PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .images import save_figure

if TYPE_CHECKING:
    from ..data.pixel_statistics import PixelStatistics

__all__ = ["save_histograms"]

_COLUMNS = 4


def save_histograms(found: "PixelStatistics", path: str | Path, title: str = "") -> None:
    """Draws the histogram of each channel with its mean, and its 1st and 99th percentile.

    Args:
        found: Of the pixels.
        path: PNG to write.
        title: Line above.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    columns = min(_COLUMNS, found.channels)
    rows = -(-found.channels // columns)
    figure = Figure(figsize=(max(4.5, 3 * columns), 0.5 + 2.2 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    low, high = found.percentile(1), found.percentile(99)
    for c, axis in enumerate(axes):
        if c >= found.channels:
            axis.set_visible(False)
            continue
        edges, counts = found.histogram(c)
        axis.stairs(counts / max(1, found.count[c]), edges, fill=True, color="#1f5fa8", alpha=0.75)
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.axvline(found.mean[c], color="black", linewidth=1, label="mean")
        for value, label in ((low[c], "p1, p99"), (high[c], None)):
            axis.axvline(value, color="#c0392b", linewidth=1, linestyle="--", label=label)
        axis.set_title(f"channel {c + 1}", fontsize=9)
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    for axis in axes[np.arange(len(axes)) % columns == 0]:
        axis.set_ylabel("share of pixels", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path)
