"""Values of options that follow from something else: other options, the start model, the processes, the images.

`configure` runs before anything is opened, `measure` once the images are.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..checkpoint.loading import model_name
from ..config import build, entries, evolve, flat
from ..console import count
from ..data import Pixels
from ..data.config import PixelOptions, check_limits
from ..data.display import check_bands
from ..data.measure.sample import measure_pixels, measured_options
from ..models.masking import random_channels
from ..runs.device import fit_amp
from ..runs.group import Processes, on_primary
from ..runs.progress import with_progress
from .config import AUTO, Crops, PretrainConfig
from .plan import PAPER_EPOCHS, usual_epochs
from .recipe import recipe_values
from .start import Start, open_start, open_weights

# Without --data-dir and --dataset: a run of two to five minutes on two CPU cores.
DEMO_DEFAULTS = dict(
    dataset="demo", num_images=768, img_size=56, patch_size=1, batch_size=32, epochs=16,
    scale=(0.7, 1.0), workers=0, experiment="demo",
)  # fmt: skip
DEMO_NETWORK = dict(decoder_dim=128, model_kwargs=dict(depths=[1, 1, 3, 1], dims=[24, 48, 96, 192]))
USUAL = {1: ((0.5,), (0.25,)), 3: (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}  # mean and std by channels


def configure(given: Mapping[str, Any], file: Mapping[str, Any]) -> tuple[PretrainConfig, Start | None]:
    """The config of a run: command line over file over the start model's own settings over recipe over defaults.

    Only `auto` is left to `measure`. Also returns the model to start from, None for random weights.
    """
    if "config" in file:
        raise ValueError("--config: the file sets 'config', and one file cannot name another. Remove that line.")
    config, defaults = build(PretrainConfig, file, given), {}
    if not config.paths.data_dir and not config.paths.data_list and config.data_set.dataset in ("", "demo"):
        defaults = _demo_defaults({**file, **given}.keys())
    network = config.network
    if (name := model_name(network.model, "fcmae_convnextv2")) != network.model:  # a size, or a folder
        given, network = {**given, "model": name}, replace(network, model=name)
    if network.weights:
        start = open_weights(network.weights, network.model, network.model_kwargs, config.destination.license)
    else:
        start = open_start(network.model)
        if start and not network.pretrained:
            raise ValueError(f"--model {network.model} without --pretrained has random weights: add --pretrained.")
    if start:
        defaults.pop("standardize", None)  # the record of pixels is the start model's
        defaults = defaults | start.defaults(sized="img_size" in {**file, **given}) | {"pretrained": True}
        file = {name: value for name, value in file.items() if name != "pretrained"}
    recipe = {} if start and config.recipe is None else recipe_values(config, {**file, **given}.keys())
    config = build(PretrainConfig, recipe, defaults, file, given)
    if config.schedule.global_batch_size is not None and "grad_accum_steps" in given:
        raise ValueError("--grad-accum-steps follows from --global-batch-size and the processes: leave it out.")
    config = evolve(config, **_input_size(config.crops, given))
    if dropout := config.network.channel_dropout:
        try:
            random_channels(1, config.crops.in_chans, dropout)
        except ValueError as e:
            raise ValueError(f"--channel-dropout {dropout:g}: {e}") from None
    config = replace(config, pixels=_pixels(config.pixels, start, given))
    config.pixels.to_pixels(config.crops.in_chans)  # refuses contradictions now
    check_bands(config.measures.show_bands, config.crops.in_chans)
    config = evolve(config, **_normalization(config, start))
    best = config.measures.keep_best
    if best and not (config.selection.holdout if best == "loss" else config.measures.probe_dir):
        needed = "--holdout X" if best == "loss" else "--probe-dir DIR"
        raise ValueError(f"--keep-best {best} needs {needed}, which measures it.")
    config = fit_amp(config, given)
    return (evolve(config, **intervals(config)) if config.schedule.epochs else config), start


def _demo_defaults(named: Collection[str]) -> dict[str, Any]:
    """Defaults for the demo images; options that the user has `named` exclude some of them."""
    defaults: dict[str, Any] = {**DEMO_DEFAULTS}
    if not {"model", "weights", "model_kwargs", "decoder_dim"} & {*named}:
        defaults |= DEMO_NETWORK
    if not {"lr", "lr_base"} & {*named}:
        defaults["lr"] = 8e-3
    if not {"mean", "std"} & {*named}:
        defaults["standardize"] = "channel"
    if not {"dataset", "num_images"} & {*named}:  # the first command
        defaults |= {"probe_dir": "demo", "probe_interval": 5}
    return defaults


def _input_size(crops: Crops, given: Mapping[str, Any]) -> dict[str, Any]:
    """`input_size` and `in_chans`; --in-chans and --img-size of the command line replace parts of a file's size."""
    chans, *size = crops.input_size or (crops.in_chans, crops.img_size, crops.img_size)
    if "input_size" not in given:
        chans = given.get("in_chans", chans)
        size = [given["img_size"]] * 2 if "img_size" in given else size
    return {"in_chans": chans, "input_size": (chans, *size)}


def _pixels(pixels: PixelOptions, start: Start | None, given: Mapping[str, Any]) -> PixelOptions:
    """The options on stored values: as given, or those that the start model was trained with."""
    if "clip_percentiles" in given:
        check_limits(build(PixelOptions, {name: given[name] for name in given.keys() & entries(PixelOptions).keys()}))
        return replace(pixels, clip_low=None, clip_high=None)  # a file's
    return PixelOptions.of(start.pixels) if start and pixels == PixelOptions() else pixels


