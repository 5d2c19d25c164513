"""The arithmetic of a run: updates, learning rate, warmup."""

import pytest

from timm_convnextv2.pretraining.config import Schedule
from timm_convnextv2.pretraining.plan import make_plan


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
    schedule = Schedule(batch_size=16, grad_accum_steps=3, lr_base=1e-3, lr_base_size=256)
    plan = make_plan(schedule, 10, 480, 2)
    assert (plan.updates_per_epoch, plan.images_per_update) == (3, 96)
    assert plan.lr == pytest.approx(1e-3 * 96 / 256)
    assert make_plan(Schedule(batch_size=16, lr=0.5), 10, 160, 1).lr == 0.5
