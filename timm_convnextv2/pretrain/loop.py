"""The pretraining loop, to read from top to bottom and to change.

What is long stands elsewhere: an update and its state in `Trainer`, the folder and its checkpoints in `RunFolder`, the
data in `batches`, what is looked at between epochs in `measures`.
"""

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from ..checkpoint import export_encoder
from ..command import refused, say
from ..data import PretrainTransform, create_source
from ..memory import memory_estimate, peak_memory
from ..models import FCMAE
from ..provenance import resolve_license
from ..report import ProgressBar, Stopwatch, check_logs, open_logs, save_loss_curve
from .batches import Bad, Batches, DataError, open_batches, worker_died
from .distributed import Seat, World
from .inputs import check_input, input_line, input_warnings
from .lock import release_locks
from .measures import Measure, attempt, measure_epoch, reconstructions
from .messages import (
    VERSIONS,
    about_run,
    ema_warnings,
    how_made,
    memory_line,
    next_commands,
    not_finite,
    resume_hint,
    stopped,
)
from .options import inherit, parse_options, settings_of
from .peers import leave
from .plan import Plan, make_plan
from .replay import load_weights, read_record, replay, write_record
from .run_folder import NotSavedError, Progress, RunFolder, experiment_name
from .start import Start, create_fcmae, open_start, short_name
from .trainer import NotFiniteError, Trainer, check_compile_backend

__all__ = ["Run", "main", "set_up", "train"]


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
    stop: str = ""  # why it ends before its end
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was


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
        measured = measure_epoch(run.measures, progress.epoch, plan.epochs, trainer.model.encoder, run.bar.note)
        attempt("a row of summary.csv", lambda: run.folder.add_row(epoch, metrics, measured, trainer.lr), run.bar.note)
        for log in run.logs:
            attempt(
                "the log of an epoch",
                lambda log=log: log(epoch, {**metrics, **measured, "lr": trainer.lr}),
                run.bar.note,
            )
    run.bar.note(f"epoch {progress.epoch}/{plan.epochs}  loss {loss:.4f}  {metrics['seconds']:.0f} s")


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
    export = partial(
        export_encoder,
        run.trainer.model,
        folder.encoder,
        state_dict=state.get("state_dict_ema"),
        mean=settings["mean"],
        std=settings["std"],
        license=settings["license"] or None,
        info=how_made(settings, run.progress, run.plan),
    )
    failed = attempt("the export of the encoder", export, run.bar.note)
    if folder.summary.exists():
        attempt("the loss curve", lambda: save_loss_curve(folder.summary, folder.path / "loss.png"), run.bar.note)
    folder.save(state, settings, run.progress, milestone)
    if failed and run.progress.epoch >= run.plan.epochs:
        raise NotSavedError(f"The encoder was not exported. {folder.last_whole}")


# --- what a run needs, made from the options


