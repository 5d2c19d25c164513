"""Weighted sampling: shares are kept, images come round after round, and everything is a function of seed and epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from drawn import Numbers

from timm_convnextv2.data import EpochBatchSampler, hold_out
from timm_convnextv2.data.sources.groups import REPEAT, Groups, sampling_groups


def drawn(groups, epochs, length, seed=3):
    """Indices by epoch."""
    return [groups.order(seed, epoch, length)[0].tolist() for epoch in range(epochs)]


@pytest.mark.parametrize(
    "counts, weights", [((90, 10), (1, 1)), ((1, 1000, 30), (2, 1, 5)), ((50, 50), (1, 1e-3)), ((5, 7), (7, 5))]
)
def test_shares_and_rounds(counts, weights):
    groups, length = sampling_groups(counts, weights, None), 64
    seen, borders = Counter(), np.cumsum([0, *counts])
    for epoch, indices in enumerate(drawn(groups, 40, length), 1):
        assert len(indices) == length
        seen.update(indices)
        for g in range(len(counts)):
            times = [seen[i] for i in range(borders[g], borders[g + 1])]
            assert max(times) - min(times) <= 1  # no image again before each has come
            assert abs(sum(times) - epoch * length * groups.shares[g]) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_places_follow_any_shares(seed):
    rng = np.random.default_rng(seed)
    shares = rng.pareto(0.5, 300) + 1e-6  # a few have most, many less than a place an epoch
    groups = Groups([range(g, g + 1) for g in range(300)], shares)
    for epoch in (0, 1, 17, 100):
        had, now = groups.counts(epoch, 50)
        assert now.sum() == 50 and now.min() >= 0 and had.sum() == 50 * epoch
        assert np.abs(had + now - groups.shares * 50 * (epoch + 1)).max() < 1.5


def test_weights_of_a_list():
    weights = np.array([1.0, 3, 1, 3, 1, 1])
    groups = sampling_groups((4, 2), None, weights)
    assert [[*group] for group in groups.members] == [[0, 2], [1, 3], [4, 5]]
    seen = Counter(i for epoch in drawn(groups, 50, 6) for i in epoch)
    assert [seen[i] for i in range(6)] == [30, 90, 30, 90, 30, 30]
    half = sampling_groups((4, 2), (1, 1), weights)  # and both sources alike
    assert half.shares.tolist() == [1 / 8, 3 / 8, 1 / 2]
    assert half.names == ["source 1, weight 1", "source 1, weight 3", "source 2"]
    assert half.lines(8)[1] == "source 1, weight 3: 2 images, 37.5% of an epoch, each drawn 1.5 times per epoch"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_of_processes_and_of_a_resumed_run(world):
    groups = sampling_groups((7, 40), (3, 1), None)
    whole = EpochBatchSampler(47, 8, 1, groups=groups)
    whole.set_epoch(2)
    expected = [*whole]
    assert len(expected) == 5 and len(expected[0]) == 8
    ranks = [EpochBatchSampler(47, 8 // world, 1, rank, world, groups) for rank in range(world)]
    for start in (0, 3):
        for rank in ranks:
            rank.set_epoch(2, start)
        for batch, *shares in zip(expected[start:], *ranks, strict=True):
            assert batch == [item for items in zip(*shares, strict=True) for item in items]
    keys = [key for batch in expected for key in batch]
    assert len({*keys}) == len(keys)  # an image that comes again has another epoch, and so another crop
    assert {epoch % REPEAT for epoch, _ in keys} == {2} and max(epoch for epoch, _ in keys) >= 2 + 3 * REPEAT
    whole.set_epoch(3)
    assert [*whole] != expected


def test_without_weights_the_order_is_a_permutation():
    sampler = EpochBatchSampler(10, 2, 5)
    assert [*sampler] == [[(0, 7), (0, 3)], [(0, 2), (0, 1)], [(0, 6), (0, 8)], [(0, 0), (0, 9)], [(0, 5), (0, 4)]]
    assert sampling_groups((3, 4), None, None) is None


def test_held_out_images_are_never_drawn():
    source = Numbers(50)
    source.groups = sampling_groups((30, 20), (1, 4), np.where(np.arange(50) % 3, 1.0, 2.0))  # 2: every third image
    train, apart = hold_out(source, 0.2, 0)
    held = {apart[i] for i in range(len(apart))}
    seen = Counter(train[i] for epoch in drawn(train.groups, 20, 40) for i in epoch)
    assert {*seen} == {*range(50)} - held
    assert sum(count for i, count in seen.items() if i >= 30) == pytest.approx(20 * 40 * 4 / 5, abs=1)
    heavy, light = ([n for i, n in seen.items() if i < 30 and (i % 3 == 0) == which] for which in (True, False))
    assert np.mean(heavy) == pytest.approx(2 * np.mean(light), rel=0.1)
    assert apart.groups is None


@pytest.mark.parametrize(
    "counts, source_weights, weights, message",
    [
        ((3, 4), (1,), None, "--source-weights .* got 1 for 2 sources"),
        ((3, 4), (1, 0), None, "above 0, got 1 0"),
        ((3, 4), (1, float("nan")), None, "above 0"),
        ((2000,), None, np.arange(1.0, 2001), "more than 1000 different weights"),
    ],
)
def test_weights_that_are_refused(counts, source_weights, weights, message):
    with pytest.raises(ValueError, match=message):
        sampling_groups(counts, source_weights, weights)


def test_ranges_stay_ranges():
    with pytest.raises(ValueError, match="--holdout"):  # all of a group
        sampling_groups((2, 8), (1, 1), None).without(np.array([0, 1, 5]))
    groups = sampling_groups((10**8, 10**8), (1, 1), None).without(np.array([5, 10**8 + 3]))
    assert groups.members == [range(0, 10**8 - 1), range(10**8 - 1, 2 * 10**8 - 2)]
    assert torch.tensor(groups.shares).tolist() == [0.5, 0.5]
