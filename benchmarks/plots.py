"""What the figures of the benchmarks share."""

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["draw_seeds"]


def draw_seeds(
    axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, label: str
) -> list[float]:
    """Draws a curve a seed thin, and their median thick; returns the median.

    Args:
        axes: Of matplotlib.
        x: Of all curves.
        curves: A sequence of numbers a seed.
        colour: Of all of them.
        label: Of the median.
    """
    for curve in curves:
        axes.plot(x, curve, color=colour, alpha=0.35, linewidth=1)
    middle = [statistics.median(values) for values in zip(*curves, strict=True)]
    axes.plot(x, middle, color=colour, linewidth=2.5, label=label)
    return middle
