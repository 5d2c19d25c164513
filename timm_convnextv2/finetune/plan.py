"""The plan of a finetuning: data, batch, model, folder, and the options of train.py that follow from them."""

import os
import re
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType

import PIL
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.auto_augment import posterize
from timm.models import safe_model_name
from timm.optim import param_groups_layer_decay
from timm.utils.distributed import world_info_from_env

from ..checkpoint.finetuned import added_epochs, all_epochs, origin_of_run
from ..checkpoint.loading import model_name
from ..checkpoint.provenance import resolve_license
from ..console import count
from ..data import Pixels
from ..data.config import Splitting
from ..data.labelled import SPLIT_FILE
from ..data.measure.duplicates import shared_note
from ..models import ConvNeXtV2
from ..recipes import Recipe
from ..report.next_steps import near
from ..runs.plan import few_updates
from . import folders
from .checkpoints import check_new_folder, check_resume
from .folders import FolderReader
from .images import Images, Reading, probe, refuse_for_tensors
from .model import check_weights_file, choose_pixels, create_fitted_model
from .options import PLUGIN, ScriptOptions, check_input_mode, for_this_machine
from .scripts import allow_processes_on_cpu, matching_script, script_path, script_version

SMALL_SCALE = 1e-3  # a layer whose rate is a thousandth of the head's hardly changes
# With RandAugment or mixup and cutmix a small network learnt little or nothing in 600 updates:
# benchmarks/results/recipe_sweep_*.csv
AUGMENTED_UPDATES = 2000
SPLITTING = Splitting()  # the defaults
START_FILES = ("resume", "initial_checkpoint", "pretrained_path")


@dataclass(frozen=True)
class Plan:
    """A run that passed every check."""

    script: ModuleType  # train.py
    recipe: Recipe
    options: ScriptOptions  # with those that follow from data and model
    words: list[str]  # the user's options and those that follow, so that train.py's args.yaml is complete
    splits: list[FolderReader]  # training and validation; empty if train.py opens the data itself
    model: torch.nn.Module  # on the meta device
    folder: Path  # OUTPUT/EXPERIMENT
    kinds: str  # of images that are not 8-bit RGB or grey, see `images.probe`
    notes: list[str]  # for the user
    world_size: int

    @property
    def global_batch(self) -> int:
        """Images per update over all processes."""
        return self.options.batch_size * self.world_size * max(1, self.options.grad_accum_steps)

    @property
    def pretrained(self) -> bool:
        """Whether training starts from any weights."""
        return bool(self.options.pretrained or any(getattr(self.options, name) for name in START_FILES))

    @property
    def epochs(self) -> int:
        """Number of epochs, warmup and cooldown included."""
        return all_epochs(self.options.values)

    @property
    def pixels(self) -> Pixels:
        """How stored values become pixels."""
        return Pixels.from_record(self.options.pixels or {})


def make_plan(
    script: ModuleType, recipe: Recipe, options: ScriptOptions, words: list[str],
    global_batch_size: int | None = None, splitting: Splitting = SPLITTING, dry_run: bool = False,
) -> Plan:  # fmt: skip
    """Checks data, batch, model and folder, and derives the options of train.py that follow from them.

    `words` are the user's options; `global_batch_size` is images per update over all processes; nothing follows a
    `dry_run`.
    """
    resolved, world_size = options, world_info_from_env()[2]
    options, device = for_this_machine(options)
    if options.amp != resolved.amp:  # of the recipe: train.py has no word that switches it off
        recipe, resolved = recipe.evolve(amp=False), resolved.evolve(amp=False)
    if options.device == "cpu" and world_size > 1:
        allow_processes_on_cpu(script)
    check_input_mode(options)
    splits, divided = _open_splits(options, splitting)
    options, notes = _with_classes(options, splits)
    options = _with_batch(options, world_size, global_batch_size)
    if splits:
        _updates_per_epoch(options, splits[0], world_size)
    if "model" not in options.given and options.model == options.defaults["model"]:
        what = "where FOLDER is the encoder that pretraining exported"
        raise ValueError(f"--model is needed: --model local-dir:FOLDER, {what}.")
    options = options.evolve(model=model_name(options.model))
    loads = options.pretrained and not options.pretrained_path
    start = dict(drop_path_rate=options.drop_path, global_pool=options.gp)
    options, model, fitted = create_fitted_model(options, need_weights=options.pretrained, check_weights=loads, **start)
    options, folder = _with_folder(options, model)
    kept = "would be" if dry_run else "is"
    divided += [f"The split {kept} kept in {near(folder / SPLIT_FILE)}."] if divided else []
    for name in START_FILES:
        if getattr(options, name) and (options.pretrained or name != "pretrained_path"):
            check_weights_file(f"--{name.replace('_', '-')}", getattr(options, name), model)
    options = _with_license(options, model, folder)
    options = options.evolve(device_modules=list(dict.fromkeys([*(options.device_modules or []), PLUGIN])))
    pixels, read = choose_pixels(options.nodata, options.model, options.channels, options.pixels)
    options = options.evolve(pixels=pixels.record() or None, **_facts(splits))
    opened = (Images(split, Reading(options.channels, pixels)) for split in splits)
    kinds = ", ".join(dict.fromkeys(filter(None, map(probe, opened))))
    values = dict(options.values)
    refuse_for_tensors(kinds, values, resolve_data_config(values, model=model)["crop_mode"])
    words, notes = [*words, *options.words_since(resolved)], [*device, *divided, *notes, *fitted, *read]
    return Plan(script, recipe, options, words, splits, model, folder, kinds, notes, world_size)


