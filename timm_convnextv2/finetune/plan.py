"""The plan of a run: train.py's options resolved, batch, learning rate, length, folder, and how it is told."""

import argparse
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.models import parse_model_name, safe_model_name
from timm.optim import param_groups_layer_decay
from timm.utils.distributed import world_info_from_env

from ..console import CommandParser, closest, say
from ..models import ConvNeXtV2
from ..recipes import Recipe
from . import folders
from .images import Images, probe, refuse_for_tensors
from .preflight import Split, check_data, check_folder_weights, create_meta_model
from .start import check_resume, check_start_file, choose_pixels, newest_whole, settle_license
from .train_script import allow_processes_on_cpu, matching_script, script_path, script_version

PLUGIN = "timm_convnextv2"  # for train.py's --device-modules
# Ours, which train.py's parser takes, too: so they stand in its args.yaml and checkpoints, and recipes may set them.
# How stored values become pixels is one of them, `--pixels`, but of the launcher: it follows from model and --nodata.
ADDED_OPTIONS = {"nodata": float, "license": str}
SMALL_SCALE = 1e-3  # a layer that learns a thousand times slower than the head does not learn


def count(n: int, noun: str) -> str:
    """'1 process', '2 processes', '3 steps'."""
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def _number(x: float) -> str:
    return f"{x:.4g}"


# ------------------------------------------------------------------------------------------------------------ options


@dataclass
class Options:
    """Options of train.py, resolved as it will resolve them.

    Attributes:
        values: Every option: command line over recipe over train.py's defaults.
        defaults: train.py's own.
        given: Names of those on the command line.
    """

    values: argparse.Namespace
    defaults: dict[str, Any]
    given: set[str]

    def changed(self) -> dict[str, Any]:
        """Those that differ from train.py's defaults, in its order."""
        return {k: v for k, v in vars(self.values).items() if v != self.defaults[k]}


