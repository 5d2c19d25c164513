"""The arithmetic of a run: updates, learning rate, warmup."""

from dataclasses import replace

import pytest

from timm_convnextv2.pretraining.config import Schedule
from timm_convnextv2.pretraining.plan import make_plan, usual_epochs


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