def _open_splits(options: ScriptOptions, splitting: Splitting) -> tuple[list[FolderReader], list[str]]:
    """The training and validation images, and notes on how they were split; neither if train.py opens the data."""
    place, how = options.data_folder, {"class_map": options.class_map, "input_key": options.input_key}
    named = {"train_split", "val_split"} & {*options.given, *options.changed()}
    images = not folders.opaque_prefix(options.dataset)
    if place and images and (folders.is_table(place) or not named and folders.is_unsplit(Path(place))):
        kept = Path(options.resume).parent / SPLIT_FILE if options.resume else None
        return folders.split_rows(Path(place), splitting, options.seed, kept, **how)
    if splitting != SPLITTING:
        raise ValueError(
            "--validation-share, --groups and --group-by split a folder of classes or a CSV; the data has a split of "
            f"its own: {options.dataset or place}. Leave them out."
        )
    if not folders.is_folder(options.dataset, place):
        return [], []
    names = {"--train-split": options.train_split, "--val-split": options.val_split}
    return folders.open_splits(place, names, partial(FolderReader, **how)), []


def _with_classes(options: ScriptOptions, splits: list[FolderReader]) -> tuple[ScriptOptions, list[str]]:
    """Sets the number of classes: the folder's replaces the recipe's."""
    given = options.num_classes
    if not splits:
        if not given:
            where = options.dataset or options.data_folder
            raise ValueError(f"--num-classes is needed: only a folder of images has a class per folder, not {where}.")
        return options, []
    train, found = splits[0], len(splits[0].classes)
    if "num_classes" in options.given and given != found:
        has = f"{train.root} has {count(found, 'class')} ({folders.shown(train.classes)})"
        raise ValueError(f"--num-classes {given}, but {has}. Leave --num-classes out, or correct one.")
    replaced = [f"{count(found, 'class')}, counted in {train.root}, replace the recipe's {given}."]
    return options.evolve(num_classes=found), replaced if given not in (None, found) else []


def _with_batch(options: ScriptOptions, world_size: int, wanted: int | None) -> ScriptOptions:
    """Sets the accumulation steps that make the wanted global batch."""
    size = options.batch_size
    if size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {size}.")
    if wanted is None:
        return options
    step = size * world_size
    steps, left = divmod(wanted, step)
    if steps < 1 or left:
        ways = sorted({max(1, steps) * step, max(1, steps + 1) * step})
        fits = [f"--global-batch-size {' or '.join(map(str, ways))}"]
        if wanted > 0 and wanted % world_size == 0:
            share = wanted // world_size
            near = sorted((b for b in range(1, share + 1) if share % b == 0), key=lambda b: abs(b - size))[:3]
            fits.insert(0, f"--batch-size {' or '.join(map(str, sorted(near)))}")
        batch = f"--batch-size {size} x {count(world_size, 'process')} = {step}"
        raise ValueError(
            f"--global-batch-size {wanted} is not a multiple of {batch}. These divide: {'; or '.join(fits)}."
        )
    if "grad_accum_steps" in options.given and options.grad_accum_steps != steps:
        raise ValueError(
            f"--global-batch-size {wanted} needs --grad-accum-steps {steps}, got {options.grad_accum_steps}. "
            "Leave one of them out."
        )
    return options.evolve(grad_accum_steps=steps)


