"""Groups of images that each get a share of an epoch."""

from collections.abc import Sequence

import numpy as np
import torch

from ...seeds import mix

REPEAT = 1 << 32  # added to an image's epoch per repetition, see `Groups.order`
_MOST_WEIGHTS = 1000

Members = range | np.ndarray


class Groups:
    """Groups of images, and the share of an epoch that each gets.

    Within a group, images are drawn without replacement, one permutation of the group after another, across epochs. All
    draws are functions of seed, epoch and its length.

    Args:
        members: Indices of the images of each group, a range or int64.
        weights: How often an image of each group is drawn, relative to other groups.
        sources: Number of each group's source, from 0.
        source_weights: Share of each source, to which its groups are scaled; None: the sum of its images' weights.
    """

    def __init__(
        self,
        members: Sequence[Members],
        weights: Sequence[float],
        sources: Sequence[int] | None = None,
        source_weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.members, self.weights, self.source_weights = [*members], [*weights], source_weights
        self.sources = [*sources] if sources else [0] * len(self.members)
        self.names = [*names] or [f"group {g + 1}" for g in range(len(self.members))]
        self.sizes = np.array([len(group) for group in self.members], np.int64)
        if not self.sizes.all():
            name = self.names[int(np.argmin(self.sizes))]
            raise ValueError(f"{name}: all images are held out, so none can be drawn. Lower --holdout.")
        shares = self.sizes * np.asarray(self.weights, np.float64)
        if source_weights is not None:
            shares *= (np.asarray(source_weights, np.float64) / np.bincount(self.sources, shares))[self.sources]
        self.shares = shares / shares.sum()  # of an epoch

    def counts(self, epoch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws of each group in all earlier epochs, and in this one, int64 `[groups]`; totals follow the shares."""
        had, now = np.zeros(len(self.shares), np.int64), np.zeros(len(self.shares), np.int64)
        for number in range(epoch + 1):
            had += now
            due = self.shares * (length * (number + 1)) - had
            now = np.floor(due).clip(0).astype(np.int64)
            most_due_first = np.argsort(now - due, kind="stable")  # stable: the same on every machine
            lacking = length - int(now.sum())
            if lacking > 0:
                now[most_due_first[:lacking]] += 1
            while lacking < 0:  # a group that is ahead cannot give back, so the others wait for their share
                giving = [g for g in most_due_first[::-1] if now[g]][:-lacking]
                now[giving] -= 1
                lacking += len(giving)
        return had, now

    def order(self, seed: int, epoch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the images of an epoch, and their epochs for `PretrainDataset`, int64 `[length]`.

        The n-th repetition of an image within an epoch has `epoch + REPEAT * n`: another crop and mask.
        """
        had, now = self.counts(epoch, length)
        indices, epochs = [], []
        for g, group in enumerate(self.members):
            n, at, end = len(group), int(had[g]), int(had[g] + now[g])
            first_round = at // n
            while at < end:
                number = at // n
                generator = torch.Generator().manual_seed(mix(seed, -1 - g, number))
                rows = torch.randperm(n, generator=generator)[at % n : min(n, end - number * n)]
                rows = rows + group.start if isinstance(group, range) else torch.from_numpy(group[rows.numpy()])
                indices.append(rows)
                epochs.append(torch.full((len(rows),), epoch + REPEAT * (number - first_round)))
                at += len(rows)
        mixed = torch.randperm(length, generator=torch.Generator().manual_seed(mix(seed, epoch)))
        return torch.cat(indices)[mixed], torch.cat(epochs)[mixed]

    def without(self, held: np.ndarray) -> "Groups":
        """The same groups without these images (sorted indices); the others are renumbered."""

        def kept(group: Members) -> Members:
            if isinstance(group, range):
                start, stop = (at - int(np.searchsorted(held, at)) for at in (group.start, group.stop))
                return range(start, stop)
            left = group[~np.isin(group, held)]
            return left - np.searchsorted(held, left)

        members = [kept(group) for group in self.members]
        return Groups(members, self.weights, self.sources, self.source_weights, self.names)

    def lines(self, length: int) -> list[str]:
        """One line per group: its images, its share, and the draws of each image per epoch."""
        rates = self.shares * length / self.sizes
        return [
            f"{name}: {n} images, {share:.1%} of an epoch, each drawn {rate:.3g} times per epoch"
            for name, n, share, rate in zip(self.names, self.sizes, self.shares, rates, strict=True)
        ]


def sampling_groups(
    counts: Sequence[int], source_weights: Sequence[float] | None, weights: np.ndarray | None, names: Sequence[str] = ()
) -> Groups | None:
    """One group per source, or per weight (one number per image) in a source; None without any weights."""
    if source_weights is None and weights is None:
        return None
    if source_weights is not None:
        if len(source_weights) != len(counts):
            raise ValueError(
                f"--source-weights takes one number per source (--data-list, or --data-dir without it), got "
                f"{len(source_weights)} for {len(counts)} sources."
            )
        if not all(0 < w < float("inf") for w in source_weights):
            raise ValueError(f"--source-weights must be above 0, got {' '.join(map(str, source_weights))}.")
    members: list[Members] = []
    each: list[float] = []
    sources: list[int] = []
    names, labels, first = [*names] or [f"source {s + 1}" for s in range(len(counts))], [], 0
    for s, count in enumerate(counts):
        own = np.ones(1) if weights is None else weights[first : first + count]
        values, which = np.unique(own, return_inverse=True)
        if len(members) + len(values) > _MOST_WEIGHTS:
            raise ValueError(
                f"The images have more than {_MOST_WEIGHTS} different weights, expected at most so many groups. Round "
                "the weights in the list, for example to two digits."
            )
        if len(values) == 1:
            members.append(range(first, first + count))
        else:
            members += np.split(first + np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        each += values.tolist()
        sources += [s] * len(values)
        labels += [names[s] if len(values) == 1 else f"{names[s]}, weight {value:g}" for value in values]
        first += count
    return Groups(members, each, sources, source_weights, labels)