def resolve_options(script: ModuleType, recipe: Recipe, rest: list[str]) -> Options:
    """Resolves recipe and command line with train.py's own parser, which also refuses what it does not know.

    Args:
        script: The imported train.py.
        recipe: What stands over its defaults.
        rest: The command line without the launcher's own options.

    Raises:
        ValueError: Recipe or command line have an option that this train.py does not know or a value that it does not
            take, or train.py lacks --device-modules.
    """
    # one message, without the usage of some 150 options
    script.parser.error = MethodType(CommandParser.error, script.parser)
    for name, kind in ADDED_OPTIONS.items():
        script.parser.add_argument(f"--{name}", type=kind)
    script.parser.add_argument("--pixels", type=json.loads)
    defaults = vars(script.parser.parse_args([]))
    path = script_path(script)
    if "device_modules" not in defaults:
        raise ValueError(f"{path} has no --device-modules: it is too old for {PLUGIN}. {matching_script()}")
    for key in map(str, recipe.values):
        if key not in defaults:
            version = script_version(path)
            raise ValueError(
                f"Recipe {recipe.path} sets '{key}', which {path}{f' (timm {version})' if version else ''} does not "
                f"know.{closest(key.replace('-', '_'), defaults)}"
            )
    unset = object()
    given = script.parser.parse_args(rest, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    script.parser.set_defaults(**recipe.values)  # as train.py does with its --config
    return Options(
        values=script.parser.parse_args(rest),
        defaults=defaults,
        given={k for k, v in vars(given).items() if v is not unset and not (k == "data" and v is None)},
    )


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass
class Plan:
    """A run that passed every check.

    Attributes:
        script: The imported train.py.
        recipe: Its recipe.
        options: Options of train.py, with all that was found out.
        rest: Those of them that the user gave, as words.
        splits: Training and validation; empty where train.py opens the data itself.
        world_size: Number of processes.
        global_batch: Images per update over all processes.
        updates: Updates per epoch; None without `splits`.
        model: The model on the meta device.
        folder: The run's folder, OUTPUT/EXPERIMENT.
        kinds: What is not 8-bit about the images; empty where all that were tried are.
    """

    script: ModuleType
    recipe: Recipe
    options: Options
    rest: list[str]
    splits: list[Split]
    world_size: int
    global_batch: int
    updates: int | None
    model: torch.nn.Module
    folder: Path
    kinds: str = ""

    @property
    def pretrained(self) -> bool:
        """Whether training starts from any weights."""
        args = self.options.values
        return bool(args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume)

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        return self.options.values.epochs + sum(_extra_epochs(self.options.values).values())

    def train_argv(self) -> list[str]:
        """train.py's command line: the user's, and what was found out, so that its args.yaml tells the whole run."""
        args = self.options.values
        words = ["--device-modules", *args.device_modules, "--output", args.output, "--experiment", args.experiment]
        words += channel_words(args, self.options.given)
        for name in ADDED_OPTIONS:
            if getattr(args, name) is not None and name not in self.options.given:
                words.append(f"--{name}={getattr(args, name)}")
        words += [f"--pixels={json.dumps(args.pixels)}"] if args.pixels and "pixels" not in self.options.given else []
        words += ["--num-classes", str(args.num_classes), "--grad-accum-steps", str(args.grad_accum_steps)]
        return [*self.rest, *words]


def make_plan(
    script: ModuleType, recipe: Recipe, options: Options, rest: list[str], global_batch_size: int | None = None
) -> Plan:
    """Checks data, batch, model and folder, and fills in the options that follow from them.

    Args:
        script, recipe, options, rest: See `Plan`.
        global_batch_size: Images per update over all processes; None for what the options give.

    Raises:
        ValueError: A user's mistake, in one message.
    """
    args = options.values
    world_size = world_info_from_env()[2]
    if args.device == "cpu" and world_size > 1:
        allow_processes_on_cpu(script)
    check_input_mode(args.input_img_mode)
    splits = _open_data(options)
    global_batch = _set_batch(options, world_size, global_batch_size)
    updates = _updates_per_epoch(options, splits[0], world_size) if splits else None
    model = _create_model(options)
    source, name = parse_model_name(args.model)
    if source == "local-dir" and args.pretrained and not args.pretrained_path:
        check_folder_weights(Path(name), model)
    folder = _choose_folder(options, model)
    for name in ("resume", "initial_checkpoint", "pretrained_path"):
        if getattr(args, name) and (args.pretrained or name != "pretrained_path"):
            check_start_file(f"--{name.replace('_', '-')}", getattr(args, name), model)
    settle_license(args, model, folder)
    args.device_modules = list(dict.fromkeys([*(args.device_modules or []), PLUGIN]))
    pixels = choose_pixels(args.nodata, args.model, channels(args), args.pixels)
    args.pixels = pixels.record()
    opened = (Images(split.reader, channels(args), pixels=pixels) for split in splits)
    kinds = ", ".join(dict.fromkeys(filter(None, map(probe, opened))))
    refuse_for_tensors(kinds, vars(args), resolve_data_config(vars(args), model=model)["crop_mode"])
    return Plan(script, recipe, options, rest, splits, world_size, global_batch, updates, model, folder, kinds)


def _open_data(options: Options) -> list[Split]:
    """Lists the data and sets the number of classes, which the folder's overrides the recipe's."""
    args = options.values
    args.data_dir = args.data_dir or args.data
    splits = check_data(
        args.data_dir,
        dataset=args.dataset,
        train_split=args.train_split,
        val_split=args.val_split,
        class_map=args.class_map,
        input_key=args.input_key,
    )
    if not splits:
        if not args.num_classes:
            raise ValueError(
                f"--num-classes is needed: only a folder of images tells it, not {args.dataset or args.data_dir}."
            )
        return splits
    train = splits[0]
    found = len(train.classes)
    if "num_classes" in options.given and args.num_classes != found:
        raise ValueError(
            f"--num-classes {args.num_classes}, but {train.root} has {found} classes "
            f"({', '.join(train.classes[:5])}{', ...' if found > 5 else ''}). Leave --num-classes out, or correct one."
        )
    if args.num_classes not in (None, found):
        say(f"{found} classes, counted in {train.root}, replace the recipe's {args.num_classes}.")
    args.num_classes = found
    return splits


def _create_model(options: Options) -> torch.nn.Module:
    """The model on the meta device; sets the number of channels where only the model's folder tells it."""
    args = options.values
    if "model" not in options.given and args.model == options.defaults["model"]:
        raise ValueError(
            "--model is needed: --model local-dir:FOLDER, where FOLDER is the encoder that pretraining exported."
        )

    def create(in_chans: int) -> torch.nn.Module:
        return create_meta_model(
            args.model,
            need_weights=args.pretrained,
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_path=args.drop_path,
            global_pool=args.gp,
            model_kwargs=args.model_kwargs,
        )

    if args.in_chans or args.input_size:
        model = create(args.in_chans or args.input_size[0])
    else:
        model = create(3)
        cfg: Any = model.pretrained_cfg
        args.in_chans = (cfg.get("input_size") or (3,))[0]  # train.py would build 3 channels
        model = model if args.in_chans == 3 else create(args.in_chans)
    for line in fit_channels(args, model):
        say(line)
    return model


def channels(args: argparse.Namespace) -> int:
    """Channels of the images, by options of one of timm's scripts."""
    return args.in_chans or (args.input_size[0] if args.input_size else 3)


def fit_channels(args: argparse.Namespace, model: torch.nn.Module) -> list[str]:
    """Sets image size, mean and std where the model's own are for another number of channels than the images have.

    timm would load images with the model's number of channels, and normalise by its mean and std.

    Returns:
        What to tell.
    """
    cfg: Any = model.pretrained_cfg
    wanted, size = channels(args), tuple(cfg.get("input_size") or (3, 224, 224))
    if args.input_size is None and size[0] != wanted:
        args.input_size = [wanted, *((args.img_size,) * 2 if args.img_size else size[1:])]
    said = []
    for name in ("mean", "std"):
        given = getattr(args, name)
        own = given or cfg.get(name) or {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}[name]
        if len(own) in (1, wanted):
            continue
        if given:
            raise ValueError(
                f"--{name} has {len(own)} numbers for images of {count(wanted, 'channel')}: one or {wanted}."
            )
        average = float(f"{sum(own) / len(own):.6g}")
        setattr(args, name, [average] * wanted)
        said.append(
            f"--{name} {average:g}: the average of the model's {len(own)} channels, for images of "
            f"{count(wanted, 'channel')}; give --{name} for your images."
        )
    return said


def channel_words(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Options that tell one of timm's scripts what `fit_channels` set and the user did not give."""
    words = ["--in-chans", str(args.in_chans)] if args.in_chans not in (None, 3) and "in_chans" not in given else []
    for name in ("input_size", "mean", "std"):
        if getattr(args, name) and name not in given:
            words += [f"--{name.replace('_', '-')}", *map(str, getattr(args, name))]
    return words


def check_input_mode(mode: str | None) -> None:
    """Refuses timm's --input-img-mode: images are decoded to the number of channels."""
    if mode:
        raise ValueError(
            f"--input-img-mode {mode} is for timm's own reader. Leave it out: images get --in-chans channels."
        )


def _choose_folder(options: Options, model: torch.nn.Module) -> Path:
    """The run's folder, named as train.py names it; must not hold another run."""
    args = options.values
    if not args.experiment:
        size = resolve_data_config(vars(args), model=model)["input_size"][-1]
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        args.experiment = f"{stamp}-{safe_model_name(args.model)}-{size}"
    args.output = args.output or os.path.join("output", "train")
    folder = Path(args.output) / args.experiment
    last = folder / "last.pth.tar"
    if args.resume and not Path(args.resume).is_file():
        raise ValueError(f"--resume {args.resume}: there is no such file. Give a checkpoint, such as {last}.")
    if args.resume:
        check_resume(Path(args.resume))
    # only the first process writes there, and may have begun to when another looks
    if world_info_from_env()[1] == 0 and not args.resume and any(folder.glob("*.pth.tar")):
        found = newest_whole(folder)
        resume = f"Resume it: --resume {found[0]}." if found else "None of them is whole."
        raise ValueError(
            f"{folder} holds the checkpoints of another run. {resume} Or choose another --experiment or --output."
        )
    return folder


# ------------------------------------------------------------------------------------- batch, learning rate and length


def _set_batch(options: Options, world_size: int, wanted: int | None) -> int:
    """Images per update over all processes; sets the accumulation steps where that number is wanted.

    Raises:
        ValueError: The wanted batch cannot be made of whole steps; names those that can.
    """
    args = options.values
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}.")
    step = args.batch_size * world_size
    if wanted is not None:
        steps = _whole_steps(wanted, args.batch_size, world_size)
        if "grad_accum_steps" in options.given and args.grad_accum_steps != steps:
            raise ValueError(
                f"--global-batch-size {wanted} needs --grad-accum-steps {steps}, got {args.grad_accum_steps}. "
                "Leave one of them out."
            )
        args.grad_accum_steps = steps
    return step * max(1, args.grad_accum_steps)


def _whole_steps(wanted: int, batch_size: int, world_size: int) -> int:
    """Accumulation steps that make a global batch."""
    step = batch_size * world_size
    steps, left = divmod(wanted, step)
    if steps > 0 and not left:
        return steps
    ways = []
    if wanted % world_size == 0 and wanted > 0:
        share = wanted // world_size
        fits = [b for b in range(1, share + 1) if share % b == 0]
        near = sorted(sorted(fits, key=lambda b: abs(b - batch_size))[:3])
        ways.append(f"--batch-size {' or '.join(map(str, near))}")
    sizes = sorted({max(1, steps) * step, max(1, steps + 1) * step})
    ways.append(f"--global-batch-size {' or '.join(map(str, sizes))}")
    raise ValueError(
        f"--global-batch-size {wanted} is not a multiple of --batch-size {batch_size} x "
        f"{count(world_size, 'process')} = {step}. What divides: {'; or '.join(ways)}."
    )


def learning_rate(
    global_batch: int, *, lr: float | None, lr_base: float, lr_base_size: int, lr_base_scale: str, opt: str
) -> tuple[float, str]:
    """The rate that train.py will compute for a batch, and how.

    Args:
        global_batch: Images per update over all processes.
        lr, lr_base, lr_base_size, lr_base_scale, opt: train.py's options.
    """
    if lr:
        return lr, "as given, whatever the batch"
    scale = lr_base_scale or ("sqrt" if any(o in opt.lower() for o in ("ada", "lamb")) else "linear")
    ratio = global_batch / lr_base_size
    if scale == "sqrt":
        return lr_base * ratio**0.5, f"{_number(lr_base)} x sqrt({global_batch} / {lr_base_size})"
    return lr_base * ratio, f"{_number(lr_base)} x {global_batch} / {lr_base_size}"


def _extra_epochs(args: argparse.Namespace) -> dict[str, int]:
    """What train.py adds to --epochs: the warmup where --warmup-prefix is set, and the cooldown."""
    return {"of warmup": args.warmup_epochs if args.warmup_prefix else 0, "of cooldown": args.cooldown_epochs}


def _updates_per_epoch(options: Options, train: Split, world_size: int) -> int:
    """Updates per epoch; a `ValueError` for not even one batch, since train.py leaves out the last one if not full."""
    args = options.values
    share = -(-train.num_images // world_size)
    batches = share // args.batch_size
    if not batches:
        raise ValueError(
            f"{train.root} has {train.num_images} images, {share} for each of {count(world_size, 'process')}: less "
            f"than one batch. Use --batch-size {share} or less."
        )
    return -(-batches // max(1, args.grad_accum_steps))


# ------------------------------------------------------------------------------------------------------ what is said


def describe(plan: Plan) -> list[str]:
    """Lines that tell what will run."""
    args, recipe, path = plan.options.values, plan.recipe, script_path(plan.script)
    version = script_version(path)
    length = _describe_length(plan)
    return [
        f"{path} ({f'timm {version}' if version else 'version unknown'}; timm {timm.__version__} is installed)",
        f"recipe {recipe.name}: {recipe.description}",
        f"{args.model}, {'pretrained' if plan.pretrained else 'from random weights'}, {args.num_classes} classes",
        *(line for split in plan.splits for line in folders.describe(split.reader)),
        _describe_batch(plan),
        length + (f" of {count(plan.updates, 'update')}" if plan.updates else ""),
        _describe_layers(plan),
    ]


def _describe_batch(plan: Plan) -> str:
    """The batch and the rate that goes with it, and what they are in the recipe."""
    args, batch = plan.options.values, plan.global_batch
    names = ("lr", "lr_base", "lr_base_size", "lr_base_scale", "opt")
    rate_options = {name: getattr(args, name) for name in names}
    lr, how = learning_rate(batch, **rate_options)
    text = (
        f"global batch {batch} = {args.batch_size} images x {count(plan.world_size, 'process')} x "
        f"{count(max(1, args.grad_accum_steps), 'step')}; lr {_number(lr)} ({how})"
    )
    wanted = plan.recipe.global_batch
    if wanted and wanted != batch:
        text += f"; the recipe's is {wanted}, lr {_number(learning_rate(wanted, **rate_options)[0])}"
    return text


def _describe_length(plan: Plan) -> str:
    args = plan.options.values
    more = "".join(f" + {n} {what}" for what, n in _extra_epochs(args).items() if n)
    return count(plan.epochs, "epoch") + (f" ({args.epochs}{more})" if more else "")


def _layer_scales(plan: Plan) -> dict[str, float | None]:
    """What layer-wise decay scales the rate of each parameter by; None where it is frozen.

    The groups are made as train.py makes them, by the model's own `group_matcher`.
    """
    args = plan.options.values
    groups = param_groups_layer_decay(
        plan.model,
        layer_decay=args.layer_decay,
        min_scale=args.layer_decay_min_scale,
        no_opt_scale=args.layer_decay_no_opt_scale,
    )
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {name: scales.get(id(p)) for name, p in plan.model.named_parameters()}


def _describe_layers(plan: Plan) -> str:
    decay = plan.options.values.layer_decay
    if decay is None:
        return "no layer-wise lr decay"
    scales = _layer_scales(plan)
    names = list(scales)
    first_block = next((n for n in names if n.startswith("stages.0.")), names[0])
    parts = []
    for name in dict.fromkeys((names[0], first_block, names[-1])):
        scale = scales[name]
        parts.append(f"{name} {'frozen' if scale is None else _number(scale)}")
    text = f"layer-wise lr decay {decay:g}, lr scale of {', '.join(parts)}"
    frozen = sum(scale is None for scale in scales.values())
    return text + (f"; {frozen} of {len(names)} parameters are frozen" if frozen else "")


def augmentation_left_out(kinds: str) -> str:
    """What images that are not 8-bit do without."""
    return (
        f"there are images {kinds}: of the augmentation they get crop, scale, ratio, flips, random erasing, mixup and "
        "cutmix; --aa, --color-jitter and --grayscale-prob are for 8-bit RGB or grey and left out for them."
    )


def warnings(plan: Plan, from_scratch: bool = False) -> list[str]:
    """What may not be meant.

    Args:
        plan: The run.
        from_scratch: Random weights were asked for.
    """
    args, found = plan.options.values, []
    if plan.kinds:
        found.append(augmentation_left_out(plan.kinds))
    found += filter(None, [folders.imbalance(split.reader.counts()) for split in plan.splits[:1]])
    if args.layer_decay is not None:
        if not isinstance(plan.model, ConvNeXtV2):
            found.append(
                f"--model {args.model} is a {type(plan.model).__name__}, not a ConvNeXt V2: its layers for the lr "
                "decay are timm's, and the recipe was not made for it."
            )
        smallest = min((scale for scale in _layer_scales(plan).values() if scale is not None), default=1.0)
        if smallest < SMALL_SCALE:
            found.append(
                f"With --layer-decay {args.layer_decay:g} the first layers of {args.model} learn at {smallest:.1e} of "
                "the rate: they will hardly change."
            )
    path = script_path(plan.script)
    version = script_version(path)
    if version and version != timm.__version__:
        found.append(
            f"{path} is of timm {version}, and timm {timm.__version__} is installed: options may be missing or mean "
            f"something else. {matching_script()}"
        )
    if args.model.startswith("local-dir:") and not plan.pretrained and not from_scratch:
        found.append(
            f"the weights in {args.model} are not loaded, since neither recipe nor options say pretrained. "
            "Add --pretrained; or say --from-scratch if that is meant."
        )
    return found
