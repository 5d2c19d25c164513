"""Builds and validates everything a run needs before writing any file.

`set_up` is the only place that sees the whole config; what it calls takes the parts that it needs. Its order matters:
cheap refusals come before a folder of millions of files is listed, and the folder is claimed last.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import build, evolve, flat, from_mapping
from ..console import Faults, say
from ..data import Pixels, PretrainTransform, StreamOrder, create_source
from ..data.config import as_list
from ..data.formats.files import printable
from ..data.paths.find import check_places, find_files
from ..data.paths.listing import Listing, base_of
from ..data.samples.batches import preprocessing
from ..data.sources.open import pages_and_windows
from ..features import open_labelled
from ..files import read_rows
from ..models import FCMAE
from ..runs.device import check_device
from ..runs.folder import VERSIONS, RunFolder, experiment_name
from ..runs.group import Processes
from ..runs.loop import Limits
from ..runs.plan import Plan
from ..runs.progress import with_progress
from ..runs.trainer import Learning, Trainer, seconds_per_update
from ..runs.world import World
from .batches import Batches, Sampling, open_batches
from .config import PretrainConfig
from .inputs import check_input, input_line, input_warnings
from .loop import WRITTEN, PretrainRun
from .measures import Best, Measure, affordable, collapse_of_blocks, held_out_loss, reconstructions
from .messages import about_run, ema_warnings, few_images, learning_warnings, memory_line, time_line, worker_warnings
from .plan import make_plan, resume_progress, split_batch
from .probe import Probe, Rows, naming_probe, random_encoder
from .recipe import recipe_line
from .replay import read_record
from .resolve import length, measure
from .start import Start, create_model, open_start, short_name
from .trainer import check_compile_backend, create_trainer

# settings that follow from others, which --dry-run leaves out
FOLLOW = {"input_size", "experiment", "warmup_epochs", "model_ema_warmup"}
FOLLOW |= {"milestone_interval", "recon_interval", "probe_interval"}


def set_up(config: PretrainConfig, start: Start | None, world: World, command: str = "") -> PretrainRun | None:
    """Opens and checks everything; only then writes.

    `config` and `start` are from `resolve.configure`; `command` started the run. Returns the run, in its folder with
    the state of its checkpoint; None after --dry-run.
    """
    schedule = config.schedule
    if schedule.global_batch_size is not None:
        batch_size, steps = split_batch(schedule.global_batch_size, schedule.batch_size, world.size)
        config = evolve(config, batch_size=batch_size, grad_accum_steps=steps)
    # First what takes no time: all of its mistakes are refused together.
    where, faults = config.destination, Faults()
    made: list[Any] = []
    with faults.next():  # seeds the random numbers
        made.append(create_model(config.network, config.crops, seed=config.seed, start=start, license=where.license))
    if not where.experiment:
        if where.resume == "auto":
            raise ValueError("--resume auto needs --experiment, the folder of the run that is to resume.")
        size = "x".join(map(str, config.crops.size))
        config = evolve(config, experiment=experiment_name(world, short_name(config.network.model), size))
    with faults.next():
        made.append(open_folder(config, start))
    with faults.next():
        config.logs.check()
    with faults.next():
        check_compile_backend(config.compute.torchcompile)
    if faults.found:  # else they are looked for below, with all that is in them
        look_for_images(config, faults)
    faults.refuse()
    model, folder = made
    before = folder.checkpoint.settings if folder.checkpoint else {}
    if config.average.model_ema_warmup is None:  # a resumed run keeps what it began with
        config = evolve(config, model_ema_warmup=before.get("model_ema_warmup") is not False)

    # Then the data. From here on no option is `auto`.
    listing = find_files(config.paths, config.data_set.dataset, config.selection.max_bad_images, world)
    config, measured = measure(config, before, partial(open_source, config, listing, world.primary), world)
    batches = open_data(config, model, listing, world)
    pixels = config.pixels.to_pixels()
    check_input(batches.inputs, pixels)
    config, chosen = length(config, before, batches.per_epoch // config.schedule.grad_accum_steps)
    labelled = config.measures.probe_dir if world.primary else None
    probe = open_probe(config, labelled, world.device) if labelled else None
    plan = make_plan(config.schedule, batches.per_epoch, batches.num_images, world.size)

    # The checkpoint must fit what is now known: model, number of images, order of a stream.
    settings = flat(config)
    progress = resume_progress(folder, settings, batches, world.size)
    world.agree({"the number of images": batches.num_images, "the package versions": VERSIONS, **shared(settings)})

    about = [about_run(config.network.model, model, plan, batches.num_images, world)]
    if batches.held_out is not None:
        about.append(f"{len(batches.held_out)} more images are held out, for eval_loss")
    few = few_images(batches.num_images, bool(config.measures.probe_dir), config.network.pretrained)
    lines = [*batches.sampling(), recipe_line(config), chosen, few, measured, input_line(batches.inputs)]
    about += filter(None, lines)
    warnings = input_warnings(batches.inputs, pixels) + ema_warnings(config.average, plan.updates)
    warnings += learning_warnings(plan, config.network.pretrained)
    for warning in warnings + worker_warnings(config.loading.workers, world.size):
        say(f"warning: {warning}", error=True)
    average, saving, optimizer = config.average, config.checkpoints, config.optimizer
    learning = Learning(
        config.seed, config.schedule.grad_accum_steps, optimizer.clip_grad, config.compute.dtype,
        average.model_ema_decay if average.model_ema else None, bool(average.model_ema_warmup),
        skip_bad=optimizer.max_bad_steps > 0,
    )  # fmt: skip
    trainer = create_trainer(model, plan, world, optimizer, learning, config.network.channel_dropout)
    if config.dry_run:
        usual, ema, amp = flat(PretrainConfig()), average.model_ema, config.compute.amp
        changed = {name: value for name, value in settings.items() if value != usual[name] and name not in FOLLOW}
        memory = memory_line(model, config.schedule.batch_size, ema=ema, amp=amp, device=world.device)
        world.print(yaml.safe_dump(changed, sort_keys=False, default_flow_style=None) + "\n".join([*about, memory]))
        trainer.wrap(config.compute.torchcompile)
        tries = range(min(4, plan.updates_per_epoch))
        world.print("Timing an update ...")
        world.print(time_line(seconds_per_update(trainer, batches.iterate(0, 0), tries), plan.updates))
        return None

    limits = Limits(
        config.destination.log_interval, saving.checkpoint_interval, saving.milestone_interval or 0,
        saving.recovery_interval, saving.checkpoint_minutes, config.selection.max_bad_images, optimizer.max_bad_steps,
    )  # fmt: skip
    run = PretrainRun(trainer, plan, folder, settings, progress, limits, world, data=batches)
    run.begin(command, config.logs, "\n".join(about), config.compute.torchcompile, warnings)
    run.measures = create_measures(config, trainer, batches, folder.path, plan)
    if probe is not None:
        base = probe.baselines(folder.path / "probe.json", partial(random_encoder, trainer.model.encoder, config.seed))
        run.bar.note(probe.describe(base))
        measure_probe = probe.measure(folder.path / "neighbours")
        run.measures.append(Measure(measure_probe, config.measures.probe_interval or 1, probe.columns))
    if config.measures.keep_best and world.primary:
        run.best = Best(config.measures.keep_best, read_rows(folder.summary)[0])
    return run


def look_for_images(config: PretrainConfig, faults: Faults) -> None:
    """Whether the named images are there at all, without looking into folders, which `find_files` does."""
    probe = config.measures.probe_dir
    with faults.next():
        check_places(config.paths, config.data_set.dataset)
    with faults.next():
        if probe and probe != "demo" and not os.path.exists(probe):
            raise ValueError(f"--probe-dir {printable(probe)} does not exist.")


def open_folder(config: PretrainConfig, start: Start | None) -> RunFolder:
    """The run's folder, with the checkpoint to resume from. It must not overlap with anything that the run reads."""
    paths, network, where = config.paths, config.network, config.destination
    read = [*map(base_of, as_list(paths.data_dir)), *as_list(paths.data_list), paths.index or ""]
    read.append(network.weights or (network.model.removeprefix("local-dir:") if start else ""))
    sources = [place for place in read if place]
    return RunFolder(where.output, where.experiment, where.resume, where.overwrite, sources, WRITTEN)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all processes must have; paths and devices may differ between machines."""
    own = ("data_dir", "data_list", "index", "output", "device")
    # NaN as text: it differs from itself
    return {f"--{k.replace('_', '-')}": v if v == v else str(v) for k, v in settings.items() if k not in own}


def open_source(config: PretrainConfig, listing: Listing | None, show: bool, pixels: Pixels) -> Any:
    """The images that the options name, or their windows and pages, with values converted as `pixels` has it."""
    source = create_source(
        config.paths, config.data_set, config.crops.in_chans, pixels, listing=listing,
        order=StreamOrder(config.schedule.batch_size, config.seed), source_weights=config.selection.source_weights,
    )  # fmt: skip
    return with_progress(partial(pages_and_windows, source, config.pixels, config.windows), show)


def open_data(config: PretrainConfig, model: FCMAE, listing: Listing | None, world: Processes) -> Batches:
    """The images of the run in batches, without `auto` options."""
    crops = config.crops
    source = partial(open_source, config, listing, world.primary, config.pixels.to_pixels())
    transform = PretrainTransform(
        crops.size, crops.scale, crops.ratio, crops.hflip, crops.vflip, crops.train_interpolation, *crops.normalization
    )
    sampling = Sampling(transform, model.grid(*crops.size), config.network.mask_ratio, config.seed)
    return open_batches(
        source, sampling, batch_size=config.schedule.batch_size, loading=config.loading, world=world,
        holdout=config.selection.holdout,
    )  # fmt: skip


def create_measures(
    config: PretrainConfig, trainer: Trainer, batches: Batches, folder: Path, plan: Plan
) -> list[Measure]:
    """What is measured and drawn between epochs; add yours here."""
    name, interval = short_name(config.network.model), config.measures.recon_interval or 1

    def title(epoch: int) -> str:
        return f"{name}, epoch {epoch} of {plan.epochs}, loss {trainer.mean_loss:.3f}"

    draw = reconstructions(folder / "reconstructions", trainer.model, batches.shown, title, config.measures.show_bands)
    measures = [Measure(draw, interval)]
    if batches.held_out is not None:
        loader = batches.held_out.loader(config.schedule.batch_size, config.loading.workers)
        measures.append(Measure(held_out_loss(lambda: trainer.averaged, loader, config.compute.dtype), 1, ("loss",)))
    watched = affordable(batches.watched, plan.updates * plan.images_per_update, 2 + plan.epochs // interval)
    collapse = collapse_of_blocks(folder / "collapse.csv", watched)
    return [*measures, Measure(collapse, interval, ("distance", "dead"))]


def open_probe(config: PretrainConfig, place: str, device: torch.device) -> Probe:
    """The labelled images of --probe-dir, with the evaluation transform of the run's size."""
    crops, (mean, std) = config.crops, config.crops.normalization
    with naming_probe(place):
        labelled = open_labelled(place, in_chans=crops.in_chans, seed=config.seed, pixels=config.pixels.to_pixels())
    for line in labelled.describe(f"--probe-dir {place}"):
        say(line)
    cfg = dict(interpolation="bicubic", crop_pct=0.875, crop_mode="center", mean=mean, std=std)
    transform = preprocessing({**cfg, "input_size": (crops.in_chans, *crops.size)})
    rows = Rows(transform, config.schedule.batch_size, config.loading.workers, device, config.compute.amp)
    return Probe(labelled, place, rows, config.measures.show_bands)


def open_replay(path: Path, own: dict[str, Any]) -> tuple[dict, FCMAE, Callable[[int], Batches], torch.device]:
    """The arguments of `replay.replay` from the record at `path`; options in `own` replace those of the run."""
    record = read_record(path)
    settings = from_mapping(PretrainConfig, record["settings"], f"--replay {path}")
    config = build(PretrainConfig, settings, own, {"pretrained": False, "weights": None})
    if record["images"][0] is not None:
        config = evolve(config, workers=0)  # the number of workers matters for streams only
    device = check_device(config.compute.device)
    listing = find_files(config.paths, config.data_set.dataset, config.selection.max_bad_images, Processes())
    start = open_start(config.network.model)
    model = create_model(config.network, config.crops, seed=config.seed, start=start)

    size = record["world_size"]
    return record, model, lambda rank: open_data(config, model, listing, Processes(rank, size)), device
