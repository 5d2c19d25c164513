"""Parts of a run that detection and segmentation share: batches in order, rates by layer, evaluation.

A model that is trained here returns a dict of losses in train mode, `model(images, targets)`; their sum is minimized.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data import EpochBatchSampler
from ..report.html import write_report
from ..runs.errors import DataError, original_message
from ..runs.loop import Run
from ..runs.plan import Plan
from ..runs.trainer import Learning, LossesTask, Trainer
from ..runs.world import World, leave_signals_to_parent

# Entries of a run folder besides those in `folder.WRITTEN`
WRITTEN = ("predictions", "model")


@dataclass(frozen=True)
class Schedule:
    """The optimizer of timm `opt`, and how its learning rate changes after the warmup.

    `kind` is 'cosine', 'poly' (power 1: linear) or 'step', which divides the rate by 10 at each of `steps`, fractions
    of the updates. The warmup starts at the fraction `warmup_share` of the rate. It is part of the schedule, which has
    moved on when the warmup ends.
    """

    kind: str = "cosine"
    warmup_share: float = 0.001
    steps: tuple[float, ...] = (0.75, 0.917)
    opt: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)

    def create(self, optimizer: torch.optim.Optimizer, plan: Plan) -> Scheduler:
        warmup: dict[str, Any] = dict(warmup_t=plan.warmup_updates, warmup_lr_init=self.warmup_share * plan.lr)
        warmup["t_in_epochs"] = False
        if self.kind == "cosine":
            return CosineLRScheduler(optimizer, t_initial=max(1, plan.updates), **warmup)
        if self.kind == "poly":
            return PolyLRScheduler(optimizer, t_initial=max(1, plan.updates), power=1.0, **warmup)
        if self.kind == "step":
            # + 1: timm takes a step one update early, since it counts epochs that have ended
            steps = [round(step * plan.updates) + 1 for step in self.steps]
            return MultiStepLRScheduler(optimizer, steps, decay_rate=0.1, **warmup)
        raise ValueError(f"The schedule is {self.kind!r}, expected 'cosine', 'poly' or 'step'.")


def create_trainer(
    model: nn.Module, groups: list[dict[str, Any]], plan: Plan, schedule: Schedule, world: World, learning: Learning
) -> Trainer:
    """A trainer of the model on its device; `groups` are from `groups.parameter_groups`."""
    task = LossesTask(model.to(world.device), world.device)
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    optimizer = create_optimizer_v2(groups, opt=schedule.opt, lr=plan.lr, weight_decay=0.0, betas=schedule.betas)
    return Trainer(task, optimizer, schedule.create(optimizer, plan), world, learning)


def plan_updates(
    loader: DataLoader, world: World, grad_accum_steps: int, lr: float, *, epochs: int = 0, updates: int = 0,
    warmup_updates: int = 0,
) -> Plan:  # fmt: skip
    """The plan of a run over `loader` of this many epochs or updates; an epoch needs at least one update."""
    size = len(loader) // grad_accum_steps
    if not size:
        raise ValueError(
            f"An update takes {grad_accum_steps} batches, but an epoch has {len(loader)}. Lower --grad-accum-steps or "
            "--batch-size."
        )
    sampler: Any = loader.batch_sampler
    images = sampler.batch_size * world.size * grad_accum_steps
    return Plan(updates or epochs * size, size, images, lr, warmup_updates)


def create_loader(
    dataset: Dataset, collate: Callable[[list], tuple[Any, Any]], world: World, *, batch_size: int, workers: int = 0,
    seed: int = 0
) -> DataLoader:  # fmt: skip
    """Batches `(images, targets)` in an order that depends on `(seed, epoch)` only, shared among the processes.

    `dataset[epoch, index]` is a sample of which everything random depends on (seed, epoch, index). `batch_size` and
    `workers` are per process.
    """
    size: Any = dataset
    sampler = EpochBatchSampler(len(size), batch_size, seed, world.rank, world.size)
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda", generator=torch.Generator(), worker_init_fn=leave_signals_to_parent,
    )  # fmt: skip


# `(complete epochs, model in eval mode, whether the run ends) -> numbers by column`; called on all processes
EpochHook = Callable[[int, nn.Module, bool], dict[str, float]]


@dataclass(kw_only=True)
class TransferRun(Run):
    """A run of detection or segmentation.

    All processes call `evaluate` after every `eval_interval` epochs and the last one; rank 0's numbers become the
    columns `eval_*` of summary.csv. `measured` is the last evaluation.
    """

    loader: DataLoader
    evaluate: EpochHook
    eval_interval: int = 1
    measured: dict[str, float] = field(default_factory=dict)

    shown_measures = 2

    def done(self) -> str:
        return f"Done: the model is in {self.folder.path / 'model'}"

    def batches(self, epoch: int, start_batch: int) -> Iterator:
        sampler: Any = self.loader.batch_sampler
        sampler.set_epoch(epoch, start_batch)
        return iter(self.loader)

    def measure(self, epoch: int) -> dict[str, Any]:
        """Evaluates the model if that is due; a `DataError` if an image has become unreadable."""
        if not self.ended and epoch % self.eval_interval:
            return {}
        try:
            with torch.no_grad():
                self.measured = self.evaluate(epoch, self.trainer.averaged.eval(), self.ended)
        except ValueError as e:
            raise DataError(original_message(e)) from e
        self.trainer.task.train()
        return self.measured

    def report(self) -> None:
        write_report([self.folder.path], self.folder.path / "report.html")
