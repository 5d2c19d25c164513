"""What a run needs, made from the options and checked before anything is written."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from ..checkpoint.provenance import resolve_license
from ..commands.images import parts_of, pixels_of
from ..console import say
from ..data import DataSet, ImagePaths, Pixels, PretrainTransform, StreamOrder, collate, create_source
from ..data.paths.index import check_index_option, find_images, open_index
from ..data.paths.places import Listing, Place, as_list, base_of, places_of
from ..data.samples.batches import preprocessing
from ..features import open_labelled
from ..models import FCMAE
from ..models.memory import memory_estimate
from ..runs.end import VERSIONS, leave_signals_to_parent
from ..runs.folder import experiment_name
from ..runs.logs import check_logs, open_logs
from ..runs.progress import ImageProgress, ProgressBar, with_progress
from ..runs.summary import read_rows
from ..runs.world import Seat, World
from .batches import Batches, open_batches
from .checkpoints import RunFolder
from .config import inherit, settings_of
from .inputs import check_input, input_line, input_warnings, resolve_auto
from .loop import Run
from .measures import Best, Measure, collapse_of_blocks, held_out_loss, reconstructions
from .messages import about_run, ema_warnings, memory_line
from .plan import Plan, make_plan, split_batch
from .probe import Probe
from .start import Start, create_fcmae, short_name
from .trainer import Trainer, check_compile_backend


def find_files(args: argparse.Namespace, world: World) -> Listing | None:
    """The files that the options name; None where the images are those of a data set.

    The first process lists them, and the others receive the names. Where another process has another folder, as
    machines with copies of their own may, each lists what it has. An index is written by the first and opened by all.

    Args:
        args: The options.
        world: The processes of the run.

    Raises:
        ValueError: A folder or list cannot be read, too many files are missing, or the index cannot be used.
    """
    check_index_option(args.dataset, args.index)
    if args.dataset:
        return None
    places = places_of(args.data_dir, args.data_list)
    alone = not args.index and len({*world.gather([_identity(places)])}) > 1
    found = error = None
    if world.primary or alone:
        bar = ImageProgress(None, enabled=world.primary)
        try:
            found = find_images(
                args.data_dir, args.data_list, index=args.index, max_missing=args.max_bad_images, tick=bar.update,
                tell=partial(say, error=True),
            )  # fmt: skip
        except (ValueError, OSError) as e:
            if alone:
                raise
            error = str(e)  # the others must not wait
        finally:
            bar.close()
    if alone:
        return found
    found, error = world.share((None if args.index else found, error))
    if error is not None:
        raise ValueError(error)
    return open_index(args.index, places) if args.index else found.at(places)


def _identity(places: list[Place]) -> tuple:
    """What tells a folder from another of the same name on another machine: when it had last changed."""
    return tuple((*place, os.path.abspath(place.root), os.stat(place.root or ".").st_mtime_ns) for place in places)


def set_up(args: argparse.Namespace, start: Start | None, world: World, command: str = "") -> Run | None:
    """Opens and checks everything; only then is anything written.

    Args:
        args: The options, see `options.parse_options`.
        start: The timm folder to start from.
        world: The processes of the run.
        command: That started it, for its args.yaml and its report.

    Returns:
        The run, in its folder and with the state of its checkpoint; None after --dry-run.

    Raises:
        ValueError: A mistake in settings, data or folder.
    """
    if args.global_batch_size is not None:
        args.batch_size, args.grad_accum_steps = split_batch(args.global_batch_size, args.batch_size, world.size)
    model = create_model(args, start)
    folder = open_folder(args, start, world)
    listing = find_files(args, world)
    open_pixels = partial(open_source, args, listing=listing)
    measured = resolve_auto(args, (folder.checkpoint or {}).get("args"), open_pixels, world)
    batches = open_data(args, model, world, listing)
    check_input(batches.inputs)
    probe = open_probe(args, world.device) if args.probe_dir and world.primary else None
    plan = plan_of(args, batches, world)
    settings = settings_of(inherit(args, folder.checkpoint))
    progress = folder.progress(settings, world.size, batches.num_images)
    batches.check_resume(progress.stream_workers, progress.update)
    progress.stream_workers = batches.stream_workers
    world.agree({"the number of images": batches.num_images, "the package versions": VERSIONS, **shared(settings)})
    check_logs(args.log_wandb, args.log_tensorboard)
    check_compile_backend(args.torchcompile)
    about = about_run(args.model, model, plan, batches.num_images, args.input_size, world.size, world.device)
    if batches.held_out is not None:
        about += f"\n{len(batches.held_out)} more images are held out, for eval_loss"  # type: ignore[arg-type]
    about += "".join(f"\n{line}" for line in batches.sampling())
    about += f"\n{measured}" if measured else ""
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
        folder.claim(settings, VERSIONS, progress.epoch, command)
        logs = open_logs(folder.path, settings, args.log_wandb, args.wandb_project, args.log_tensorboard)
    world.wait()  # nor train where the first could not claim it
    world.training = True
    trainer.wrap(args.torchcompile)
    world.say("\n".join([*folder.notes, about, f"Writing to {folder.path}"]))
    done = progress.epoch * plan.updates_per_epoch + progress.update
    bar = ProgressBar(plan.updates, done, plan.epochs, args.log_interval, world.primary)
    measures = create_measures(args, trainer, batches, folder, plan)
    if probe is not None:
        measures.append(probe_measure(args, probe, trainer.model.encoder, folder, bar.note))
    best = Best(args.keep_best, read_rows(folder.summary)[0]) if args.keep_best and world.primary else None
    return Run(settings, trainer, batches, plan, folder, progress, measures, logs if world.primary else [], bar, best)


def open_folder(args: argparse.Namespace, start: Start | None, world: World) -> RunFolder:
    """The run's folder, with the checkpoint to resume from; names the run where --experiment does not."""
    if not args.experiment:
        if args.resume == "auto":
            raise ValueError("--resume auto needs --experiment, the folder of the run that is to resume.")
        args.experiment = experiment_name(args.model, args.input_size, world)
    model_folder = args.model.removeprefix("local-dir:") if start else None
    places = [*map(base_of, as_list(args.data_dir)), *as_list(args.data_list), args.index]
    sources = [place for place in (*places, args.weights, None if args.weights else model_folder) if place]
    return RunFolder(args.output, args.experiment, args.resume, args.overwrite, sources)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all processes must have; places and devices may be others on another machine."""
    own = ("data_dir", "data_list", "index", "output", "device")
    # NaN as text: it differs from itself
    return {f"--{k.replace('_', '-')}": v if v == v else str(v) for k, v in settings.items() if k not in own}


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


def open_data(args: argparse.Namespace, model: FCMAE, world: World | Seat, listing: Listing | None = None) -> Batches:
    """The data that the options name, of files that have been listed before."""
    transform = PretrainTransform(
        tuple(args.input_size[1:]), tuple(args.scale), tuple(args.ratio), args.hflip, args.vflip,
        args.train_interpolation, tuple(args.mean), tuple(args.std),
    )  # fmt: skip
    return open_batches(
        partial(open_source, args, pixels_of(args), listing, world.primary),
        transform,
        grid=model.grid(*args.input_size[1:]),
        mask_ratio=args.mask_ratio,
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        pin_mem=args.pin_mem,
        world=world,
        holdout=args.holdout,
    )


def open_source(args: argparse.Namespace, pixels: Pixels, listing: Listing | None = None, primary: bool = True) -> Any:
    """The images that the options name, or their windows and pages; the first process shows how far it is."""
    data_set = DataSet(args.dataset, args.train_split, args.train_num_samples, args.dataset_download, args.input_key)
    source = create_source(
        ImagePaths(args.data_dir, args.data_list), data_set, args.in_chans, pixels,
        order=StreamOrder(args.batch_size, args.seed), source_weights=args.source_weights, listing=listing,
    )  # fmt: skip
    return with_progress(lambda tick: parts_of(args, source, tick), primary)


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
        channel_dropout=args.channel_dropout,
        skip_bad=args.max_bad_steps > 0,
    )


def create_measures(
    args: argparse.Namespace, trainer: Trainer, batches: Batches, folder: RunFolder, plan: Plan
) -> list[Measure]:
    """What is looked at between epochs; add yours here."""

    def title(epoch: int) -> str:
        return f"{short_name(args.model)}, epoch {epoch} of {args.epochs}, loss {trainer.mean_loss:.3f}"

    draw = reconstructions(folder.path / "reconstructions", trainer.model, batches.shown, args.mean, args.std, title)
    measures = [Measure(draw, args.recon_interval)]
    if batches.held_out is not None:
        loader = held_out_loader(batches.held_out, args.batch_size, args.workers)
        measures.append(Measure(held_out_loss(lambda: trainer.exported, loader, trainer.amp_dtype), 1, ("loss",)))
    runs = 2 + plan.epochs // args.recon_interval
    watched = affordable(batches.watched, plan.updates * plan.images_per_update, runs)
    collapse = collapse_of_blocks(folder.path / "collapse.csv", watched)
    return [*measures, Measure(collapse, args.recon_interval, ("distance", "dead"))]


def affordable(images: list, images_seen: int, runs: int) -> list:
    """As many of the images that a measure looks at as cost about a hundredth of the run; at least eight.

    Args:
        images: All of them.
        images_seen: By the training; an update of FCMAE costs about as much per image as the forward of a whole one.
        runs: Of the measure.
    """
    count = min(len(images), max(8, images_seen // (100 * runs)))
    return [images[i * len(images) // count] for i in range(count)]


def held_out_loader(images: Dataset, batch_size: int, workers: int) -> DataLoader:
    """The held-out images in batches, always in the same order; two data processes at most, which stay."""
    workers = min(workers, 2)
    return DataLoader(
        images, batch_size, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate,
        worker_init_fn=leave_signals_to_parent, generator=torch.Generator(),
    )  # fmt: skip


def open_probe(args: argparse.Namespace, device: torch.device) -> Probe:
    """The labelled images that the options name, with the evaluation transform of the run's size."""
    labelled = open_labelled(args.probe_dir, in_chans=args.in_chans, seed=args.seed, pixels=pixels_of(args))
    config = dict(input_size=args.input_size, interpolation="bicubic", crop_pct=0.875, crop_mode="center")
    transform = preprocessing({**config, "mean": args.mean, "std": args.std})
    return Probe(labelled, args.probe_dir, transform, args.batch_size, args.workers, device, args.amp)


def probe_measure(
    args: argparse.Namespace, probe: Probe, encoder: Any, folder: RunFolder, note: Callable[[str], Any]
) -> Measure:
    """The probe as a measure; what random weights and plain pixels reach is measured first, and told."""

    def random_encoder() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers stay
            torch.manual_seed(args.seed)
            return timm.create_model(encoder.pretrained_cfg["architecture"], num_classes=0, **encoder._model_args)

    base = probe.baselines(folder.path / "probe.json", random_encoder)
    texts = [f"{name} kNN {found['knn']:.1f} %, ridge {found['ridge']:.1f} %" for name, found in base.items()]
    note(f"Frozen features on {len(probe.labelled.test.labels)} test images, {probe.unit}: {'; '.join(texts)}")
    run = probe.measure(folder.path / "neighbours", args.mean, args.std)
    return Measure(run, args.probe_interval, probe.columns)
