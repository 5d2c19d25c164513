"""The training loop of pretraining, detection and segmentation, to read from top to bottom and to change.

`Trainer` makes updates, `RunFolder` writes checkpoints. A task subclasses `Run` with its data, its measures and its
export; `end.run_command` sets a run up and reports its end.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.memory import peak_memory
from .checkpoints import Checkpoint, Progress
from .errors import DataError, NotFiniteError, NotSavedError, attempt, reading
from .folder import FREE, RunFolder, differences
from .logs import Log, Logs
from .plan import Plan
from .progress import ProgressBar, Stopwatch
from .trainer import Bad, Trainer
from .world import World

REPORT_PAUSE = 100  # the report takes at most a hundredth of the time, except for the last one


@dataclass(frozen=True)
class Limits:
    """When a run saves, logs and gives up; an interval of 0 means never."""

    log_interval: int = 10  # updates between readings of the loss
    checkpoint_interval: int = 1  # epochs between checkpoints
    milestone_interval: int = 0  # epochs between checkpoints to keep
    recovery_interval: int = 0  # updates between checkpoints within an epoch
    checkpoint_minutes: float = 0.0  # minutes between checkpoints within an epoch
    max_bad_images: float = 0.0  # fraction of the images that may be undecodable
    max_bad_steps: int = 0  # updates of the run that may be skipped because their loss is not finite


@dataclass
class Run:
    """A run that passed every check. Tasks subclass it."""

    trainer: Trainer
    plan: Plan
    folder: RunFolder  # claimed by rank 0
    settings: dict[str, Any]  # plain values, saved with every checkpoint
    progress: Progress
    limits: Limits
    world: World
    logs: list[Log] = field(default_factory=list)  # of rank 0; empty elsewhere
    stop: str = ""  # why it ends early: a signal, or 'images' if too many cannot be decoded
    saved: float = field(default_factory=time.monotonic)  # time of the last checkpoint
    next_report: float = 0.0  # time from which the report may be written again

    product = "model"  # folder of the exported model
    remedy = "a lower --lr"  # for a loss that is not finite
    shown_measures = 0  # measures in the line about an epoch

    def __post_init__(self) -> None:
        done = self.progress.epoch * self.plan.updates_per_epoch + self.progress.update
        plan, interval = self.plan, self.limits.log_interval
        self.bar = ProgressBar(plan.updates, done, plan.epochs, interval, self.world.primary)

    @property
    def ended(self) -> bool:
        """Whether all epochs are complete."""
        return self.progress.epoch >= self.plan.epochs

    def begin(
        self, command: str, logs: Logs, about: str = "", compile_backend: str | None = None,
        warnings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Loads the checkpoint to resume from, claims the folder and prints `about` the run; call it on all processes.

        `command` and `warnings` are for args.yaml; `compile_backend` is that of torch.compile, None does not compile.
        """
        resumed, finished = "", self.ended and self.folder.continues and self.exported
        if self.folder.checkpoint is not None:
            where = f"epoch {self.progress.epoch + 1}, update {self.progress.update + 1}"
            resumed = f"Resumed from {self.folder.checkpoint.path}: {where}"
            names = [name for name in self.settings if name not in FREE]
            if changed := differences(self.folder.checkpoint.settings, self.settings, names):
                text = f"the run was resumed with other settings: {'; '.join(changed)}"
                warnings = [*warnings, text]
                resumed += f"\nwarning: {text}"
            if finished:
                ignored = f" Nothing is trained with other settings: {'; '.join(changed)}." if changed else ""
                resumed = f"The run in {self.folder.path} has finished (epoch {self.progress.epoch}).{ignored}"
            self.folder.restore(self.trainer, self.plan.updates_per_epoch)
        self.world.wait()  # no process may find the folder already claimed
        if self.world.primary:
            self.folder.claim(None if finished else self.settings, self.progress.epoch, command, warnings)
            self.logs = logs.open(self.folder.path, self.settings)
        self.world.wait()  # nor train if rank 0 could not claim it
        self.trainer.wrap(compile_backend)
        lines = [*self.folder.notes, about, resumed, f"Writing to {self.folder.path}"]
        self.world.print("\n".join(line for line in lines if line))

    def done(self) -> str:
        """The message about a finished run."""
        return f"Done: the {self.product} is in {self.folder.path / self.product}"

    def batches(self, epoch: int, start_batch: int) -> Iterator:
        """The batches of an epoch from `start_batch` on."""
        raise NotImplementedError

    def measure(self, epoch: int) -> dict[str, float | str]:
        """Numbers for the columns `eval_*` of summary.csv after an epoch, counted from 1; '' for an empty cell.

        Called on all processes; only the numbers of rank 0 count.
        """
        return {}

    def export(self) -> str:
        """Exports the model before a checkpoint is saved, on rank 0; returns a warning or ''."""
        return ""

    def report(self) -> None:
        """Writes the report, on rank 0."""

    def counts(self) -> dict[str, float]:
        """More columns `train_*` of summary.csv."""
        return {}

    @property
    def exported(self) -> bool:
        """Whether the export of a finished run exists."""
        return (self.folder.path / self.product / "config.json").exists()

    def named(self, bad: Bad) -> list[tuple[str, str]]:
        """Names of undecodable images instead of their indices."""
        return [(str(index), reason) for index, reason in bad]

    def record_bad_step(self, error: NotFiniteError, weights: bool) -> str:
        """Writes what is needed to repeat an update whose loss is not finite; returns where it is, on rank 0."""
        return ""

    def repeat(self, record: str) -> str:
        """How to repeat such an update, to end the message with."""
        return ""


