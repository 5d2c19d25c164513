"""Label budgets: nested subsets of the training images, and the measures of features over the number of labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import Scoring
from .extract import SCORING
from .linear import accuracy_or_map, linear_probe, ridge
from .neighbours import knn_scores


def budget_sizes(budgets: Sequence[float], labels: Tensor) -> list[int]:
    """Numbers of training images, ascending; budgets up to 1 are shares of `labels`, larger ones counts.

    Refuses budgets with less than one image per class, and with more than there are.
    """
    total, sizes = len(labels), set()
    classes = len(labels.unique()) if labels.ndim == 1 else labels.shape[1]
    for budget in budgets:
        size = round(budget * total) if budget <= 1 else int(budget)
        if budget > 1 and size != budget:
            raise ValueError(
                f"--label-budgets {budget:g} is above 1, so it is a number of images: expected an integer."
            )
        if not classes <= size <= total:
            raise ValueError(
                f"--label-budgets {budget:g} is {size} of {total} training images; expected at least one per class, "
                f"{classes} or {classes / total:.2g}, and at most {total} or 1."
            )
        sizes.add(size)
    return sorted(sizes)


def nested_subsets(labels: Tensor, sizes: Sequence[int], seed: int = 0) -> dict[int, Tensor]:
    """Indices of training images by size, drawn by `seed`: a larger subset holds the smaller ones.

    Each has one image of every class, and beyond that the classes in proportion. Images with several labels
    (`[N, num_classes]`) are drawn without regard to them.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if labels.ndim == 1:
        position, quantile = torch.zeros(len(labels)), torch.zeros(len(labels))
        for label in labels.unique():
            members = order[labels[order] == label]
            position[members] = torch.arange(len(members)).float()
            quantile[members] = (torch.arange(len(members)) + 0.5) / len(members)
        key = torch.where(position > 0, quantile, quantile - 2)  # the first of each class come first
        order = order[key[order].argsort(stable=True)]
    return {size: order[:size].sort().values for size in sizes}


def over_budgets(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, sizes: Sequence[int], *, num_classes: int,
    scoring: Scoring = SCORING, device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:  # fmt: skip
    """kNN (the smallest `k`), ridge and linear probe by number of training images, on all test images.

    Returns `{"images": n, "measures": {"knn": {"value", "low", "high"}, ...}}` per size: mean, minimum and maximum
    over `scoring.budget_draws` subsets. All images are one subset.
    """
    found: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    for seed in range(scoring.seed, scoring.seed + scoring.budget_draws):
        for size, chosen in nested_subsets(train_labels, sizes, seed).items():
            if size == len(train) and found[size]:
                continue
            rows, labels = train[chosen], train_labels[chosen]
            k = min(scoring.k)
            near = knn_scores(
                rows.to(device), labels, test.to(device), [k], scoring.temperature, num_classes=num_classes
            )
            options: dict[str, Any] = {"num_classes": num_classes, "seed": seed}
            scores = {"knn": next(iter(near.values())), "ridge": ridge(rows, labels, test, **options)}
            if scoring.probe:
                scores["probe"] = linear_probe(rows, labels, test, device=device, **options)
            for name, value in scores.items():
                found[size].setdefault(name, []).append(accuracy_or_map(value.cpu(), test_labels))
    return [
        {"images": size, "measures": {key: _band(values) for key, values in of.items()}} for size, of in found.items()
    ]


def _band(values: list[float]) -> dict[str, float]:
    return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}