def set_up(args: argparse.Namespace, start: Start | None, world: World) -> Run | None:
    """Opens and checks everything; only then is anything written.

    Args:
        args: The options, see `options.parse_options`.
        start: The timm folder to start from.
        world: The processes of the run.

    Returns:
        The run, in its folder and with the state of its checkpoint; None after --dry-run.

    Raises:
        ValueError: A mistake in settings, data or folder.
    """
    model = create_model(args, start)
    batches = open_data(args, model, world)
    check_input(batches.inputs)
    plan = plan_of(args, batches, world)
    if not args.experiment:
        if args.resume == "auto":
            raise ValueError("--resume auto needs --experiment, the folder of the run that is to resume.")
        args.experiment = experiment_name(args.model, args.input_size, world)
    model_folder = args.model.removeprefix("local-dir:") if start else None
    sources = [place for place in (args.data_dir, args.weights, None if args.weights else model_folder) if place]
    folder = RunFolder(args.output, args.experiment, args.resume, args.overwrite, sources)
    settings = settings_of(inherit(args, folder.checkpoint))
    progress = folder.progress(settings, world.size, batches.num_images)
    batches.check_resume(progress.stream_workers, progress.update)
    progress.stream_workers = batches.stream_workers
    world.agree({"the number of images": batches.num_images, "the package versions": VERSIONS, **shared(settings)})
    check_logs(args.log_wandb, args.log_tensorboard)
    check_compile_backend(args.torchcompile)
    about = about_run(args.model, model, plan, batches.num_images, args.input_size, world.size, world.device)
    about += f"\n{input_line(batches.inputs)}"
    for warning in [*input_warnings(batches.inputs), *ema_warnings(settings, plan.updates)]:
        say(f"warning: {warning}", error=True)
    if args.dry_run:
        fixed, step = memory_estimate(model, args.batch_size, ema=args.model_ema, amp=args.amp, device=world.device)
        world.say(yaml.safe_dump(settings, sort_keys=False) + f"{about}\n{memory_line(fixed, step, args.batch_size)}")
        return None

    trainer = create_trainer(args, model, plan, world)
    if folder.checkpoint is not None:
        folder.restore(trainer, progress, plan.updates_per_epoch)
        about += f"\nResumed from {folder.resumed_from}: epoch {progress.epoch + 1}, update {progress.update + 1}"
    world.wait()  # no process may find the folder already claimed
    if world.primary:
        folder.claim(settings, VERSIONS, progress.epoch)
        logs = open_logs(folder.path, settings, args.log_wandb, args.wandb_project, args.log_tensorboard)
    world.wait()  # nor train where the first could not claim it
    world.training = True
    trainer.wrap(args.torchcompile)
    world.say("\n".join([*folder.notes, about, f"Writing to {folder.path}"]))
    done = progress.epoch * plan.updates_per_epoch + progress.update
    bar = ProgressBar(plan.updates, done, plan.epochs, args.log_interval, world.primary)
    measures = create_measures(args, trainer, batches, folder)
    return Run(settings, trainer, batches, plan, folder, progress, measures, logs if world.primary else [], bar)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all processes must have; places and devices may be others on another machine."""
    return {f"--{k.replace('_', '-')}": v for k, v in settings.items() if k not in ("data_dir", "output", "device")}


def create_model(args: argparse.Namespace, start: Start | None) -> FCMAE:
    """The FCMAE that the options name; its licence is checked now, not at the first export."""
    model = create_fcmae(
        args.model,
        start,
        seed=args.seed,
        pretrained=args.pretrained,
        model_kwargs=args.model_kwargs,
        grad_checkpointing=args.grad_checkpointing,
        img_size=tuple(args.input_size[1:]),
        in_chans=args.in_chans,
        patch_size=args.patch_size,
        mask_ratio=args.mask_ratio,
        decoder_depth=args.decoder_depth,
        decoder_dim=args.decoder_dim,
        norm_pix_loss=args.norm_pix_loss,
    )
    resolve_license(args.license or None, model.encoder.pretrained_cfg.get("license"))
    return model


def open_data(args: argparse.Namespace, model: FCMAE, world: World | Seat) -> Batches:
    """The data that the options name."""
    transform = PretrainTransform(
        tuple(args.input_size[1:]), tuple(args.scale), tuple(args.ratio), args.hflip, args.vflip,
        args.train_interpolation, tuple(args.mean), tuple(args.std),
    )  # fmt: skip
    source = partial(
        create_source, args.data_dir, args.dataset, args.train_split, args.in_chans, args.input_key,
        args.dataset_download, args.train_num_samples, args.batch_size, args.seed,
        nodata=args.nodata,
    )  # fmt: skip
    return open_batches(
        source,
        transform,
        grid=model.grid(*args.input_size[1:]),
        mask_ratio=args.mask_ratio,
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        pin_mem=args.pin_mem,
        world=world,
    )


def plan_of(args: argparse.Namespace, batches: Batches, world: World) -> Plan:
    """Length and learning rate that the options ask for."""
    return make_plan(
        epochs=args.epochs,
        batches_per_epoch=batches.per_epoch,
        batch_size=args.batch_size,
        grad_accum_steps=args.grad_accum_steps,
        world_size=world.size,
        num_images=batches.num_images,
        lr=args.lr,
        lr_base=args.lr_base,
        lr_base_size=args.lr_base_size,
        warmup_epochs=args.warmup_epochs,
    )


def create_trainer(args: argparse.Namespace, model: FCMAE, plan: Plan, world: World) -> Trainer:
    """The trainer that the options ask for."""
    return Trainer(
        model,
        plan,
        world,
        seed=args.seed,
        grad_accum_steps=args.grad_accum_steps,
        opt=args.opt,
        betas=tuple(args.opt_betas),
        eps=args.opt_eps,
        weight_decay=args.weight_decay,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        clip_grad=args.clip_grad,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
        ema_decay=args.model_ema_decay if args.model_ema else None,
        ema_warmup=args.model_ema_warmup,
        skip_bad=args.max_bad_steps > 0,
    )


def create_measures(args: argparse.Namespace, trainer: Trainer, batches: Batches, folder: RunFolder) -> list[Measure]:
    """What is looked at between epochs; add yours here."""

    def title(epoch: int) -> str:
        return f"{short_name(args.model)}, epoch {epoch} of {args.epochs}, loss {trainer.mean_loss:.3f}"

    draw = reconstructions(folder.path / "reconstructions", trainer.model, batches.shown, args.mean, args.std, title)
    return [Measure(draw, args.recon_interval)]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake in settings or data is one message and exit status 2.

    Args:
        argv: The options; those of the process by default.

    Returns:
        Exit status: 0, 1 where the run could not finish, 2 for a mistake.
    """
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        args, start = parse_options(argv)
        if args.replay:
            return replay_bad_step(args, argv)
        world = World(args.device)
        run = set_up(args, start, world)
        if run is None:
            return 0
        train(run, world)
    except Exception as e:
        return ended_by(e, run, world)
    finally:
        release_locks()
        end_workers({*multiprocessing.active_children()} - others)
        if world is not None:
            world.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if not run.stop:
        say(f"Done: the encoder is in {run.folder.encoder}")
        say(next_commands(run.settings, run.folder.path, run.plan.epochs))
        return 0
    say(stopped(run.progress, run.plan, run.stop, args.max_bad_images, args.experiment))
    return int(run.stop == "images")


