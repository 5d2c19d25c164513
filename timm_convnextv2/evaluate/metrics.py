"""How good scores of classes are, and how sure that is."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "bootstrap", "goodness"]


class Estimate(NamedTuple):
    """A measure, and the 95 % interval of its bootstrap over test images; without one, all three are the measure."""

    value: float
    low: float
    high: float


def goodness(scores: Tensor, labels: Tensor) -> float:
    """Accuracy, or mean average precision where images have several labels; 0 to 1.

    Args:
        scores: `[M, num_classes]`.
        labels: int64 `[M]`, or 0 and 1 `[M, num_classes]`.
    """
    labels = labels.to(scores.device)
    if labels.ndim == 1:
        return float((scores.argmax(1) == labels).double().mean())
    return _mean_average_precision(scores, labels)


def _mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Over the classes that at least one image has; NaN where none has one."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = labels.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device).unsqueeze(1)
    positives = hits.sum(0)
    average = (precision * hits).sum(0) / positives
    return float(average[positives > 0].mean())


def bootstrap(scores: Tensor, labels: Tensor, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """`goodness` with its 95 % interval over test images, which are drawn anew, with replacement, `draws` times.

    The interval tells what another sample of test images would change; not what another training would.

    Args:
        scores: `[M, num_classes]`.
        labels: int64 `[M]`, or 0 and 1 `[M, num_classes]`.
        draws: How often; of several labels a tenth of that, which takes longer.
        seed: Of the draws: the same for all models, which are so compared on the same images.
    """
    scores, labels = scores.cpu(), labels.cpu()
    value, n = goodness(scores, labels), len(labels)
    generator = torch.Generator().manual_seed(seed)
    if labels.ndim == 1:
        right = (scores.argmax(1) == labels).double()
        found = [float(right[torch.randint(n, (n,), generator=generator)].mean()) for _ in range(draws)]
    else:
        picks = [torch.randint(n, (n,), generator=generator) for _ in range(max(draws // 10, 1))]
        found = [goodness(scores[pick], labels[pick]) for pick in picks]
    low, high = torch.tensor(found, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(value, low, high)
