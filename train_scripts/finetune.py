#!/usr/bin/env python3
"""Finetuning of ConvNeXt V2 with timm's own train.py and a recipe: a launcher, without a training loop.

    python train_scripts/finetune.py --recipe smoke --model local-dir:runs/mine/encoder --data-dir DATA
    torchrun --nproc-per-node 8 train_scripts/finetune.py --recipe finetune-1k-tiny --model ... --data-dir ...
    python train_scripts/finetune.py --list-recipes

It finds train.py, checks the recipe, the model's folder, the data and the batch, runs train.py in this process, and
exports the result to OUTPUT/EXPERIMENT/model, a timm folder that stock timm opens. Options that are not listed below
go to train.py. The same by hand, without checks and export:

    python train.py --device-modules timm_convnextv2 --config train_scripts/recipes/smoke.yaml --model ...
"""

import argparse
import ast
import difflib
import http.client
import importlib.util
import json
import os
import re
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import PIL
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, resolve_data_config
from timm.data.auto_augment import posterize
from timm.models import parse_model_name, safe_model_name
from timm.optim import param_groups_layer_decay
from timm.utils.distributed import world_info_from_env

import timm_convnextv2
from timm_convnextv2.checkpoint import load_checkpoint
from timm_convnextv2.models.registry import filter_weights

RECIPES = Path(timm_convnextv2.__file__).parent / "finetune" / "recipes"
PLUGIN = timm_convnextv2.__name__
TIMM_RAW = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"
NEEDED = ("main", "parser", "config_parser")  # of train.py
# Data sets whose classes can only be known by opening them; everything else is a folder (or tar) of images.
OPAQUE_DATASETS = ("torch", "hfds", "hfids", "tfds", "wds")
# What validate.py must be told as train.py was.
EVALUATION_OPTIONS = ("dataset", "class_map", "input_img_mode", "input_key", "target_key", "device")
SMALL_SCALE = 1e-3  # a layer that learns a thousand times slower than the head does not learn


def refuse(message: str) -> NoReturn:
    """A mistake in the options, told once and without a traceback."""
    raise ValueError(message)


def say(text: str, error: bool = False) -> None:
    """Prints on the first process only; errors on the first of each node, which may have folders of its own."""
    local_rank, rank, _ = world_info_from_env()
    if (local_rank if error else rank) == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def closest(word: str, known: list[str]) -> str:
    """' Did you mean ...?' where a known word resembles it, else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def number(x: float) -> str:
    return f"{x:.4g}"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


# ------------------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class Recipe:
    """A recipe file: values by train.py's option names (with underscores), and what its header says."""

    name: str
    path: Path
    values: dict[str, Any]
    description: str = ""  # first line of the header
    global_batch: int | None = None  # the header's `Global batch:`, for which the schedule was made


def recipe_names() -> list[str]:
    """Names of the recipes that come with this script."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Reads a recipe by its name, or by the path of a YAML file.

    Raises:
        ValueError: No such recipe, or the file is not a mapping.
    """
    path = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            known = recipe_names()
            refuse(
                f"--recipe {name} is unknown.{closest(name, known)} There are: {', '.join(known)}; "
                "or give the path of a .yaml file."
            )
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f"--recipe {name} cannot be read: {one_line(e)}") from e
    if not isinstance(values, dict) or not values:
        refuse(f"--recipe {name} holds {type(values).__name__}, expected lines of `option: value`.")
    header = [line[1:].strip() for line in text[: re.search(r"^[^#\n]", text, re.M).start()].splitlines()]
    batch = re.search(r"^Global batch: ([\d,]+)", "\n".join(header), re.M)
    return Recipe(
        name=path.stem,
        path=path.resolve(),
        values=values,
        description=next(iter(header), ""),
        global_batch=int(batch[1].replace(",", "")) if batch else None,
    )


def list_recipes() -> str:
    """One line a recipe: its name and what it is for."""
    width = max(map(len, recipe_names()))
    return "\n".join(f"{name:{width}}  {load_recipe(name).description}" for name in recipe_names())


# ----------------------------------------------------------------------------------------------------------- train.py