def train(run: Run) -> None:
    """Trains until the last update, a signal, or too many images that cannot be decoded; raises `runs.errors`."""
    trainer, plan, progress, bar = run.trainer, run.plan, run.progress, run.bar
    run.world.watch_signals()
    begun_ended = run.ended
    while not run.ended and not run.stop:
        size = plan.updates_in(progress.epoch)
        accum = trainer.learning.grad_accum_steps
        stream = reading(run.batches(progress.epoch, progress.update * accum))
        clock = Stopwatch(plan.images_per_update)
        while progress.update < size and not run.stop:
            try:
                bad, waited = trainer.update(stream, progress.epoch * plan.updates_per_epoch + progress.update)
            except DataError:
                if accum == 1 and not run.world.distributed:  # the state is that before this update
                    save(run)
                raise
            progress.update += 1
            clock.count(waited)
            count_bad_step(run)
            run.stop, due = reason_to_stop(run, bad)
            if bar.step():
                trainer.check_finite()  # the host waits for the GPU here
                bar.show(progress.epoch, float(trainer.loss), trainer.lr, *clock.lap())
            if due and not run.stop and progress.update < size:
                save(run)
        trainer.check_finite()
        if progress.update == size:
            finish_epoch(run, clock)
        every, keep = run.limits.checkpoint_interval, run.limits.milestone_interval
        milestone = not progress.update and bool(keep) and progress.epoch % keep == 0
        if run.stop or run.ended or milestone or not progress.update and progress.epoch % every == 0:
            save(run, milestone)
    if begun_ended and not run.world.share(run.exported):  # a finished run that was resumed in a new folder
        run.measure(progress.epoch)
        save(run)
    bar.close()


def reason_to_stop(run: Run, bad: Bad) -> tuple[str, bool]:
    """Records undecodable images; returns why all processes stop now ('' if not), and if a checkpoint is due."""
    progress, limits, world = run.progress, run.limits, run.world
    late = bool(limits.checkpoint_minutes) and world.primary
    late = late and time.monotonic() - run.saved >= 60 * limits.checkpoint_minutes
    asked, some_bad, due = world.any(bool(world.stop), bool(bad), late)
    due = due or bool(limits.recovery_interval) and progress.update % limits.recovery_interval == 0
    if some_bad:
        for name, why in world.gather(run.named(bad)):
            if name not in progress.bad_images:
                progress.bad_images[name] = why
                count = len(progress.bad_images)
                run.bar.note(f"Skipped an image that cannot be decoded ({count} so far): {why}")
    if len(progress.bad_images) > limits.max_bad_images * progress.num_images:
        return "images", due
    return (world.stop or "a signal") if asked else "", due


def count_bad_step(run: Run) -> None:
    """Counts and records an update that was skipped; raises its error once there are too many."""
    trainer, progress = run.trainer, run.progress
    if trainer.bad_step is None:
        return
    progress.bad_steps, progress.skipped = progress.bad_steps + 1, trainer.skipped
    if progress.bad_steps > run.limits.max_bad_steps:
        raise trainer.bad_step
    record = run.record_bad_step(trainer.bad_step, weights=progress.bad_steps == 1)
    run.bar.note(f"Skipped an update whose loss is {trainer.bad_step.loss} ({progress.bad_steps} so far): {record}")


def finish_epoch(run: Run, clock: Stopwatch) -> None:
    """Measures and logs a complete epoch."""
    trainer, progress, note = run.trainer, run.progress, run.bar.note
    losses = trainer.end_epoch(progress.update)
    epoch, progress.update, progress.sums, progress.skipped = progress.epoch, 0, {}, 0
    progress.epoch += 1
    metrics = {**losses, **clock.totals(), "memory_gib": round(peak_memory(run.world.device), 2), **run.counts()}
    if run.world.primary:
        run.folder.check_finite(trainer.state())  # a measure may export
    measured = run.measure(progress.epoch)
    if run.world.primary:
        attempt("a row of summary.csv", lambda: run.folder.add_row(epoch, metrics, measured, trainer.lr), note)
        numbers = {f"eval_{name}": value for name, value in measured.items() if value != ""}
        for log in run.logs:
            attempt("the log of an epoch", lambda log=log: log(epoch, {**metrics, **numbers, "lr": trainer.lr}), note)
    shown = [f"  {name} {float(value):.3f}" for name, value in [*measured.items()][: run.shown_measures]]
    epochs = f"{progress.epoch}/{run.plan.epochs}"
    note(f"epoch {epochs}  loss {losses['loss']:.4f}{''.join(shown)}  {metrics['seconds']:.0f} s")


def save(run: Run, milestone: bool = False) -> None:
    """Writes the export, the checkpoint and the report, on rank 0."""
    run.progress.sums = run.trainer.read_sums()
    if run.world.primary:
        with run.world.writing:
            _write(run, milestone)
    run.saved = time.monotonic()


def _write(run: Run, milestone: bool) -> None:
    checkpoint = Checkpoint(run.settings, run.progress, run.trainer.state())
    run.folder.check_finite(checkpoint.state)
    failed = run.export()
    run.folder.save(checkpoint, milestone)
    start, over = time.monotonic(), bool(run.stop) or run.ended
    if run.folder.summary.exists() and (over or start >= run.next_report):  # an epoch is complete
        # ValueError: somebody may have changed the folder's files
        attempt("the report", run.report, run.bar.note, (OSError, ValueError))
        run.next_report = time.monotonic() + REPORT_PAUSE * (time.monotonic() - start)
    if failed and run.ended:
        raise NotSavedError(f"The model was not exported. {run.folder.last_whole}")