def end_workers(workers: set[BaseProcess]) -> None:
    """Ends data workers, for which Python would wait for ever: they ignore SIGTERM."""
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a fault, and raises it
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    signal.signal(signal.SIGCHLD, handler)


def ended_by(error: Exception, run: Run | None, world: World | None) -> int:
    """Tells an error that has ended the run, once and on the process where it arose; the others end without a word.

    Returns:
        Exit status. What is no user's mistake is raised again, for its traceback.
    """
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused("pretrain", error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # what waits for the other processes would wait for ever
    if isinstance(error, NotFiniteError) and run is not None:
        return end_not_finite(error, run, world)
    if not world.training and isinstance(error, ValueError | RuntimeError):
        world.tell(f"timm-convnextv2 pretrain: error: {error}")
        return 2
    reason = worker_died(error) or (str(error) if isinstance(error, DataError | NotSavedError) else "")
    if not reason and world.distributed:  # before the others end, at which torchrun ends this one
        world.tell(f"Process {world.rank} of {world.size} fails:\n{''.join(traceback.format_exception(error))}")
        return 1
    if not reason or run is None:
        raise error
    world.tell(f"timm-convnextv2 pretrain: {reason}\n{resume_hint(run.folder.path.name)}")
    return 1


def end_not_finite(error: NotFiniteError, run: Run, world: World) -> int:
    """Tells of a loss that is not finite, which all processes found at once, and keeps what repeats it."""
    if world.primary:
        record = keep_bad_step(run, world, error, weights=True)
        world.tell(not_finite(error, run.settings["max_bad_steps"], record))
    else:
        with contextlib.suppress(RuntimeError):
            world.wait()  # or the first one would be asked to end while it writes
    return 1


def replay_bad_step(args: argparse.Namespace, argv: list[str] | None) -> int:
    """--replay: repeats the forward of an update whose loss was not finite; returns exit status 0.

    Args:
        args: The options.
        argv: As given; of them, --data-dir and --device win over those of the run.

    Raises:
        ValueError: The record, its weights or the data cannot be read.
    """
    path = Path(args.replay)
    record = read_record(path)
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    own = {k: getattr(args, k) for k in ("data_dir", "device") if f"--{k.replace('_', '-')}" in given}
    vars(args).update(record["settings"] | own | {"pretrained": False, "weights": None})
    if record["images"][0] is not None:
        args.workers = 0  # they change nothing but the order of streams
    device = World(args.device).device
    model = create_model(args, open_start(args.model))
    say(f"Weights: {load_weights(record, path, model)}")
    found = ""
    for finding in replay(record, model, lambda rank: open_data(args, model, Seat(rank, record["world_size"])), device):
        found = found or finding.cause
        what = finding.cause or "everything is finite"
        say(f"Process {finding.rank}, batch {finding.step + 1}: loss {finding.loss:.4g}; {what}")
    if not found:
        say(f"The loss was {record['loss']}, and is finite here: it depends on device, compilation, or other weights.")
    return 0
