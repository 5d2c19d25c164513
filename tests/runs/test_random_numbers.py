"""The random numbers of an update, whatever is trained."""

import torch
from timm.scheduler import CosineLRScheduler
from timm.task import TrainingTask
from torch import nn

from timm_convnextv2.runs.trainer import Learning, Trainer
from timm_convnextv2.runs.world import World


class Draws(TrainingTask):
    """Notes a random number of each forward, as drop path draws them."""

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.trainable_module, self.drawn = nn.Linear(1, 1), []

    def forward(self, x):
        self.drawn.append(torch.rand(1).item())
        return {"loss": self.trainable_module(x).sum()}


def test_random_numbers_differ_by_rank_and_update_only():
    drawn = {}
    for rank, number in ((0, 5), (1, 5), (0, 6), (0, 5)):
        task, world = Draws(), World("cpu")
        world.rank = rank
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.1)
        scheduler = CosineLRScheduler(optimizer, 10, t_in_epochs=False)
        trainer = Trainer(task, optimizer, scheduler, world, Learning(seed=3))
        trainer.update(iter([(torch.ones(1, 1),)]), number)
        drawn.setdefault((rank, number), task.drawn)
        assert drawn[rank, number] == task.drawn
    assert len({tuple(numbers) for numbers in drawn.values()}) == 3
