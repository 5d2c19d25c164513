"""The arithmetic of a run: updates, learning rate, warmup; and what is told before a run that cannot learn."""

import re
from dataclasses import replace

import pytest

from timm_convnextv2.pretraining import messages
from timm_convnextv2.pretraining.config import Schedule
from timm_convnextv2.pretraining.messages import few_images, learning_warnings, worker_warnings
from timm_convnextv2.pretraining.plan import make_plan, usual_epochs
from timm_convnextv2.runs.plan import Plan, few_updates


@pytest.mark.parametrize(
    ("warmup_epochs", "updates", "expected"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.25, 10, 2),
        (0.26, 10, 3),
        (0.3, 5, 2),
        (2.9, 10, 29),
        (0.33, 100, 33),
        (0.05, 9, 0),
    ],
)
def test_warmup_is_rounded_to_the_nearest_update(warmup_epochs, updates, expected):
    plan = make_plan(Schedule(epochs=4, warmup_epochs=warmup_epochs, batch_size=2), updates, 2 * updates, 1)
    assert plan.warmup_updates == expected and plan.updates == 4 * updates


def test_learning_rate_follows_the_images_of_an_update():
    schedule = Schedule(epochs=1, batch_size=16, grad_accum_steps=3, lr_base=1e-3, lr_base_scale="linear")
    plan = make_plan(schedule, 10, 480, 2)
    assert (plan.updates_per_epoch, plan.images_per_update) == (3, 96)
    assert plan.lr == pytest.approx(1e-3 * 96 / 256)
    assert make_plan(replace(schedule, lr_base_scale="sqrt"), 10, 480, 2).lr == pytest.approx(1e-3 * (96 / 256) ** 0.5)
    assert make_plan(Schedule(epochs=1, batch_size=16, lr=0.5), 10, 160, 1).lr == 0.5


@pytest.mark.parametrize("scale", [{}, {"lr_base": 1.5e-4, "lr_base_scale": "linear"}])
def test_learning_rate_of_the_papers_batch_is_the_papers(scale):
    assert make_plan(Schedule(epochs=1, batch_size=4096, **scale), 1, 4096, 1).lr == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(1_281_167, 4096, 800), (1_281_167, 64, 12), (240, 16, 800), (240, 64, 2500), (50, 64, 7500), (10**8, 64, 1)],
)
def test_usual_epochs(images, batch, epochs):
    assert usual_epochs(images // batch) == epochs


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
