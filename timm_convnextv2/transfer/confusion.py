"""The measures of segmentation, from counts that are exact over batches and processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Confusion"]


class Confusion:
    """Counts of pixels by true and predicted class.

    Args:
        num_classes: Number of classes.
        ignore_index: Target of pixels that do not count.

    Attributes:
        counts: int64 `[true class, predicted class]`, on the CPU.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, targets: Tensor) -> None:
        """Counts pixels: classes of any equal shapes."""
        counted = targets != self.ignore_index
        pairs = targets[counted].long() * self.num_classes + predicted[counted].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.num_classes**2).view_as(self.counts)

    def join(self, others: Sequence[Tensor]) -> "Confusion":
        """Takes the sum of these counts, such as those of all processes, instead of its own."""
        self.counts = torch.stack(list(others)).sum(0)
        return self

    def measures(self) -> dict[str, Any]:
        """`miou`, the mean IoU over the classes that are in the targets or the predictions; `accuracy` of the pixels;
        `mean_accuracy` over the classes in the targets; `iou`, a number a class, None of those in neither.

        Raises:
            ValueError: No pixel was counted.
        """
        counts = self.counts.double()
        if not counts.sum():
            raise ValueError("No pixel has a class (all are the ignore index), so that nothing can be measured.")
        hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = true + found - hits
        iou = hits / union
        return {
            "miou": float(iou[union > 0].mean()),
            "accuracy": float(hits.sum() / counts.sum()),
            "mean_accuracy": float((hits / true)[true > 0].mean()),
            "iou": [float(x) if n else None for x, n in zip(iou, union, strict=True)],
        }
