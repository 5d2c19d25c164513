"""The pretraining loop, to read from top to bottom and to change.

What is long stands elsewhere: an update and its state in `Trainer`, the folder and its checkpoints in `RunFolder`, the
data in `batches`, what is looked at between epochs in `measures`.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from .batches import Bad, Batches, open_batches
from .distributed import World
from .lock import release_locks
from .measures import Measure, attempt, measure_epoch, reconstructions
from .messages import VERSIONS, about_run, how_made, memory_line, next_commands, resume_command, stopped
from .options import parse_options, settings_of
from .plan import Plan, make_plan
from .run_folder import NotSavedError, Progress, RunFolder, experiment_name
from .start import Start, create_fcmae, short_name
from .trainer import Trainer, check_compile_backend

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


def train(run: Run, world: World) -> None:
    """Trains until the last epoch, a signal, or too many images that cannot be decoded."""
    trainer, plan, progress, bar = run.trainer, run.plan, run.progress, run.bar
    world.watch_signals()
    while progress.epoch < plan.epochs and not run.stop:
        run.batches.set_epoch(progress.epoch, progress.update * trainer.grad_accum_steps)
        stream, clock = iter(run.batches.loader), Stopwatch(plan.images_per_update)
        while progress.update < plan.updates_per_epoch and not run.stop:
            bad, waited = trainer.update(stream, progress.epoch * plan.updates_per_epoch + progress.update)
            progress.update += 1
            clock.count(waited)
            run.stop = reason_to_stop(run, world, bad)
            if bar.step():
                trainer.check_finite()  # here the host waits for the GPU
                bar.show(progress.epoch, float(trainer.loss), trainer.lr, *clock.lap())
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


def reason_to_stop(run: Run, world: World, bad: Bad) -> str:
    """Names the images that could not be decoded; why all processes stop after this update, '' where they do not."""
    asked, some_bad = world.any(bool(world.stop), bool(bad))
    progress = run.progress
    if some_bad:
        for name, why in world.gather(run.batches.named(bad)):
            if name not in progress.bad_images:
                progress.bad_images[name] = why
                count = len(progress.bad_images)
                run.bar.note(f"Skipped an image that cannot be decoded ({count} so far): {why}")
    if len(progress.bad_images) > run.settings["max_bad_images"] * progress.num_images:
        return "images"
    return (world.stop or "a signal") if asked else ""


def finish_epoch(run: Run, world: World, clock: Stopwatch) -> None:
    """Measures and logs an epoch that is complete."""
    trainer, plan, progress = run.trainer, run.plan, run.progress
    loss = trainer.end_epoch(plan.updates_per_epoch)
    epoch, progress.update, progress.loss_sum = progress.epoch, 0, 0.0
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
    if not world.primary:
        return
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
    plan = plan_of(args, batches, world)
    if not args.experiment:
        if args.resume == "auto":
            raise ValueError("--resume auto needs --experiment, the folder of the run that is to resume.")
        args.experiment = experiment_name(args.model, args.input_size, world)
    settings = settings_of(args)
    sources = [place for place in (args.data_dir, args.model.removeprefix("local-dir:") if start else None) if place]
    folder = RunFolder(args.output, args.experiment, args.resume, args.overwrite, sources)
    progress = folder.progress(settings, world.size, batches.num_images)
    check_logs(args.log_wandb, args.log_tensorboard)
    check_compile_backend(args.torchcompile)
    about = about_run(args.model, model, plan, batches.num_images, args.input_size, world.size, world.device)
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


def open_data(args: argparse.Namespace, model: FCMAE, world: World) -> Batches:
    """The data that the options name."""
    transform = PretrainTransform(
        tuple(args.input_size[1:]), tuple(args.scale), tuple(args.ratio), args.hflip, args.vflip,
        args.train_interpolation, tuple(args.mean), tuple(args.std),
    )  # fmt: skip
    source = partial(
        create_source, args.data_dir, args.dataset, args.train_split, args.in_chans, args.input_key,
        args.dataset_download, args.train_num_samples, args.batch_size, args.seed,
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
    world, others = None, {*multiprocessing.active_children()}
    try:
        args, start = parse_options(argv)
        world = World(args.device)
        run = set_up(args, start, world)
        if run is None:
            return 0
        train(run, world)
    except (ValueError, RuntimeError) as e:
        if world is not None and world.training:
            raise
        return refused("pretrain", e)
    except FloatingPointError as e:
        remedies = "--amp-dtype bfloat16 or no --amp, --clip-grad 1, a lower --lr-base"
        print(
            f"timm-convnextv2 pretrain: {e} The update was not made and the last checkpoint is whole. Usual remedies, "
            f"then --resume auto: {remedies}.",
            file=sys.stderr,
        )
        return 1
    except NotSavedError as e:
        say(f"timm-convnextv2 pretrain: {e} Then resume with\n  {resume_command(args.experiment)}", error=True)
        return 1
    finally:
        release_locks()
        for worker in {*multiprocessing.active_children()} - others:  # Python would wait: they ignore SIGTERM
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()
    if not run.stop:
        say(f"Done: the encoder is in {run.folder.encoder}")
        say(next_commands(run.settings, run.folder.path, run.plan.epochs))
        return 0
    say(stopped(run.progress, run.plan, run.stop, args.max_bad_images, args.experiment))
    return int(run.stop == "images")