def check_script(source: str) -> str:
    """Why a text is not timm's train.py, whole; nothing if it is."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as e:
        return f"it is not Python ({e})"
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    missing = [name for name in NEEDED if name not in names]
    if missing:
        return f"it has no {', no '.join(missing)}"
    if not isinstance(tree.body[-1], ast.If):  # `if __name__ == "__main__"`: a file cut off may be Python up to there
        return "its end is missing"
    return ""


def download_train_script(version: str, base_url: str = TIMM_RAW, timeout: float = 20.0) -> Path:
    """timm's train.py of a version, from the cache or downloaded into it.

    Only the first process of a node downloads; the others wait for the file.

    Args:
        version: Of timm; names the git tag.
        base_url: Of the repository's raw files.
        timeout: Seconds to wait for the server, each time.

    Raises:
        ValueError: No network, no such file, or it came incomplete; says how to provide it otherwise.
    """
    url = f"{base_url}/v{version}/train.py"
    target = Path(torch.hub.get_dir()) / PLUGIN / f"train-{version}.py"
    if target.is_file() and not check_script(target.read_text(encoding="utf-8")):
        return target
    problem = ""
    if world_info_from_env()[0] == 0:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                source = response.read().decode("utf-8")
            problem = check_script(source)
            if not problem:
                target.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=target.parent, encoding="utf-8", delete=False) as part:
                    part.write(source)
                os.replace(part.name, target)
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
            problem = f"{type(e).__name__}: {e}"
    else:
        end, problem = time.monotonic() + 2 * timeout, "the first process of this node did not get it"
        while problem and time.monotonic() < end:
            time.sleep(0.1)
            if target.is_file() and not check_script(target.read_text(encoding="utf-8")):
                problem = ""
    if problem:
        refuse(
            f"timm's train.py is needed and not part of its package; the download of {url} failed ({problem}). "
            f"Provide it in one of three ways: save that file anywhere and give --timm-train PATH or set "
            f"TIMM_TRAIN=PATH; or install timm from a clone of its repository (pip install -e CLONE); or save the "
            f"file as {target}."
        )
    return target


def find_train_script(option: str | None = None, **download) -> Path:
    """Where timm's train.py is: the option, TIMM_TRAIN, beside an editable timm, the cache or a download.

    Args:
        option: Value of --timm-train, the file or the folder of a clone.
        download: See `download_train_script`.
    """
    for source, value in (("--timm-train", option), ("TIMM_TRAIN", os.environ.get("TIMM_TRAIN"))):
        if not value:
            continue
        path = Path(value) / "train.py" if Path(value).is_dir() else Path(value)
        if not path.is_file():
            refuse(f"{source} is {value}, where there is no train.py. Give the path of timm's train.py.")
        return path.resolve()
    beside = Path(timm.__file__).resolve().parents[1] / "train.py"
    if beside.is_file() and not check_script(beside.read_text(encoding="utf-8")):
        return beside
    return download_train_script(timm.__version__, **download)


def script_version(path: Path) -> str:
    """Version of the timm repository that a train.py belongs to; empty where nothing tells it."""
    beside = path.parent / "timm" / "version.py"
    if beside.is_file():
        found = re.search(r"__version__ = ['\"](.+?)['\"]", beside.read_text(encoding="utf-8"))
        return found[1] if found else ""
    return path.stem.removeprefix("train-") if path.parent.name == PLUGIN else ""


def load_train_script(path: Path) -> ModuleType:
    """Imports train.py; its main() does not run.

    Raises:
        ValueError: It is another script, or made for another timm.
    """
    try:
        problem = check_script(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        problem = str(e)
    if problem:
        refuse(f"{path} is not timm's train.py: {problem}.")
    spec = importlib.util.spec_from_file_location("timm_train_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise ValueError(
            f"{path} does not go with the installed timm {timm.__version__} ({e}). Give the train.py of that version "
            f"with --timm-train: {TIMM_RAW}/v{timm.__version__}/train.py"
        ) from e
    return module


def allow_processes_on_cpu(script: ModuleType) -> None:
    """Lets train.py train in several processes without GPUs.

    It names the device to DistributedDataParallel, which takes such names for GPUs only and refuses `cpu`.

    Raises:
        ValueError: It has no `ClassificationTask`, from before timm.task.
    """
    if not hasattr(script, "ClassificationTask"):
        refuse(
            f"{script.__file__} is too old to train in several processes on CPU. Give the train.py of timm "
            f"{timm.__version__} with --timm-train: {TIMM_RAW}/v{timm.__version__}/train.py"
        )

    class Task(script.ClassificationTask):
        def prepare_distributed(self, device_ids: list | None = None, **kwargs) -> Any:
            return super().prepare_distributed(device_ids=None, **kwargs)

    script.ClassificationTask = Task


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

    Raises:
        ValueError: Recipe or command line have an option that this train.py does not know or a value that it does not
            take, or train.py lacks --device-modules.
    """
    script.parser.error = refuse  # one message, without the usage of some 150 options
    defaults = vars(script.parser.parse_args([]))
    path = Path(script.__file__)
    if "device_modules" not in defaults:
        refuse(
            f"{path} has no --device-modules: it is too old for {PLUGIN}. Give the train.py of timm "
            f"{timm.__version__} with --timm-train: {TIMM_RAW}/v{timm.__version__}/train.py"
        )
    for key in map(str, recipe.values):
        if key not in defaults:
            version = script_version(path)
            refuse(
                f"Recipe {recipe.path} sets '{key}', which {path}{f' (timm {version})' if version else ''} does not "
                f"know.{closest(key.replace('-', '_'), list(defaults))}"
            )
    unset = object()
    given = script.parser.parse_args(rest, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    script.parser.set_defaults(**recipe.values)  # as train.py does with its --config
    return Options(
        values=script.parser.parse_args(rest),
        defaults=defaults,
        given={k for k, v in vars(given).items() if v is not unset and not (k == "data" and v is None)},
    )


# -------------------------------------------------------------------------------------------------------------- model


def check_model_folder(folder: Path, need_weights: bool = True) -> str:
    """Architecture that a timm folder names.

    Args:
        folder: Its path.
        need_weights: Whether they are to be loaded.

    Raises:
        ValueError: It is not a timm folder that can be finetuned.
    """
    expected = "Expected a timm folder: config.json and model.safetensors, as pretrain.py writes to RUN/encoder."
    if not folder.is_dir():
        refuse(f"--model local-dir:{folder}: there is no such folder. {expected}")
    config = folder / "config.json"
    if not config.is_file():
        inner = [name for name in ("encoder", "model") if (folder / name / "config.json").is_file()]
        hint = f" Did you mean local-dir:{folder / inner[0]}?" if inner else ""
        refuse(f"--model local-dir:{folder}: it has no config.json.{hint} {expected}")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        architecture = values.get("architecture") if isinstance(values, dict) else None
    except (OSError, ValueError) as e:
        raise ValueError(f"{config} cannot be read as JSON: {e}. {expected}") from e
    if not isinstance(architecture, str):
        refuse(f"{config} is not timm's: it names no 'architecture'. {expected}")
    if architecture.startswith("fcmae_"):
        refuse(
            f"{folder} holds a whole FCMAE ({architecture}), decoder included. Finetune its encoder: the folder that "
            f"pretrain.py wrote to RUN/encoder, or {PLUGIN}.checkpoint.export_encoder makes of it."
        )
    if not timm.is_model(architecture):
        known = timm.list_models("convnextv2_*")
        refuse(
            f"{config} names the architecture '{architecture}', which timm {timm.__version__} does not have."
            f"{closest(architecture, known)} {expected}"
        )
    if need_weights and not any(any(folder.glob(f"*{end}")) for end in (".safetensors", ".pth", ".pth.tar", ".bin")):
        refuse(f"{folder} has no weights. {expected}")
    return architecture


def create_meta_model(options: Options) -> torch.nn.Module:
    """The model that train.py will create, without memory for its weights.

    Raises:
        ValueError: There is no such model, or its folder is not whole.
    """
    args = options.values
    if "model" not in options.given and args.model == options.defaults["model"]:
        refuse("--model is needed: --model local-dir:FOLDER, where FOLDER is the encoder that pretrain.py exported.")
    try:
        source, name = parse_model_name(args.model)
    except ValueError as e:
        raise ValueError(f"--model: {e}") from e
    if source == "local-dir":
        check_model_folder(Path(name), need_weights=args.pretrained)
    elif source is None and not timm.is_model(name.split(".")[0]):
        known = timm.list_models("convnextv2_*")
        refuse(f"--model {name} is not a model of timm.{closest(name, known)} ConvNeXt V2: {', '.join(known)}.")
    try:
        with torch.device("meta"):
            return timm.create_model(
                args.model,
                pretrained=False,
                in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
                num_classes=args.num_classes,
                drop_path_rate=args.drop_path,
                global_pool=args.gp,
                **args.model_kwargs,
            )
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"--model {args.model} cannot be created: {type(e).__name__}: {one_line(e)}") from e


