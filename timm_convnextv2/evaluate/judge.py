"""All measures of one set of features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .knn import NEIGHBOURS, TEMPERATURE, knn_scores
from .linear import linear_probe, ridge
from .metrics import Estimate, bootstrap
from .rank import rankme

__all__ = ["judge"]


def judge(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    probe: bool = True,
    seed: int = 0,
    draws: int = 1000,
    device: str | torch.device = "cpu",
) -> dict[str, Estimate]:
    """kNN, ridge, linear probe and rank of frozen features.

    Args:
        train: Features `[N, D]`.
        train_labels: int64 `[N]`, or 0 and 1 `[N, num_classes]` where an image has several labels.
        test: Features `[M, D]`.
        test_labels: Likewise.
        num_classes: Number of classes.
        k: Numbers of neighbours, capped at N.
        temperature: See `knn_scores`.
        probe: Train the linear probe too, which takes the longest.
        seed: Of all that is drawn.
        draws: Of the bootstrap.
        device: Where neighbours are looked for and the probe is trained.

    Returns:
        By name, in this order: `knn_10`, `knn_20`, ... (`k` as capped), `ridge`, `probe`, `rank`. Accuracy 0 to 1, or
        mean average precision where images have several labels; `rank` is that of the test features, see `rankme`.

    Raises:
        ValueError: Features with NaN or infinity, shapes that do not fit, or a single class.
    """
    near = knn_scores(
        train.to(device), train_labels, test.to(device), k, temperature, num_classes=num_classes
    )  # fmt: skip
    scores = {f"knn_{count}": share for count, share in near.items()}
    scores["ridge"] = ridge(train, train_labels, test, num_classes=num_classes, seed=seed)
    if probe:
        scores["probe"] = linear_probe(train, train_labels, test, num_classes=num_classes, seed=seed, device=device)
    found = {name: bootstrap(value, test_labels, draws=draws, seed=seed) for name, value in scores.items()}
    rank = rankme(test)
    return {**found, "rank": Estimate(rank, rank, rank)}