def _normalization(config: PretrainConfig, start: Start | None) -> dict[str, Any]:
    """`mean` and `std`: as given, the start model's, or the usual ones for the channels; unusual ones are measured.

    They are 0 and 1 for images that are standardised one by one.
    """
    crops, standardize = config.crops, config.pixels.standardize
    found = {"mean": crops.mean, "std": crops.std}
    if standardize is not None:
        for name, value in (("mean", 0.0), ("std", 1.0)):
            own = (value,) * crops.in_chans
            if found[name] not in (None, (AUTO,), own):
                raise ValueError(f"--{name} is {value:g} with --standardize {standardize}: leave it out.")
            found[name] = own
        return found
    if start and start.pixels.standardize is None and found == {"mean": None, "std": None}:
        found |= start.normalization(crops.in_chans)
    if found == {"mean": None, "std": None}:
        found["mean"], found["std"] = USUAL.get(crops.in_chans, ((AUTO,), (AUTO,)))
    for name in found:
        values: tuple = found[name] or ()
        if AUTO in values and len(values) > 1:
            words = " ".join(map(str, values))
            raise ValueError(f"--{name} takes {AUTO} alone, or one number per channel; got {words}.")
        if not values:
            raise ValueError(f"--{name} is missing: give --mean and --std both, or {AUTO} for what is to be measured.")
        if values != (AUTO,) and len(values) != crops.in_chans:
            raise ValueError(f"--{name} has {count(len(values), 'value')} for {count(crops.in_chans, 'channel')}.")
    return found


def length(config: PretrainConfig, before: Mapping[str, Any], updates_per_epoch: int) -> tuple[PretrainConfig, str]:
    """Sets the epochs if they are open, and what follows from them.

    A run that resumes keeps its epochs in `before`. Returns the config, and a line about the choice or ''.
    """
    if config.schedule.epochs is not None:
        return config, ""
    epochs = before.get("epochs") or usual_epochs(updates_per_epoch)
    config = evolve(config, epochs=epochs)
    line = f"--epochs {epochs}, by the number of images: {epochs * updates_per_epoch:,} updates"
    if epochs != PAPER_EPOCHS:
        line += f" (the paper's {PAPER_EPOCHS} epochs would be {PAPER_EPOCHS * updates_per_epoch:,})"
    return evolve(config, **intervals(config)), line


def intervals(config: PretrainConfig) -> dict[str, Any]:
    """Warmup and intervals in proportion to the number of epochs."""
    schedule, measures, epochs = config.schedule, config.measures, config.schedule.epochs
    assert epochs is not None
    warmup = schedule.warmup_epochs
    if warmup is None:
        warmup = min(40, epochs / (12 if config.data_set.dataset == "demo" else 20))
    if not warmup < epochs:
        raise ValueError(f"--warmup-epochs {warmup:g} must lie below --epochs {epochs}.")
    drawn = measures.recon_interval or max(1, epochs // 10)
    return {
        "warmup_epochs": warmup,
        "milestone_interval": config.checkpoints.milestone_interval or max(1, epochs // 4),
        "recon_interval": drawn,
        "probe_interval": measures.probe_interval or drawn,
    }


def measure(
    config: PretrainConfig, before: Mapping[str, Any], open_source: Callable[[Pixels], Any], world: Processes
) -> tuple[PretrainConfig, str]:
    """Measures `mean`, `std`, `clip_low` and `clip_high` if they are open, on rank 0.

    A run that resumes takes the numbers in `before`, the settings of that run. `open_source` opens the images with a
    record of pixels. Returns the config without `auto`, and a line about the source of the numbers or ''.
    """
    limits = config.pixels.clip_percentiles is not None and config.pixels.clip_low is None
    names = [*config.crops.unmeasured, *(("clip_low", "clip_high") if limits else ())]
    if not names:
        return config, ""
    options = ", ".join([f"--{name} {AUTO}" for name in config.crops.unmeasured] + ["--clip-percentiles"] * limits)
    now, same = flat(config), ["in_chans", *["clip_percentiles"] * limits]
    if all(before.get(key) == now[key] for key in same) and all(isinstance(before.get(n), list) for n in names):
        kept = {name: tuple(before[name]) for name in names}
        return evolve(config, **kept), f"{options}: as measured when the run began"
    values, source = on_primary(world, partial(_measure, config, open_source, limits))
    return evolve(config, **{name: values[name] for name in names}), f"{options}: {source}"


def _measure(config: PretrainConfig, open_source: Callable[[Pixels], Any], limits: bool) -> tuple[dict[str, Any], str]:
    percentiles = config.pixels.clip_percentiles if limits else None
    options = dict(seed=config.seed, workers=config.loading.workers)
    found, pixels = with_progress(
        lambda tick: measure_pixels(open_source, config.pixels.to_pixels(), percentiles, tick=tick, **options)
    )
    share, tried = config.selection.max_bad_images, found.pixels.images + len(found.bad)
    if found.total is not None and len(found.bad) > max(1, share * found.total):
        raise ValueError(
            f"{len(found.bad)} of {tried} images tried cannot be read, more than --max-bad-images {share:g} of "
            f"{found.total}, for example: {found.bad[0]}."
        )
    mean, std = map(tuple, measured_options(found.pixels))
    values = {"mean": mean, "std": std, "clip_low": pixels.clip_low, "clip_high": pixels.clip_high}
    return values, found.source + (f"; {len(found.bad)} left out, the first: {found.bad[0]}" if found.bad else "")