def check_weights(folder: Path, model: torch.nn.Module) -> None:
    """Reads a folder's weights once, before train.py does.

    Raises:
        ValueError: They are damaged, or do not cover or fit the model; its head may be new.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:  # a name of timm's that is rarer: train.py reads it
        return
    weights = load_checkpoint(files[0])
    if not isinstance(model, timm_convnextv2.ConvNeXtV2):
        if any(".grn." in name for name in weights):
            refuse(
                f"{files[0]} holds a ConvNeXt V2, and its config.json names the architecture "
                f"'{model.pretrained_cfg['architecture']}'. Expected the two files of one export."
            )
        return  # how others rename their weights is timm's affair
    try:
        weights = filter_weights(weights, model)
    except RuntimeError as e:
        raise ValueError(f"{files[0]}: {e}") from e
    for name, wanted in model.state_dict().items():
        found = tuple(weights[name].shape) if name in weights else None
        adapted = name.startswith("stem.0.weight")  # timm sums or repeats its channels
        if found != tuple(wanted.shape) and not name.startswith("head.") and not adapted:
            refuse(
                f"{files[0]} does not fit its config.json: '{name}' is {list(found)} in the file and "
                f"{list(wanted.shape)} in the model. Expected the two files of one export."
            )


def describe_layers(model: torch.nn.Module, args: argparse.Namespace) -> tuple[str, list[str]]:
    """What the layer-wise decay does to a model, as a line and warnings.

    The groups are made as train.py makes them, by the model's own `group_matcher`.
    """
    warnings = []
    if args.layer_decay is None:
        return "no layer-wise lr decay", warnings
    if not isinstance(model, timm_convnextv2.ConvNeXtV2):
        warnings.append(
            f"--model {args.model} is a {type(model).__name__}, not a ConvNeXt V2: its layers for the lr decay are "
            "timm's, and the recipe was not made for it."
        )
    groups = param_groups_layer_decay(
        model,
        layer_decay=args.layer_decay,
        min_scale=args.layer_decay_min_scale,
        no_opt_scale=args.layer_decay_no_opt_scale,
    )
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    first_block = next((n for n in names if n.startswith("stages.0.")), names[0])
    parts = []
    for name in dict.fromkeys((names[0], first_block, names[-1])):
        scale = scales.get(id(model.get_parameter(name)))
        parts.append(f"{name} {'frozen' if scale is None else number(scale)}")
    text = f"layer-wise lr decay {args.layer_decay:g}, lr scale of {', '.join(parts)}"
    frozen = sum(id(p) not in scales for p in model.parameters())
    if frozen:
        text += f"; {frozen} of {len(names)} parameters are frozen"
    smallest = min(scales.values(), default=1.0)
    if smallest < SMALL_SCALE:
        warnings.append(
            f"With --layer-decay {args.layer_decay:g} the first layers of {args.model} learn at {smallest:.1e} of the "
            "rate: they will hardly change."
        )
    return text, warnings


# --------------------------------------------------------------------------------------------------------------- data


@dataclass
class Split:
    """A folder of images, one sub-folder a class."""

    name: str
    root: Path
    num_images: int
    classes: list[str]


def open_split(args: argparse.Namespace, root: Path, name: str, option: str) -> Split:
    """Lists a split's folder as train.py will.

    Raises:
        ValueError: timm finds no folder of that name, no images or no classes in it.
    """
    expected = f"Expected {root / name} with one sub-folder of images a class, or another {option}."
    try:
        dataset = create_dataset(
            args.dataset, root=str(root), split=name, class_map=args.class_map, input_key=args.input_key
        )
    except (AssertionError, OSError, RuntimeError) as e:
        raise ValueError(f"{option} {name} of {root}: {e or type(e).__name__}. {expected}") from e
    reader = dataset.reader
    # without such a folder timm takes the root itself for the split, and `train` for a class
    if Path(reader.root).resolve() == root.resolve():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        refuse(f"{root} has no {option} '{name}'; it has {', '.join(there[:10]) or 'no folders'}. {expected}")
    if "" in reader.class_to_idx:
        refuse(f"{reader.root} has images that lie in no sub-folder, so that their class is unknown. {expected}")
    return Split(name, Path(reader.root), len(dataset), sorted(reader.class_to_idx))


def check_data(options: Options) -> list[Split]:
    """Checks a folder of images and sets the number of classes; other data sets are left to train.py.

    Raises:
        ValueError: A split is missing or empty, the splits differ in their classes, or these do not fit
            --num-classes; for other data sets, --num-classes is missing.
    """
    args = options.values
    args.data_dir = args.data_dir or args.data
    prefix, slash, _ = args.dataset.partition("/")
    opaque = slash and prefix.lower() in OPAQUE_DATASETS
    if opaque or args.data_dir and Path(args.data_dir).is_file():  # a tar
        if not args.num_classes:
            refuse(f"--num-classes is needed: only a folder of images tells it, not {args.dataset or args.data_dir}.")
        return []
    if not args.data_dir:
        refuse("--data-dir is needed: a folder with train/ and validation/, in each one sub-folder of images a class.")
    root = Path(args.data_dir)
    if not root.is_dir():
        refuse(f"--data-dir {root} does not exist. Expected a folder with train/ and validation/.")
    splits = [open_split(args, root, args.train_split, "--train-split")]
    if args.val_split:
        splits.append(open_split(args, root, args.val_split, "--val-split"))
    train, val = splits[0], splits[-1]
    if train.classes != val.classes:
        differ = []
        for one, other in ((train, val), (val, train)):
            only = [c for c in one.classes if c not in other.classes]
            if only:
                differ.append(f"only in {one.root}: {', '.join(only[:5])}{', ...' if len(only) > 5 else ''}")
        refuse(
            f"{train.root} has {len(train.classes)} classes and {val.root} {len(val.classes)} ({'; '.join(differ)}). "
            "Both need a sub-folder with images for every class, of the same name."
        )
    found = len(train.classes)
    if "num_classes" in options.given and args.num_classes != found:
        refuse(
            f"--num-classes {args.num_classes}, but {train.root} has {found} classes "
            f"({', '.join(train.classes[:5])}{', ...' if found > 5 else ''}). Leave --num-classes out, or correct one."
        )
    if args.num_classes not in (None, found):
        say(f"{found} classes, counted in {train.root}, replace the recipe's {args.num_classes}.")
    args.num_classes = found
    return splits


def check_augmentation(policy: str | None) -> None:
    """Refuses a random augmentation that would stop the run at some image.

    At its full strength timm's Posterize keeps 0 bits, a black image; Pillow 13 raises an error instead.

    Raises:
        ValueError: The policy can ask for that, and the installed Pillow refuses it.
    """
    bounded = re.search(r"-mmax(\d+)", policy or "")
    if not policy or "-inc1" in policy and bounded and int(bounded[1]) < 10:
        return
    try:
        posterize(Image.new("RGB", (1, 1)), 0)
    except ValueError as e:
        policy = f"{policy}-mmax9" if "-inc1" in policy and not bounded else "rand-m9-mstd0.5-inc1-mmax9"
        raise ValueError(
            f"--aa needs another Pillow: timm {timm.__version__} posterizes to 0 bits, which Pillow {PIL.__version__} "
            f"refuses ({e}), so that the run would stop at some image. Install an older one (pip install 'pillow<13'), "
            f"or keep the strength below its maximum, which differs a little from the paper: --aa {policy}"
        ) from e


# -------------------------------------------------------------------------------------------------------------- batch


def plan_batch(options: Options, world_size: int, wanted: int | None) -> int:
    """Images per update over all processes; sets the accumulation steps where that number is wanted.

    Raises:
        ValueError: The wanted batch cannot be made of whole steps; names those that can.
    """
    args = options.values
    step = args.batch_size * world_size
    if args.batch_size < 1:
        refuse(f"--batch-size must be at least 1, got {args.batch_size}.")
    if wanted is not None:
        steps, left = divmod(wanted, step)
        if left or not steps:
            ways = []
            if wanted % world_size == 0 and wanted > 0:
                share = wanted // world_size
                fits = [b for b in range(1, share + 1) if share % b == 0]
                near = sorted(sorted(fits, key=lambda b: abs(b - args.batch_size))[:3])
                ways.append(f"--batch-size {' or '.join(map(str, near))}")
            sizes = sorted({max(1, steps) * step, (steps + 1) * step})
            ways.append(f"--global-batch-size {' or '.join(map(str, sizes))}")
            refuse(
                f"--global-batch-size {wanted} is not a multiple of --batch-size {args.batch_size} x "
                f"{count(world_size, 'process')} = {step}. What divides: {'; or '.join(ways)}."
            )
        if "grad_accum_steps" in options.given and args.grad_accum_steps != steps:
            refuse(
                f"--global-batch-size {wanted} needs --grad-accum-steps {steps}, got {args.grad_accum_steps}. "
                "Leave one of them out."
            )
        args.grad_accum_steps = steps
    return step * max(1, args.grad_accum_steps)


def learning_rate(args: argparse.Namespace, global_batch: int) -> tuple[float, str]:
    """The rate that train.py will compute for a batch, and how."""
    if args.lr:
        return args.lr, "as given, whatever the batch"
    scale = args.lr_base_scale or ("sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear")
    ratio = global_batch / args.lr_base_size
    power = 0.5 if scale == "sqrt" else 1.0
    how = f"{number(args.lr_base)} x {global_batch} / {args.lr_base_size}"
    if scale == "sqrt":
        how = f"{number(args.lr_base)} x sqrt({global_batch} / {args.lr_base_size})"
    return args.lr_base * ratio**power, how


def describe_batch(args: argparse.Namespace, recipe: Recipe, global_batch: int, world_size: int) -> str:
    """The batch and the rate that goes with it, and what they are in the recipe."""
    lr, how = learning_rate(args, global_batch)
    text = (
        f"global batch {global_batch} = {args.batch_size} images x {count(world_size, 'process')} x "
        f"{count(max(1, args.grad_accum_steps), 'step')}; lr {number(lr)} ({how})"
    )
    if recipe.global_batch and recipe.global_batch != global_batch:
        text += f"; the recipe's is {recipe.global_batch}, lr {number(learning_rate(args, recipe.global_batch)[0])}"
    return text


def extra_epochs(args: argparse.Namespace) -> dict[str, int]:
    """What train.py adds to --epochs: the warmup where --warmup-prefix is set, and the cooldown."""
    return {"of warmup": args.warmup_epochs if args.warmup_prefix else 0, "of cooldown": args.cooldown_epochs}


def describe_length(args: argparse.Namespace) -> str:
    """Epochs in all."""
    extra = extra_epochs(args)
    more = "".join(f" + {n} {what}" for what, n in extra.items() if n)
    return count(args.epochs + sum(extra.values()), "epoch") + (f" ({args.epochs}{more})" if more else "")


def check_epoch(args: argparse.Namespace, train: Split, world_size: int) -> int:
    """Updates per epoch.

    Raises:
        ValueError: Not even one batch, since train.py leaves out the last one if it is not full.
    """
    share = -(-train.num_images // world_size)
    batches = share // args.batch_size
    if not batches:
        refuse(
            f"{train.root} has {train.num_images} images, {share} for each of {count(world_size, 'process')}: less "
            f"than one batch. Use --batch-size {share} or less."
        )
    return -(-batches // max(1, args.grad_accum_steps))


# --------------------------------------------------------------------------------------------------------------- run


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = refuse
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="a recipe of --list-recipes, or a YAML file with options of train.py")
    add("--list-recipes", action="store_true", help="print names and purposes, then stop")
    add("--timm-train", metavar="PATH", help="timm's train.py (else: TIMM_TRAIN, a clone of timm, a download)")
    add("--global-batch-size", type=int, metavar="N", help="images per update over all processes")
    add("--from-scratch", action="store_true", help="the same recipe from random weights")
    add("--dry-run", action="store_true", help="check everything, print what would run, then stop")
    return parser


def prepare_folder(options: Options, model: torch.nn.Module) -> Path:
    """The run's folder, named as train.py names it; must not hold another run."""
    args = options.values
    if not args.experiment:
        size = resolve_data_config(vars(args), model=model)["input_size"][-1]
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        args.experiment = f"{stamp}-{safe_model_name(args.model)}-{size}"
    args.output = args.output or os.path.join("output", "train")
    folder = Path(args.output) / args.experiment
    if args.resume and not Path(args.resume).is_file():
        refuse(f"--resume {args.resume}: there is no such file. Give a checkpoint, such as {folder / 'last.pth.tar'}.")
    # only the first process writes there, and may have begun to when another looks
    if world_info_from_env()[1] == 0 and not args.resume and any(folder.glob("*.pth.tar")):
        refuse(
            f"{folder} holds the checkpoints of another run. Go on with it: --resume {folder / 'last.pth.tar'}. "
            "Or choose another --experiment or --output."
        )
    return folder


