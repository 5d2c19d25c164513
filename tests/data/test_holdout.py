"""Images that are held out: each image is on one side, and the choice is a function of seed and share."""

import pickle

import pytest
import torch
from drawn import Numbers

from timm_convnextv2.data import hold_out
from timm_convnextv2.data.sources.picked import MOST_HELD_OUT


def everything(part):
    return [part[i] for i in range(len(part))]


@pytest.mark.parametrize("count, share, held", [(2, 0.01, 1), (7, 0.5, 4), (100, 0.1, 10), (999, 0.01, 10)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_image_is_on_one_side(count, share, held, seed):
    train, apart = hold_out(Numbers(count), share, seed)
    assert (len(train), len(apart)) == (count - held, held)
    assert sorted(everything(train) + everything(apart)) == [*range(count)]
    assert everything(train) == sorted(everything(train))
    assert [train.name(i) for i in range(len(train))] == [f"image {i}" for i in everything(train)]
    again, _ = hold_out(Numbers(count), share, seed)
    assert everything(pickle.loads(pickle.dumps(again))) == everything(train)


def test_of_millions_few_are_held_out_in_little_memory():
    train, apart = hold_out(Numbers(100_000_000), 0.01, 0)
    assert len(apart) == MOST_HELD_OUT and len(train) == 100_000_000 - MOST_HELD_OUT
    held = set(everything(apart))
    at = torch.randint(len(train), (2000,)).tolist()
    assert held.isdisjoint(train[i] for i in at) and train[len(train) - 1] in range(99_000_000, 100_000_000)
    assert len(pickle.dumps(train)) < 100_000


def test_no_share_is_the_source_itself_and_the_seed_chooses():
    source = Numbers(1000)
    assert hold_out(source, 0.0, 0) == (source, None)
    assert everything(hold_out(source, 0.1, 0)[1]) != everything(hold_out(source, 0.1, 1)[1])


@pytest.mark.parametrize(
    "count, share, message",
    [
        (10, 0.6, "between 0 and 0.5, got 0.6"),
        (10, -1, "got -1"),
        (10, float("nan"), "got nan"),
        (1, 0.1, "nothing to train on"),
    ],
)
def test_shares_that_are_refused(count, share, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Numbers(count), share, 0)
