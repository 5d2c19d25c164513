"""Builds and validates everything a run needs before writing any file.

`set_up` is the only place that sees the whole config; what it calls takes the parts that it needs. Its order matters:
cheap refusals come before a folder of millions of files is listed, and the folder is claimed last.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import build, evolve, flat, from_mapping
from ..console import say
from ..data import Pixels, StreamOrder, create_source
from ..data.paths.index import check_index_option
from ..data.paths.places import Listing, as_list, base_of
from ..data.samples.batches import preprocessing
from ..data.sources.open import pages_and_windows
from ..features import open_labelled
from ..models import FCMAE
from ..models.memory import memory_estimate
from ..runs.end import VERSIONS
from ..runs.folder import experiment_name
from ..runs.logs import check_logs, open_logs
from ..runs.progress import ProgressBar, with_progress
from ..runs.summary import read_rows
from ..runs.world import Seat, World
from .batches import Batches, Sampling, find_files, open_batches, transform_of
from .checkpoints import RunFolder
from .config import PretrainConfig
from .inputs import check_input, input_line, input_warnings
from .loop import Run
from .measures import Best, Measure, affordable, collapse_of_blocks, held_out_loss, reconstructions
from .messages import about_run, ema_warnings, memory_line
from .plan import Plan, make_plan, split_batch
from .probe import Probe, Rows, random_encoder
from .replay import read_record
from .resolve import measure
from .start import Start, create_model, open_start, short_name
from .trainer import Trainer, check_compile_backend


def set_up(config: PretrainConfig, start: Start | None, world: World, command: str = "") -> Run | None:
    """Opens and checks everything; only then writes.

    Args:
        config: The options, see `resolve.configure`.
        start: The model to start from.
        world: The processes of the run.
        command: The command that started it, for args.yaml and the report.

    Returns:
        The run, in its folder and with the state of its checkpoint; None after --dry-run.

    Raises:
        ValueError: A mistake in settings, data or folder.
    """
    config = split_between(config, world.size)
    # The model, which seeds the random numbers, and the folder first: their refusals take no time.
    model = create_model(
        config.network, config.crops, seed=config.seed, start=start, license=config.destination.license
    )
    if not config.destination.experiment:
        config = evolve(config, experiment=name_run(config, world))
    folder = open_folder(config, start)
    before = (folder.checkpoint or {}).get("args", {})
    if config.average.model_ema_warmup is None:  # a resumed run keeps what it began with
        config = evolve(config, model_ema_warmup=before.get("model_ema_warmup") is not False)

    # Then the data. From here on no option is `auto`.
    check_index_option(config.data_set.dataset, config.paths.index)
    listing = None if config.data_set.dataset else find_files(config.paths, config.selection.max_bad_images, world)
    config, measured = measure(config, before, partial(open_source, config, listing, world.primary), world)
    batches = open_data(config, model, listing, world)
    check_input(batches.inputs)
    probe = None
    if config.measures.probe_dir and world.primary:
        probe = open_probe(config, config.measures.probe_dir, world.device)
    plan = make_plan(config.schedule, batches.per_epoch, batches.num_images, world.size)

    # The checkpoint must fit what is now known: model, number of images, order of a stream.
    settings = flat(config)
    progress = folder.progress(settings, world.size, batches.num_images)
    batches.check_resume(progress.stream_workers, progress.update)
    progress.stream_workers = batches.stream_workers
    world.agree({"the number of images": batches.num_images, "the package versions": VERSIONS, **shared(settings)})
    check_logs(config.destination.log_wandb, config.destination.log_tensorboard)
    check_compile_backend(config.compute.torchcompile)

    about = [about_run(config.network.model, model, plan, batches.num_images, world)]
    if batches.held_out is not None:
        about.append(f"{len(batches.held_out)} more images are held out, for eval_loss")
    about += [*batches.sampling(), *([measured] if measured else []), input_line(batches.inputs)]
    for warning in [*input_warnings(batches.inputs), *ema_warnings(config.average, plan.updates)]:
        say(f"warning: {warning}", error=True)
    if config.dry_run:
        batch_size, ema, amp = config.schedule.batch_size, config.average.model_ema, config.compute.amp
        memory = memory_line(*memory_estimate(model, batch_size, ema=ema, amp=amp, device=world.device), batch_size)
        world.say(yaml.safe_dump(settings, sort_keys=False) + "\n".join([*about, memory]))
        return None

    trainer = create_trainer(config, model, plan, world)
    if folder.checkpoint is not None:
        folder.restore(trainer, progress, plan.updates_per_epoch)
        about.append(f"Resumed from {folder.resumed_from}: epoch {progress.epoch + 1}, update {progress.update + 1}")
    logs, destination = [], config.destination
    world.wait()  # every process has looked at the folder before one changes it
    if world.primary:
        folder.claim(settings, VERSIONS, progress.epoch, command)
        logs = open_logs(
            folder.path, settings, destination.log_wandb, destination.wandb_project, destination.log_tensorboard
        )
    world.wait()  # no process trains if rank 0 could not claim it
    world.training = True
    trainer.wrap(config.compute.torchcompile)  # after the weights of the checkpoint: DDP sends those of rank 0
    world.say("\n".join([*folder.notes, *about, f"Writing to {folder.path}"]))
    done = progress.epoch * plan.updates_per_epoch + progress.update
    bar = ProgressBar(plan.updates, done, plan.epochs, destination.log_interval, world.primary)
    measures = create_measures(config, trainer, batches, folder.path, plan)
    if probe is not None:
        base = probe.baselines(folder.path / "probe.json", partial(random_encoder, trainer.model.encoder, config.seed))
        bar.note(probe.describe(base))
        run = probe.measure(folder.path / "neighbours")
        measures.append(Measure(run, config.measures.probe_interval or 1, probe.columns))
    name = config.measures.keep_best
    best = Best(name, read_rows(folder.summary)[0]) if name and world.primary else None
    return Run(settings, trainer, batches, plan, folder, progress, measures, logs, bar, best)


def split_between(config: PretrainConfig, world_size: int) -> PretrainConfig:
    """Splits --global-batch-size, if given, between processes and steps."""
    schedule = config.schedule
    if schedule.global_batch_size is None:
        return config
    batch_size, steps = split_batch(schedule.global_batch_size, schedule.batch_size, world_size)
    return evolve(config, batch_size=batch_size, grad_accum_steps=steps)


def name_run(config: PretrainConfig, world: World) -> str:
    """A name for a run without --experiment."""
    if config.destination.resume == "auto":
        raise ValueError("--resume auto needs --experiment, the folder of the run that is to resume.")
    return experiment_name(config.network.model, [config.crops.in_chans, *config.crops.size], world)


def open_folder(config: PretrainConfig, start: Start | None) -> RunFolder:
    """The run's folder, with the checkpoint to resume from. It must not overlap with anything that the run reads."""
    network, destination = config.network, config.destination
    read = [*map(base_of, as_list(config.paths.data_dir)), *as_list(config.paths.data_list), config.paths.index]
    read.append(network.weights or (network.model.removeprefix("local-dir:") if start else None))
    sources = [place for place in read if place]
    return RunFolder(destination.output, destination.experiment, destination.resume, destination.overwrite, sources)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all processes must have; paths and devices may differ between machines."""
    own = ("data_dir", "data_list", "index", "output", "device")
    # NaN as text: it differs from itself
    return {f"--{k.replace('_', '-')}": v if v == v else str(v) for k, v in settings.items() if k not in own}


def open_source(config: PretrainConfig, listing: Listing | None, show: bool, pixels: Pixels) -> Any:
    """The images that the options name, or their windows and pages.

    Args:
        config: The options.
        listing: From `find_files`; None for a data set.
        show: Show progress; True on rank 0.
        pixels: How stored values become pixels.
    """
    source = create_source(
        config.paths,
        config.data_set,
        config.crops.in_chans,
        pixels,
        order=StreamOrder(config.schedule.batch_size, config.seed),
        source_weights=config.selection.source_weights,
        listing=listing,
    )
    return with_progress(partial(pages_and_windows, source, config.pixels, config.windows), show)


def open_data(config: PretrainConfig, model: FCMAE, listing: Listing | None, world: World | Seat) -> Batches:
    """The images of the run in batches, without `auto` options."""
    crops = config.crops
    return open_batches(
        partial(open_source, config, listing, world.primary, config.pixels.to_pixels()),
        Sampling(transform_of(crops), model.grid(*crops.size), config.network.mask_ratio, config.seed),
        batch_size=config.schedule.batch_size,
        loading=config.loading,
        world=world,
        holdout=config.selection.holdout,
    )


def create_trainer(config: PretrainConfig, model: FCMAE, plan: Plan, world: World) -> Trainer:
    """The trainer that the options describe."""
    optimizer, average = config.optimizer, config.average
    return Trainer(
        model,
        plan,
        world,
        seed=config.seed,
        grad_accum_steps=config.schedule.grad_accum_steps,
        opt=optimizer.opt,
        betas=optimizer.opt_betas,
        eps=optimizer.opt_eps,
        weight_decay=optimizer.weight_decay,
        min_lr=optimizer.min_lr,
        warmup_lr=optimizer.warmup_lr,
        clip_grad=optimizer.clip_grad,
        amp_dtype=config.compute.dtype,
        ema_decay=average.model_ema_decay if average.model_ema else None,
        ema_warmup=bool(average.model_ema_warmup),
        channel_dropout=config.network.channel_dropout,
        skip_bad=optimizer.max_bad_steps > 0,
    )


def create_measures(
    config: PretrainConfig, trainer: Trainer, batches: Batches, folder: Path, plan: Plan
) -> list[Measure]:
    """What is measured and drawn between epochs; add yours here."""
    name, interval = short_name(config.network.model), config.measures.recon_interval or 1

    def title(epoch: int) -> str:
        return f"{name}, epoch {epoch} of {plan.epochs}, loss {trainer.mean_loss:.3f}"

    draw = reconstructions(folder / "reconstructions", trainer.model, batches.shown, config.crops.normalization, title)
    measures = [Measure(draw, interval)]
    if batches.held_out is not None:
        loader = batches.held_out.loader(config.schedule.batch_size, config.loading.workers)
        measures.append(Measure(held_out_loss(lambda: trainer.exported, loader, trainer.amp_dtype), 1, ("loss",)))
    watched = affordable(batches.watched, plan.updates * plan.images_per_update, 2 + plan.epochs // interval)
    collapse = collapse_of_blocks(folder / "collapse.csv", watched)
    return [*measures, Measure(collapse, interval, ("distance", "dead"))]


def open_probe(config: PretrainConfig, place: str, device: torch.device) -> Probe:
    """The labelled images of --probe-dir, with the evaluation transform of the run's size."""
    crops, (mean, std) = config.crops, config.crops.normalization
    labelled = open_labelled(place, in_chans=crops.in_chans, seed=config.seed, pixels=config.pixels.to_pixels())
    size = (crops.in_chans, *crops.size)
    transform = preprocessing(
        dict(input_size=size, interpolation="bicubic", crop_pct=0.875, crop_mode="center", mean=mean, std=std)
    )
    rows = Rows(transform, config.schedule.batch_size, config.loading.workers, device, config.compute.amp)
    return Probe(labelled, place, rows, (mean, std))


def open_replay(
    path: Path, own: dict[str, Any]
) -> tuple[dict[str, Any], FCMAE, Callable[[int], Batches], torch.device]:
    """Builds what `replay.replay` needs: the record, the model, a function that opens a process's data, the device.

    Args:
        path: The record of an update.
        own: Options that replace those of the run.
    """
    record = read_record(path)
    settings = from_mapping(PretrainConfig, record["settings"], f"--replay {path}")
    config = build(PretrainConfig, settings, own, {"pretrained": False, "weights": None})
    if record["images"][0] is not None:
        config = evolve(config, workers=0)  # the number of workers matters for streams only
    world = World(config.compute.device)
    listing = None if config.data_set.dataset else find_files(config.paths, config.selection.max_bad_images, world)
    start = open_start(config.network.model)
    model = create_model(config.network, config.crops, seed=config.seed, start=start)

    def open_rank(rank: int) -> Batches:
        return open_data(config, model, listing, Seat(rank, record["world_size"]))

    return record, model, open_rank, world.device
