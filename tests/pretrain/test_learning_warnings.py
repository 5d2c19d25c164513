"""A run that cannot learn is told before it starts, with values to paste."""

import re

import pytest

from timm_convnextv2.pretraining import messages
from timm_convnextv2.pretraining.messages import few_images, learning_warnings, worker_warnings
from timm_convnextv2.runs.plan import Plan, few_updates


@pytest.mark.parametrize(
    ("updates", "images", "lr", "started", "said"),
    [
        (150, 16, 1e-4, False, []),
        (149, 16, 1e-4, False, ["149 updates are too few to learn features: a run of 7,500 is --epochs 7500."]),
        (8, 64, 1e-4, False, ["A smaller --batch-size makes more updates of an epoch."]),
        (9000, 16, 9.4e-6, False, ["a peak learning rate of 9.4e-06 hardly moves the weights; the usual one for 16 "
                                   "images per update is --lr 1.5e-04."]),
        (8, 16, 1e-6, False, ["8 updates", "1.0e-06"]),
        (8, 16, 1e-6, True, []),  # weights to start from have learned already
    ],
)  # fmt: skip
def test_runs_that_cannot_learn(updates, images, lr, started, said):
    found = learning_warnings(Plan(updates, 1, images, lr, 0), started)
    assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True))


CORES = [(4, 4, None), (0, 1, None), (4, 2, "1"), (1, 1, None), (2, 1, "0")]


@pytest.mark.parametrize(("workers", "cores", "said"), CORES)
def test_workers_above_the_cores(monkeypatch, workers, cores, said):
    monkeypatch.setattr(messages.os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    found = worker_warnings(workers, 1)
    assert [line.endswith(f"--workers {said}.") for line in found] == [True] * (said is not None)


@pytest.mark.parametrize("case", [(999, False, False), (1000, False, False), (10, True, False), (10, False, True)])
def test_few_images(case):
    found = few_images(*case)
    assert found.startswith("999 images are few: --probe-dir") if case[0] == 999 else found == ""


@pytest.mark.parametrize(
    ("updates", "per_epoch", "more", "expected"),
    [(28, 2, 10, "28 updates may.*--epochs 65"), (1, 1, 0, "1 update may.*--epochs 150"),
     (149, 160, 3, "--epochs 1\\)"), (150, 2, 10, "^$")],
)  # fmt: skip
def test_few_updates_of_other_trainings(updates, per_epoch, more, expected):
    assert re.search(expected, few_updates(updates, per_epoch, more))
