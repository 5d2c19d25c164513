"""Weighted nearest neighbours, as DINO evaluates frozen features (https://arxiv.org/abs/1805.01978, section 3.4)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import NEIGHBOURS, TEMPERATURE
from .extract import check_features

QUERIES = 1024  # test rows per step
MULTILABEL_NUMBERS = 2**24  # labels of neighbours gathered per step


def capped(k: Iterable[int], images: int) -> list[int]:
    """Numbers of neighbours of at least 1, capped at `images`, sorted and without duplicates."""
    wanted = list(k)
    if not wanted or min(wanted) < 1:
        raise ValueError(f"k is {wanted}, expected numbers of neighbours of at least 1.")
    return sorted({min(value, images) for value in wanted})


def nearest(train: Tensor, test: Tensor, k: int, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The `k` rows of `train` with the highest cosine similarity to each row of `test`, in descending order.

    Products are computed in blocks whose best are merged, so that memory is bounded by `chunk * chunk` numbers. Returns
    similarities float32 `[M, k]` and rows of `train` int64 `[M, k]`; k is at most N.
    """
    similarities, indices = [], []
    for part in test.split(chunk):
        queries = F.normalize(part.float(), dim=1)
        best, rows = queries.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long, device=part.device)
        for start in range(0, len(train), chunk):
            block = F.normalize(train[start : start + chunk].float(), dim=1)
            found, row = (queries @ block.T).topk(min(k, len(block)), dim=1)
            best, rows = torch.cat([best, found], 1), torch.cat([rows, row + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        similarities.append(best)
        indices.append(rows)
    return torch.cat(similarities), torch.cat(indices)


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, k: Sequence[int] = NEIGHBOURS, temperature: float = TEMPERATURE,
    *, num_classes: int | None = None, chunk: int = 8192
) -> dict[int, Tensor]:  # fmt: skip
    """Each class's fraction of the neighbours' votes, which are weighted by `exp(similarity / temperature)`.

    Features are `[N, D]` and `[M, D]`, labels int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several.
    Returns `{k: float32 [M, num_classes]}` by number of neighbours, `capped` at N. For `chunk` see `nearest`.
    """
    check_features(train, train_labels, test)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0.")
    labels = train_labels.to(train.device)
    several = labels.ndim == 2
    classes = num_classes or (labels.shape[1] if several else int(labels.max()) + 1)
    counts = capped(k, len(train))
    scores: dict[int, list[Tensor]] = {count: [] for count in counts}
    rows = min(chunk, QUERIES)
    if several:  # labels of all neighbours are gathered at once
        rows = max(1, min(rows, MULTILABEL_NUMBERS // (counts[-1] * classes)))
    for part in test.to(train.device).split(rows):
        similar, indices = nearest(train, part, counts[-1], chunk=chunk)
        weights = ((similar - 1) / temperature).exp()  # -1: the same proportions without overflow
        for count in counts:
            votes, near = weights[:, :count], labels[indices[:, :count]]
            if several:
                share = torch.einsum("mk,mkc->mc", votes, near.to(votes.dtype))
            else:
                share = votes.new_zeros(len(part), classes).scatter_add_(1, near, votes)
            scores[count].append(share / votes.sum(1, keepdim=True))
    return {count: torch.cat(parts) for count, parts in scores.items()}


def knn(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int = 20, temperature: float = TEMPERATURE, **more: Any
) -> Tensor:
    """The class with most votes, int64 `[M]`; `knn_scores` has the options, and scores for several `k`."""
    scores = knn_scores(train, train_labels, test, [k], temperature, **more)
    return next(iter(scores.values())).argmax(1)
