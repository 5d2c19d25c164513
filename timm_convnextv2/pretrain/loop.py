"""The pretraining loop, to read from top to bottom and to change.

What is long stands elsewhere: an update and its state in `Trainer`, the folder and its checkpoints in `RunFolder`, the
data in `batches`, what is looked at between epochs in `measures`; `setup` makes them from the options, and `command`
runs the loop and tells how it ended.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import export_encoder
from ..data import Pixels
from ..models import FCMAE
from ..models.memory import peak_memory
from ..report.html import report_when_due
from ..report.images import save_loss_curve
from ..runs.end import NotFiniteError, attempt
from ..runs.progress import ProgressBar, Stopwatch
from ..runs.world import World
from .batches import Bad, Batches
from .checkpoints import NotSavedError, Progress, RunFolder
from .measures import Best, Measure, measure_epoch
from .messages import how_made, how_measured
from .plan import Plan
from .replay import write_record
from .trainer import Trainer


@dataclass
class Run:
    """A run that passed every check: what trains, on what, for how long, and where it is."""

    settings: dict[str, Any]
    trainer: Trainer
    batches: Batches
    plan: Plan
    folder: RunFolder
    progress: Progress
    measures: list[Measure]
    logs: list[Callable[[int, dict], None]]
    bar: ProgressBar
    best: Best | None = None
    stop: str = ""  # why it ends before its end
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was
    next_report: float = 0.0  # when the report may be written again


def train(run: Run, world: World) -> None:
    """Trains until the last epoch, a signal, or too many images that cannot be decoded."""
    trainer, plan, progress, bar = run.trainer, run.plan, run.progress, run.bar
    world.watch_signals()
    while progress.epoch < plan.epochs and not run.stop:
        stream = run.batches.iterate(progress.epoch, progress.update * trainer.grad_accum_steps)
        clock = Stopwatch(plan.images_per_update)
        while progress.update < plan.updates_per_epoch and not run.stop:
            bad, waited = trainer.update(stream, progress.epoch * plan.updates_per_epoch + progress.update)
            progress.update += 1
            clock.count(waited)
            count_bad_step(run, world)
            run.stop, due = reason_to_stop(run, world, bad)
            if bar.step():
                trainer.check_finite()  # here the host waits for the GPU
                bar.show(progress.epoch, float(trainer.loss), trainer.lr, *clock.lap())
            if due and not run.stop and progress.update < plan.updates_per_epoch:
                trainer.check_finite()
                progress.loss_sum = float(trainer.loss_sum)
                save(run, world, milestone=False)
        trainer.check_finite()
        progress.loss_sum = float(trainer.loss_sum)
        if progress.update == plan.updates_per_epoch:
            finish_epoch(run, world, clock)
        milestone = not progress.update and progress.epoch % run.settings["milestone_interval"] == 0
        ended = run.stop or progress.epoch == plan.epochs
        if ended or milestone or not progress.update and progress.epoch % run.settings["checkpoint_interval"] == 0:
            save(run, world, milestone)
    if not run.stop and not (run.folder.encoder / "config.json").exists():  # a run that had ended, in a new folder
        save(run, world, milestone=False)
    bar.close()


def reason_to_stop(run: Run, world: World, bad: Bad) -> tuple[str, bool]:
    """Names the images that could not be decoded.

    Returns:
        Why all processes stop after this update, '' where they do not; whether all find a checkpoint due.
    """
    progress, settings = run.progress, run.settings
    minutes, interval = settings["checkpoint_minutes"], settings["recovery_interval"]
    late = bool(minutes) and world.primary and time.monotonic() - run.saved >= 60 * minutes
    asked, some_bad, due = world.any(bool(world.stop), bool(bad), late)
    due = due or bool(interval) and progress.update % interval == 0
    if some_bad:
        for name, why in world.gather(run.batches.named(bad)):
            if name not in progress.bad_images:
                progress.bad_images[name] = why
                count = len(progress.bad_images)
                run.bar.note(f"Skipped an image that cannot be decoded ({count} so far): {why}")
    if len(progress.bad_images) > settings["max_bad_images"] * progress.num_images:
        return "images", due
    return (world.stop or "a signal") if asked else "", due


def count_bad_step(run: Run, world: World) -> None:
    """Counts an update that was skipped, keeps what it takes to repeat it, and raises the error of one too many."""
    trainer, progress = run.trainer, run.progress
    if trainer.bad_step is None:
        return
    progress.bad_steps, progress.skipped = progress.bad_steps + 1, trainer.skipped
    if progress.bad_steps > run.settings["max_bad_steps"]:
        raise trainer.bad_step
    record = keep_bad_step(run, world, trainer.bad_step, weights=progress.bad_steps == 1)
    run.bar.note(f"Skipped an update whose loss is {trainer.bad_step.loss} ({progress.bad_steps} so far): {record}")


def keep_bad_step(run: Run, world: World, error: NotFiniteError, weights: bool) -> str:
    """Writes what it takes to repeat the forward of an update, on the first process; returns where that is."""
    if not world.primary:
        return ""
    (epoch, update), accum = divmod(error.number, run.plan.updates_per_epoch), run.trainer.grad_accum_steps
    images = []
    for rank in range(world.size):
        indices = run.batches.indices(epoch, update * accum, accum, rank, world.size)
        name_of = run.batches.name_of
        images.append([(i, name_of(i)) for i in indices] if indices is not None and name_of is not None else None)
    try:
        path = write_record(
            run.folder.path, epoch=epoch, update=update, number=error.number, loss=error.loss, settings=run.settings,
            images=images, model=run.trainer.model if weights else None,
        )  # fmt: skip
    except OSError as e:
        return f"what it takes to repeat it could not be written ({e})"
    return str(path)


def finish_epoch(run: Run, world: World, clock: Stopwatch) -> None:
    """Measures and logs an epoch that is complete."""
    trainer, plan, progress = run.trainer, run.plan, run.progress
    loss = trainer.end_epoch(plan.updates_per_epoch)
    epoch, progress.update, progress.loss_sum, progress.skipped = progress.epoch, 0, 0.0, 0
    progress.epoch += 1
    metrics = {
        "loss": loss,
        **clock.totals(),
        "memory_gib": round(peak_memory(world.device), 2),
        "bad_images": len(progress.bad_images),
    }
    if world.primary:
        measured = measure_epoch(run.measures, progress.epoch, plan.epochs, trainer.exported.encoder, run.bar.note)
        if run.best is not None and run.best.improves(measured):
            act = partial(export, run, trainer.exported, run.folder.best)
            attempt("the export of the best encoder", act, run.bar.note)
        attempt("a row of summary.csv", lambda: run.folder.add_row(epoch, metrics, measured, trainer.lr), run.bar.note)
        found = {f"eval_{name}": value for name, value in measured.items() if value != ""}
        for log in run.logs:
            attempt(
                "the log of an epoch",
                lambda log=log: log(epoch, {**metrics, **found, "lr": trainer.lr}),
                run.bar.note,
            )
    run.bar.note(f"epoch {progress.epoch}/{plan.epochs}  loss {loss:.4f}  {metrics['seconds']:.0f} s")


def export(run: Run, model: FCMAE, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Exports the encoder of a model, with how it was made; with other weights where `state_dict` has them."""
    settings = run.settings
    info = {**how_made(settings, run.progress, run.plan), **how_measured(run.folder.path)}
    export_encoder(
        model, folder, state_dict=state_dict, mean=settings["mean"], std=settings["std"],
        license=settings["license"] or None, info=info, pixels=Pixels.from_record(settings),
    )  # fmt: skip


def save(run: Run, world: World, milestone: bool) -> None:
    """Writes the exported encoder, the loss curve, and the checkpoint."""
    if world.primary:
        with world.writing:
            write(run, milestone)
    run.saved = time.monotonic()


def write(run: Run, milestone: bool) -> None:
    """What `save` does on the first process."""
    settings, folder, state = run.settings, run.folder, run.trainer.state_dict()
    folder.check_finite(state)
    act = partial(export, run, run.trainer.model, folder.encoder, state.get("state_dict_ema"))
    failed = attempt("the export of the encoder", act, run.bar.note)
    if folder.summary.exists():
        attempt("the loss curve", lambda: save_loss_curve(folder.summary, folder.path / "loss.png"), run.bar.note)
    folder.save(state, settings, run.progress, milestone)
    refresh_report(run)
    if failed and run.progress.epoch >= run.plan.epochs:
        raise NotSavedError(f"The encoder was not exported. {folder.last_whole}")


def refresh_report(run: Run) -> None:
    """Writes the report of the run, where it is due."""
    ended = bool(run.stop) or run.progress.epoch >= run.plan.epochs
    run.next_report = report_when_due(run.folder.path, run.next_report, ended, run.bar.note)