def _facts(splits: list[FolderReader]) -> dict[str, int | float]:
    """Numbers of images, and the accuracy in % of always the most frequent class: args.yaml keeps them for reports."""
    if len(splits) < 2:
        return {}
    train, validation = (split.counts() for split in splits)
    images, most = len(splits[1]), max(train, key=train.__getitem__)
    chance = round(100 * validation.get(most, 0) / max(1, images), 2)
    return {"num_images": len(splits[0]), "num_validation": images, "chance": chance}


def _updates_per_epoch(options: ScriptOptions, train: FolderReader, world_size: int) -> int:
    """Updates per epoch; train.py drops the last batch unless it is full."""
    share = -(-len(train) // world_size)
    batches = share // options.batch_size
    if not batches:
        raise ValueError(
            f"{train.root} has {count(len(train), 'image')}, {share} for each of {count(world_size, 'process')}: less "
            f"than one batch. Use --batch-size {share} or less."
        )
    return -(-batches // max(1, options.grad_accum_steps))


def _with_folder(options: ScriptOptions, model: torch.nn.Module) -> tuple[ScriptOptions, Path]:
    """Sets output and experiment as train.py would; refuses the folder of another run."""
    experiment = options.experiment
    if not experiment:
        size = resolve_data_config(dict(options.values), model=model)["input_size"][-1]
        experiment = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(options.model)}-{size}"
    options = options.evolve(experiment=experiment, output=options.output or os.path.join("output", "train"))
    folder = Path(options.output) / experiment
    if options.resume:
        check_resume(Path(options.resume))
    elif world_info_from_env()[1] == 0:  # rank 0 writes there, and may have begun to when another process checks
        check_new_folder(folder)
    return options, folder


def _with_license(options: ScriptOptions, model: torch.nn.Module, folder: Path) -> ScriptOptions:
    """Refuses an unknown or contradicting licence; keeps that of a start file, which may be gone when the run ends."""
    if not isinstance(model, ConvNeXtV2):  # other models are not exported
        return options
    origin = origin_of_run(dict(options.values), options.model, model.pretrained_cfg, folder)
    license = resolve_license(options.license, origin.license, origin.unstated)
    return options.evolve(license=license) if any(getattr(options, name) for name in START_FILES) else options


def check_augmentation(policy: str | None) -> None:
    """Refuses a value of --aa that would stop the run at some image.

    At full strength timm's Posterize keeps 0 bits, a black image; Pillow 13 raises an error instead.
    """
    bounded = re.search(r"-mmax(\d+)", policy or "")
    if not policy or "-inc1" in policy and bounded and int(bounded[1]) < 10:
        return
    try:
        posterize(Image.new("RGB", (1, 1)), 0)
    except ValueError as e:
        policy = f"{policy}-mmax9" if "-inc1" in policy and not bounded else "rand-m9-mstd0.5-inc1-mmax9"
        raise ValueError(
            f"--aa: timm {timm.__version__} posterizes to 0 bits, which Pillow {PIL.__version__} refuses ({e}), so the "
            "run would stop at some image. Install an older Pillow (pip install 'pillow<13'), or keep the strength "
            f"below its maximum, which differs a little from the paper: --aa {policy}"
        ) from e


def describe_plan(plan: Plan) -> list[str]:
    """Lines on what will run."""
    options, path, version = plan.options, script_path(plan.script), script_version(plan.script)
    more = "".join(f" + {n} of {name}" for name, n in added_epochs(options.values).items() if n)
    length = count(plan.epochs, "epoch") + (f" ({options.epochs}{more})" if more else "")
    if plan.splits:
        length += f" of {count(_updates_per_epoch(options, plan.splits[0], plan.world_size), 'update')}"
    batch, wanted = plan.global_batch, plan.recipe.global_batch
    lr, how = _learning_rate(options, batch)
    made = f"{count(options.batch_size, 'image')} x {count(plan.world_size, 'process')}"
    made += f" x {count(max(1, options.grad_accum_steps), 'step')}; lr {lr:.4g} ({how})"
    if wanted and wanted != batch:
        made += f"; the recipe's is {wanted}, lr {_learning_rate(options, wanted)[0]:.4g}"
    return [
        f"{path} ({f'timm {version}' if version else 'version unknown'}; timm {timm.__version__} is installed)",
        f"recipe {plan.recipe.name}: {plan.recipe.description}",
        f"{options.model}, {'pretrained' if plan.pretrained else 'from random weights'}, "
        f"{count(options.num_classes, 'class')}",
        *(line for split in plan.splits for line in folders.describe(split)),
        f"global batch {batch} = {made}",
        length,
        _describe_layers(plan),
    ]


def _learning_rate(options: ScriptOptions, global_batch: int) -> tuple[float, str]:
    """The rate that train.py will compute for a batch, and how."""
    base, size = options.lr_base, options.lr_base_size
    if options.lr:
        return options.lr, "as given, for any batch"
    scale = options.lr_base_scale or ("sqrt" if any(o in options.opt.lower() for o in ("ada", "lamb")) else "linear")
    if scale == "sqrt":
        return base * (global_batch / size) ** 0.5, f"{base:.4g} x sqrt({global_batch} / {size})"
    return base * global_batch / size, f"{base:.4g} x {global_batch} / {size}"


def _layer_scales(plan: Plan) -> dict[str, float | None]:
    """The scale of layer-wise decay for each parameter; None if it is frozen. train.py makes the same groups."""
    given = {"min_scale": plan.options.layer_decay_min_scale, "no_opt_scale": plan.options.layer_decay_no_opt_scale}
    groups = param_groups_layer_decay(plan.model, layer_decay=plan.options.layer_decay, **given)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {name: scales.get(id(p)) for name, p in plan.model.named_parameters()}


def _describe_layers(plan: Plan) -> str:
    decay = plan.options.layer_decay
    if decay is None:
        return "no layer-wise lr decay"
    scales = {name: "frozen" if scale is None else f"{scale:.4g}" for name, scale in _layer_scales(plan).items()}
    names, frozen = list(scales), list(scales.values()).count("frozen")
    first_block = next((name for name in names if name.startswith("stages.0.")), names[0])
    some = ", ".join(f"{name} {scales[name]}" for name in dict.fromkeys((names[0], first_block, names[-1])))
    more = f"; {frozen} of {len(names)} parameters are frozen" if frozen else ""
    return f"layer-wise lr decay {decay:g}, lr scale of {some}{more}"


def warnings(plan: Plan, from_scratch: bool = False) -> list[str]:
    """Choices that may be mistakes; `from_scratch` if random weights were asked for."""
    options, version, decay = plan.options, script_version(plan.script), plan.options.layer_decay
    scales = [] if decay is None else [scale for scale in _layer_scales(plan).values() if scale is not None]
    smallest = min(scales, default=1.0)
    unequal = folders.imbalance(plan.splits[0].counts()) if plan.splits else ""
    files = [[path for path, _ in split.samples] for split in plan.splits]
    shared = shared_note(files[0], files[1], "validation") if len(files) == 2 else ""
    few = augmented = ""
    if plan.splits:
        per_epoch = _updates_per_epoch(options, plan.splits[0], plan.world_size)
        updates = plan.epochs * per_epoch
        few = few_updates(updates, per_epoch, plan.epochs - options.epochs)
        strong = [f"--{name} {options.values[name]}" for name in ("aa", "mixup", "cutmix") if options.values[name]]
        if strong and not few and updates < AUGMENTED_UPDATES:
            augmented = (
                f"{count(updates, 'update')} may be too few for {', '.join(strong)}: small networks learnt more "
                "without. Leave them out, as the recipes small-data and scratch-small do, or raise --epochs."
            )
    unloaded = options.model.startswith("local-dir:") and not plan.pretrained and not from_scratch
    found = [
        (plan.kinds, f"there are images {plan.kinds}: their augmentation is crop, scale, ratio, flips, random erasing, "
         "mixup and cutmix; --aa, --color-jitter and --grayscale-prob are for 8-bit RGB or grey and are left out."),
        (few, few),
        (augmented, augmented),
        (unequal, unequal),
        (shared, shared),
        (decay is not None and not isinstance(plan.model, ConvNeXtV2),
         f"--model {options.model} is a {type(plan.model).__name__}, not a ConvNeXt V2: its layers for the lr decay "
         "are timm's, and the recipe was not made for it."),
        (smallest < SMALL_SCALE, f"With --layer-decay {decay} the first layers of {options.model} learn at "
         f"{smallest:.1e} of the rate: they will hardly change."),
        (version not in ("", timm.__version__), f"{script_path(plan.script)} is of timm {version}, and timm "
         f"{timm.__version__} is installed: options may be missing or mean something else. {matching_script()}"),
        (unloaded, f"the weights in {options.model} are not loaded, because neither recipe nor options set pretrained. "
         "Add --pretrained, or --from-scratch if you want random weights."),
    ]  # fmt: skip
    return [text for holds, text in found if holds]
