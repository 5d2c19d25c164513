"""Parts of a run that detection and segmentation share: samples in order, schedule, evaluation.

A model that is trained here returns a dict of losses in train mode, `model(images, targets)`; their sum is minimized.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..console import count
from ..data import EpochBatchSampler
from ..data.formats.files import printable
from ..report.classes import FILE as CLASSES
from ..report.classes import write_classes
from ..report.html import write_report
from ..report.kinds import verdict
from ..report.next_steps import next_steps_of_transfer
from ..report.run import read_run
from ..runs.errors import DataError, original_message
from ..runs.loop import Run
from ..runs.plan import Plan
from ..runs.world import World, leave_signals_to_parent
from ..seeds import sample_seed, seeded

if TYPE_CHECKING:
    from .task import Task

# Entries of a run folder besides those in `folder.WRITTEN`
WRITTEN = ("predictions", "model", CLASSES)


class Samples(Dataset):
    """`samples[epoch, index]` is `transform(*data[index])`, random numbers depend on (seed, epoch, index) only."""

    def __init__(self, data: Any, transform: Callable[..., Any], seed: int = 0) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        sample = self.data[index]
        with seeded(sample_seed(self.seed, epoch, index)):
            return self.transform(*sample)


def sampled(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Keys `(epoch, index)` of at least 32 samples, spread over the indices, of epochs that are not trained on."""
    few = [indices[k * len(indices) // 32] for k in range(32)] if len(indices) > 32 else indices
    return [(-1 - epoch, i) for epoch in range(-(-32 // max(1, len(few)))) for i in few]


def create_loader(
    samples: Samples, collate: Callable[[list], tuple[Any, Any]], world: World, batch_size: int, workers: int = 0
) -> DataLoader:
    """Batches `(images, targets)` in an order that depends on `(seed, epoch)` only, shared among the processes.

    `batch_size` and `workers` are per process.
    """
    sampler = EpochBatchSampler(len(samples), batch_size, samples.seed, world.rank, world.size)
    return DataLoader(
        samples, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda", generator=torch.Generator(), worker_init_fn=leave_signals_to_parent,
    )  # fmt: skip


def shared_loader(data: Any, world: World | None, workers: int, **more: Any) -> tuple[list[int], DataLoader]:
    """The indices of this process, every `world.size`-th, and a loader of that part of the data, in order."""
    part = list(range(len(data)) if world is None else range(world.rank, len(data), world.size))
    # only a run ends workers that ignore signals
    more |= {"worker_init_fn": None if world is None else leave_signals_to_parent, "generator": torch.Generator()}
    return part, DataLoader(Subset(data, part), num_workers=workers, **more)


def plan_updates(loader: DataLoader, world: World, learning: Any) -> Plan:
    """The plan of a run over `loader`; an epoch needs at least one update. `learning` is a `config.Learning`."""
    steps, batches = learning.grad_accum_steps, len(loader)
    if batches < steps:
        raise ValueError(
            f"An update takes {steps} batches, but an epoch has {batches}. Lower --grad-accum-steps or --batch-size."
        )
    sampler: Any = loader.batch_sampler
    size, images = batches // steps, sampler.batch_size * world.size * steps
    return Plan(learning.updates or learning.epochs * size, size, images, learning.lr, learning.warmup_updates)


def create_schedule(
    optimizer: torch.optim.Optimizer, plan: Plan, sched: str, *, warmup_share: float = 1e-3, steps: Sequence[float] = ()
) -> Scheduler:
    """'cosine', 'poly' (power 1: linear) or 'step', which divides the rate by 10 at each of `steps`, in epochs.

    The warmup starts at the fraction `warmup_share` of the rate. It is part of the schedule, which has moved on when
    the warmup ends.
    """
    # + 1: timm takes a step one update early, since it counts epochs that have ended
    milestones: Any = [round(step * plan.updates_per_epoch) + 1 for step in steps]
    found: Any = create_scheduler_v2(
        optimizer, "multistep" if sched == "step" else sched, max(1, plan.updates), decay_milestones=milestones,
        decay_rate=1.0 if sched == "poly" else 0.1, warmup_lr=warmup_share * plan.lr, warmup_epochs=plan.warmup_updates,
        step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    return found[0]


@torch.no_grad()
def share_buffers(model: nn.Module, world: World) -> None:
    """Gives all processes the batch statistics of rank 0, whose model is exported.

    Without synchronised batch normalisation (on CPU) each process has those of its own images. DDP shares them only at
    the next update, so until then the processes would evaluate different models.
    """
    if world.distributed:
        first = world.share({name: value.cpu() for name, value in model.named_buffers()})
        for name, value in model.named_buffers():
            value.copy_(first[name])


def how_made(of: dict[str, Any]) -> dict[str, Any]:
    """Rows of the model card's table, from the settings of a run. Paths of this machine stay out."""
    batch = of["batch_size"] * of["grad_accum_steps"] * of["world_size"]
    place = printable(Path(of["data_dir"]).resolve().name)
    start = "random weights" if of["from_scratch"] else of["model"].rpartition("/")[2].rpartition(":")[2]
    return {
        "Backbone started from": start,
        "Data": f"{place}: {count(of['num_images'], 'image')}, {of['num_validation']} to validate",
        "Length": f"{count(of['total_updates'], 'update')} of {count(batch, 'image')}",
        "Training crops": f"{of['img_size']} x {of['img_size']} pixels",
        "Optimizer": f"{of['opt']}, learning rate {of['lr']:g}, weight decay {of['weight_decay']:g}, layer decay "
        f"{of['layer_decay']:g}",
    }


@dataclass(kw_only=True)
class TransferRun(Run):
    """A run of detection or segmentation, which evaluates after every `--eval-interval` epochs and the last one.

    Rank 0's numbers become the columns `eval_*` of summary.csv.
    """

    loader: DataLoader
    task: "Task"

    shown_measures = 2

    def done(self) -> str:
        """What was measured, where the model is, and the commands that come next."""
        if not (self.world.primary and self.folder.summary.exists()):  # nothing was trained in this folder
            return super().done()
        found, steps = verdict(read_run(self.folder.path)).text, next_steps_of_transfer(self.settings, self.folder.path)
        return "\n".join([found, super().done(), *map(str, steps)])

    def batches(self, epoch: int, start_batch: int) -> Iterator:
        sampler: Any = self.loader.batch_sampler
        sampler.set_epoch(epoch, start_batch)
        return iter(self.loader)

    def measure(self, epoch: int) -> dict[str, Any]:
        """Evaluates the model if that is due; a `DataError` if an image has become unreadable."""
        if not self.ended and epoch % self.settings["eval_interval"]:
            return {}
        try:
            with torch.no_grad():
                measured = self._evaluate(epoch, self.trainer.averaged.eval())
        except ValueError as e:
            raise DataError(original_message(e)) from e
        self.trainer.task.train()
        return measured

    def _evaluate(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Evaluates a model after an epoch, draws what it finds, and exports it."""
        task, folder, settings, shown = self.task, self.folder.path, self.settings, self.settings["shown_images"]
        share_buffers(model, self.world)
        metrics, found, classes = task.evaluate(model, self.world, shown)
        if self.world.primary:
            predictions, (name, key) = folder / "predictions", task.main_metric
            if shown:
                title = f"epoch {epoch}, {name} {metrics[key]:.3f}"
                task.draw(predictions / f"epoch-{epoch:04d}.png", found, title, shown)
            dataset = printable(Path(settings["data_dir"]).resolve().name)
            task.export(model, folder / "model", metrics=metrics, dataset=dataset, info=how_made(settings))
            write_classes(folder, classes)
            if self.ended:
                task.write_found(predictions / "validation.json", found)
                self.world.print(task.table(metrics))
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def report(self) -> None:
        write_report([self.folder.path], self.folder.path / "report.html")