@dataclass
class Plan:
    """A run that passed every check."""

    script: ModuleType
    recipe: Recipe
    argv: list[str]
    folder: Path
    args: argparse.Namespace
    defaults: dict[str, Any]


def prepare(argv: list[str]) -> Plan | None:
    """Checks everything that can be checked before training, and says what will run.

    Returns:
        The plan, or None where there is nothing to run (--list-recipes, --dry-run).

    Raises:
        ValueError: A user's mistake, in one message.
    """
    own, rest = build_parser().parse_known_args(argv)
    if own.list_recipes:
        say(list_recipes())
        return None
    if not own.recipe:
        refuse(f"--recipe is needed: {', '.join(recipe_names())}, or the path of a .yaml file.")
    if any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        refuse("--config is what the launcher gives to train.py: give your file as --recipe FILE.")
    recipe = load_recipe(own.recipe)
    path = find_train_script(own.timm_train)
    script = load_train_script(path)
    if own.from_scratch:
        recipe = replace(recipe, values={**recipe.values, "pretrained": False})
    options = resolve_options(script, recipe, rest)
    args = options.values
    if own.from_scratch:
        for name in ("pretrained", "pretrained_path", "initial_checkpoint"):
            if getattr(args, name, None):
                refuse(f"--from-scratch starts from random weights; leave out --{name.replace('_', '-')}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available() and not own.dry_run:
        refuse(f"--device {args.device}: PyTorch {torch.__version__} sees no CUDA GPU here. Use --device cpu.")

    if args.pretrained_path and not args.pretrained:
        refuse("--pretrained-path is read by train.py only with --pretrained: add it, or leave both out.")
    check_augmentation(args.aa)

    world_size = world_info_from_env()[2]
    if args.device == "cpu" and world_size > 1:
        allow_processes_on_cpu(script)
    splits = check_data(options)
    global_batch = plan_batch(options, world_size, own.global_batch_size)
    updates = check_epoch(args, splits[0], world_size) if splits else None
    model = create_meta_model(options)
    if not args.in_chans and not args.input_size:
        args.in_chans = (model.pretrained_cfg.get("input_size") or (3,))[0]  # train.py would build 3 channels
        model = create_meta_model(options)
    source, name = parse_model_name(args.model)
    if source == "local-dir" and args.pretrained and not args.pretrained_path:
        check_weights(Path(name), model)
    folder = prepare_folder(options, model)
    args.device_modules = list(dict.fromkeys([*(args.device_modules or []), PLUGIN]))
    layers, warnings = describe_layers(model, args)
    version = script_version(path)
    if version and version != timm.__version__:
        warnings.append(
            f"{path} is of timm {version}, and timm {timm.__version__} is installed: options may be missing or mean "
            f"something else. Its own train.py: {TIMM_RAW}/v{timm.__version__}/train.py"
        )
    pretrained = args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume
    if args.model.startswith("local-dir:") and not pretrained and not own.from_scratch:
        warnings.append(
            f"the weights in {args.model} are not loaded, since neither recipe nor options say pretrained. "
            "Add --pretrained; or say --from-scratch if that is meant."
        )

    say(f"{path} ({f'timm {version}' if version else 'version unknown'}; timm {timm.__version__} is installed)")
    say(f"recipe {recipe.name}: {recipe.description}")
    say(f"{args.model}, {'from random weights' if not pretrained else 'pretrained'}, {args.num_classes} classes")
    for split in splits:
        say(f"{split.root}: {split.num_images} images")
    say(describe_batch(args, recipe, global_batch, world_size))
    say(describe_length(args) + (f" of {count(updates, 'update')}" if updates else ""))
    say(layers)
    for warning in warnings:
        say(f"warning: {warning}", error=True)

    # what was found out goes to train.py as options, so that its args.yaml tells the whole run
    words = ["--device-modules", *args.device_modules, "--output", args.output, "--experiment", args.experiment]
    words += ["--in-chans", str(args.in_chans)] if args.in_chans not in (None, 3) else []
    words += ["--num-classes", str(args.num_classes), "--grad-accum-steps", str(args.grad_accum_steps)]
    if own.dry_run:
        say("train.py's options that differ from its defaults:")
        for name, value in options.changed().items():
            say(f"  {name}: {value}")
        return None
    return Plan(script, recipe, [*rest, *words], folder, args, options.defaults)


@contextmanager
def arguments(plan: Plan) -> Iterator[None]:
    """sys.argv as if train.py had been started with the recipe."""
    before = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        config = plan.recipe.path
        if yaml.safe_load(config.read_text(encoding="utf-8")) != plan.recipe.values:  # --from-scratch
            config = Path(folder) / config.name
            config.write_text(yaml.safe_dump(plan.recipe.values), encoding="utf-8")
        sys.argv = [plan.script.__file__, "--config", str(config), *plan.argv]
        try:
            yield
        finally:
            sys.argv = before


def next_commands(plan: Plan, model: Path) -> list[str]:
    """Commands that evaluate the result with stock timm, and show what publishing would send."""
    args = plan.args
    validate = Path(plan.script.__file__).with_name("validate.py")
    commands = []
    if args.val_split:
        words = ["python", str(validate) if validate.is_file() else "validate.py"]
        words += ["--model", f"local-dir:{model}", "--pretrained"]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--split", args.val_split] if args.val_split != "validation" else []
        for name in EVALUATION_OPTIONS:
            if getattr(args, name) != plan.defaults[name]:
                words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        chans = args.input_size[0] if args.input_size else args.in_chans
        words += ["--in-chans", str(chans)] if chans != 3 else []
        words += ["--amp", "--amp-dtype", args.amp_dtype] if args.amp else []
        commands.append(shlex.join(words))
    publish = Path(__file__).with_name("publish.py")
    commands.append(shlex.join(["python", str(publish), str(plan.folder), "USER/NAME", "--dry-run"]))
    return commands


def epochs_done(folder: Path) -> int | None:
    """Epochs in the run's summary.csv; None where there is none."""
    try:
        rows = (folder / "summary.csv").read_text(encoding="utf-8").splitlines()
        return int(rows[-1].partition(",")[0]) + 1
    except (OSError, IndexError, ValueError):
        return None


def finish(plan: Plan) -> int:
    """Exports what train.py saved, and says what to do with it."""
    if not any((plan.folder / name).is_file() for name in ("model_best.pth.tar", "last.pth.tar")):
        say(f"error: train.py ended without a checkpoint in {plan.folder}; there is nothing to export.", error=True)
        return 1
    from timm_convnextv2.checkpoint import export_finetuned

    try:
        model = export_finetuned(plan.folder, plan.folder / "model", info={"Recipe": plan.recipe.name})
    except (OSError, ValueError, RuntimeError) as e:
        say(f"error: the run in {plan.folder} is whole, but its model could not be exported: {e}", error=True)
        return 1
    total, done = plan.args.epochs + sum(extra_epochs(plan.args).values()), epochs_done(plan.folder)
    if done is not None and done < total:  # train.py ends quietly on Ctrl-C
        resume = f"--experiment {plan.args.experiment} --resume {plan.folder / 'last.pth.tar'}"
        say(f"Stopped after {count(done, 'epoch')} of {total}; the same command with {resume} goes on.")
        say(f"What there is so far is in {model}")
    else:
        say(f"Done: the finetuned model is in {model}")
    say("Evaluate it with stock timm, and see what would be published:")
    for command in next_commands(plan, model):
        say(f"  {command}")
    return 0


def cli(argv: list[str] | None = None) -> int:
    """Runs the launcher; returns its exit status. What train.py raises passes through."""
    try:
        plan = prepare(sys.argv[1:] if argv is None else argv)
    except ValueError as e:
        say(f"error: {e}", error=True)
        return 2
    if plan is None:
        return 0
    with arguments(plan):
        plan.script.main()
    return finish(plan) if world_info_from_env()[1] == 0 else 0


if __name__ == "__main__":
    sys.exit(cli())
