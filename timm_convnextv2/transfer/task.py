"""The set-up that detection and segmentation share, and the interface of each task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..config import flat
from ..console import count
from ..data.measure.duplicates import shared_note
from ..recipes import Recipe
from ..report.classes import ClassResults
from ..runs.folder import RunFolder, experiment_name
from ..runs.loop import Limits
from ..runs.plan import Plan, few_updates
from ..runs.trainer import Learning, LossesTask, Trainer
from ..runs.world import World
from .backbone import Backbone, create_backbone, parameter_groups
from .config import DetectConfig, SegmentConfig
from .loop import WRITTEN, TransferRun, create_loader, create_schedule, plan_updates

# A run that resumes must have the same: the order of images, the weights and the schedule depend on them.
# fmt: off
FIXED = (
    "model", "model_kwargs", "in_chans", "classes", "num_images", "world_size", "batch_size", "grad_accum_steps",
    "seed", "total_updates", "opt", "model_ema", "frozen", "layer_decay", "layer_decay_type", "pixels",
)
# fmt: on


class Task(ABC):
    """Detection or segmentation: its data, its model, and its evaluation. Built from a config; writes nothing itself.

    The config is that of `train`, or of `eval`, for which there is no training data. `fixed` names settings besides
    `FIXED` that a resumed run must repeat; `main_metric` is a title and a name. In train mode `model(images, targets)`
    returns losses by name; `samples[epoch, index]` is a sample for `collate`. `data` describes the training data.
    """

    name: ClassVar[str]
    command: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]]
    main_metric: ClassVar[tuple[str, str]]
    collate: Callable[[list], tuple[Any, Any]]
    model: nn.Module
    backbone: Backbone
    classes: list[str]
    samples: Any = None  # `Samples` of training
    validation: Any  # images with targets, by index
    data: str

    @abstractmethod
    def check(self) -> list[str]:
        """Checks the data before work starts, on rank 0; returns notes for the user, a `ValueError` names faults."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, world: World | None = None, shown: int = 0
    ) -> tuple[dict[str, Any], Any, ClassResults]:
        """Metrics by name, what `model` found in validation images, and results per class; processes share the work."""

    @abstractmethod
    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        """Draws what was found in some images beside the truth, as a PNG."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path, **about: Any) -> None:
        """Writes the model to a folder; `about` has `metrics`, `dataset` and `info` for its card."""

    @abstractmethod
    def table(self, metrics: dict[str, Any]) -> str:
        """The metrics as text."""

    def write_found(self, path: Path, found: Any) -> None:  # noqa: B027  optional
        """Writes what was found in all validation images, if that is a result of the task."""


def new_backbone(config: DetectConfig | SegmentConfig) -> Backbone:
    """The backbone that the options ask for. Seeds PyTorch, as weights may be random."""
    torch.manual_seed(config.learning.seed)
    options = config.backbone
    return create_backbone(
        options.model, pretrained=not options.from_scratch, in_chans=options.in_chans,
        drop_path_rate=options.drop_path, **options.model_kwargs,
    ).read_with(config.compute.nodata)  # fmt: skip


def set_up(
    task_of: Callable[[Any], Task], config: DetectConfig | SegmentConfig, recipe: Recipe | None, world: World, line: str
) -> TransferRun | None:
    """Opens and checks everything a run needs, and only then writes to its folder. Returns None after --dry-run."""
    options, learning, name = config.run, config.learning, config.run.experiment
    if not config.backbone.model:
        raise ValueError("--model is required: a model of timm, local-dir:FOLDER or hf-hub:USER/NAME.")
    if not config.data.data_dir:
        raise ValueError("--data-dir is required: the root of the data set.")
    if options.resume == "auto" and not name:
        raise ValueError("--resume auto needs --experiment, the folder of the run to continue.")
    config.logs.check()
    task = task_of(config)
    name = name or experiment_name(world, task.command, Path(config.backbone.model.rpartition(":")[2]).name)
    where = (options.output, name, options.resume, options.overwrite)
    folder = RunFolder(*where, [config.data.data_dir], WRITTEN, task.name)
    loader = create_loader(task.samples, task.collate, world, learning.batch_size, config.compute.workers)
    plan, num_images = plan_updates(loader, world, learning), len(task.samples)
    settings = {
        "task": task.name, **flat(config), "experiment": name, "classes": task.classes, "num_images": num_images,
        "num_validation": len(task.validation), "world_size": world.size, "in_chans": task.backbone.in_chans,
        "pixels": task.backbone.pixels.record() or None, "total_updates": plan.updates,
    }  # fmt: skip
    trainer = create_trainer(task, config, plan, world)
    folder.check_same(settings, (*FIXED, *task.fixed))
    world.agree({"the number of images": num_images, "the classes": task.classes})
    notes = task.check() if world.primary else []
    if world.primary and (shared := shared_note(task.samples.data.files, task.validation.files, "validation")):
        notes.append(f"warning: {shared}")
    world.wait()
    world.print("\n".join([*describe(task, config, plan, world, recipe), *notes]))
    if options.dry_run:
        return None
    limits = Limits(options.log_interval, milestone_interval=max(1, plan.epochs // 4))
    progress = folder.progress(world.size, num_images)
    run = TransferRun(trainer, plan, folder, settings, progress, limits, world, loader=loader, task=task)
    run.begin(line, config.logs)
    return run


def create_trainer(task: Task, config: DetectConfig | SegmentConfig, plan: Plan, world: World) -> Trainer:
    """A trainer of the task's model on the run's device."""
    learning = config.learning
    groups = parameter_groups(
        task.model, task.backbone, weight_decay=learning.weight_decay, layer_decay=learning.layer_decay,
        layer_decay_type=learning.layer_decay_type,
    )  # fmt: skip
    for group in groups:
        del group["names"]
    losses = LossesTask(task.model.to(world.device), world.device)
    optimizer = create_optimizer_v2(groups, opt=learning.opt, lr=learning.lr, weight_decay=0.0)
    schedule = create_schedule(
        optimizer, plan, learning.sched, warmup_share=learning.warmup_share, steps=learning.decay_epochs
    )
    how = Learning(
        learning.seed, learning.grad_accum_steps, learning.clip_grad, config.compute.autocast,
        learning.model_ema_decay if learning.model_ema else None, ema_warmup=True,
    )  # fmt: skip
    return Trainer(losses, optimizer, schedule, world, how)


def describe(
    task: Task, config: DetectConfig | SegmentConfig, plan: Plan, world: World, recipe: Recipe | None
) -> Sequence[str]:
    """Lines about the run, and notes about settings that may be unintended."""
    learning = config.learning
    batch = learning.batch_size * learning.grad_accum_steps * world.size
    lines = [
        f"{config.backbone.model}: {sum(p.numel() for p in task.model.parameters()) / 1e6:.1f}M parameters; "
        f"{task.data}, {len(task.validation)} to validate; {count(plan.updates, 'update')} of {count(batch, 'image')}, "
        f"lr {learning.lr:.2e}, on {world.size} x {world.device.type}"
    ]
    if recipe is not None and recipe.global_batch not in (None, batch):
        lines.append(
            f"note: the recipe {recipe.name} is for {recipe.global_batch} images per update, this run has {batch}: "
            "adapt --batch-size, --grad-accum-steps or --lr."
        )
    if prepared := str(task.backbone.pixels):
        lines.append(f"stored values are prepared like those the model was trained on: {prepared}")
    if few := few_updates(plan.updates, plan.updates_per_epoch):
        lines.append(f"note: {few}")
    if plan.warmup_updates > plan.updates // 2:
        warmup = f"the warmup of {plan.warmup_updates} updates takes more than half of the run"
        lines.append(f"note: {warmup}; lower --warmup-updates.")
    return lines
