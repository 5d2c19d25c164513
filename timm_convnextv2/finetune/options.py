"""Options of timm's scripts, resolved by the scripts' own parsers, and changed only by making a second value."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..config import usable_cores
from ..console import CommandParser, closest
from ..recipes import Recipe
from ..runs.device import check_device, keep_amp
from .scripts import matching_script, script_path, script_version

PLUGIN = "timm_convnextv2"  # for train.py's --device-modules
# Options of ours that train.py's parser takes too: so they are in its args.yaml and checkpoints, and recipes may set
# them. Those after `license` are not typed: the launcher derives them from the model, --nodata and the images.
ADDED_OPTIONS = {"nodata": float, "license": str, "pixels": json.loads}
ADDED_OPTIONS |= {"num_images": int, "num_validation": int, "chance": float}


@dataclass(frozen=True)
class ScriptOptions:
    """Options of one of timm's scripts as it will resolve them; each can be read as an attribute."""

    values: Mapping[str, Any]  # command line over recipe over the script's defaults, by name with underscores
    defaults: Mapping[str, Any]
    given: frozenset[str]  # names of the options on the command line

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"the script has no option '{name}'") from None

    def evolve(self, **values: Any) -> "ScriptOptions":
        """A copy with other values."""
        return replace(self, values={**self.values, **values})

    def changed(self) -> dict[str, Any]:
        """The options that differ from the script's defaults."""
        return {name: value for name, value in self.values.items() if value != self.defaults[name]}

    def words_since(self, before: "ScriptOptions") -> list[str]:
        """The command line that turns the values of `before` into these."""
        words: list[str] = []
        for name, value in self.values.items():
            flag = f"--{name.replace('_', '-')}"
            if value == before.values[name]:
                continue
            if isinstance(value, list | tuple):
                words += [flag, *map(str, value)]
            elif value is True:
                words.append(flag)
            else:  # with '=', so that a negative number is not taken for an option
                words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
        return words

    @property
    def data_folder(self) -> str | None:
        """--data-dir, or the word without an option name that timm also takes for it."""
        return self.data_dir or self.data

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.in_chans or (self.input_size[0] if self.input_size else 3)


def resolve_options(script: ModuleType, words: list[str], recipe: Recipe | None = None) -> ScriptOptions:
    """Resolves a command line, and for train.py a recipe, with the script's own parser."""
    parser = script.parser
    parser.error = MethodType(CommandParser.error, parser)  # raises; argparse would print a usage of 150 options first
    for name, kind in ADDED_OPTIONS.items() if recipe else ():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    defaults = vars(parser.parse_args([]))
    if recipe:
        _check_recipe(script, recipe, defaults)
    unset = object()
    given = vars(parser.parse_args(words, SimpleNamespace(**dict.fromkeys(defaults, unset))))
    if recipe:
        parser.set_defaults(**recipe.values)  # as train.py does with its --config
    # argparse sets a positional word even if it is missing
    typed = frozenset(k for k, v in given.items() if v is not unset and not (k == "data" and v is None))
    return ScriptOptions(vars(parser.parse_args(words)), defaults, typed)


def _check_recipe(script: ModuleType, recipe: Recipe, known: dict[str, Any]) -> None:
    path, version = script_path(script), script_version(script)
    if "device_modules" not in known:
        raise ValueError(f"{path} has no --device-modules: it is too old for {PLUGIN}. {matching_script()}")
    if unknown := [key for key in map(str, recipe.values) if key not in known]:
        what = f"{path}{f' (timm {version})' if version else ''} does not have"
        near = closest(unknown[0].replace("-", "_"), known)
        raise ValueError(f"Recipe {recipe.path} sets '{unknown[0]}', which {what}.{near}")


def fit_channels(options: ScriptOptions, model: torch.nn.Module) -> tuple[ScriptOptions, list[str]]:
    """Sets image size, mean and std if the model's own are for other channels than the images have; returns notes too.

    Otherwise timm would load images with the model's number of channels, and normalise by its mean and std.
    """
    cfg: Any = model.pretrained_cfg
    wanted, size = options.channels, tuple(cfg.get("input_size") or (3, 224, 224))
    if options.input_size is None and size[0] != wanted:
        options = options.evolve(input_size=[wanted, *((options.img_size,) * 2 if options.img_size else size[1:])])
    notes = []
    for name, usual in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        given = getattr(options, name)
        values = given or cfg.get(name) or usual
        if len(values) in (1, wanted):
            continue
        if given:
            raise ValueError(f"--{name} has {len(values)} numbers, expected one or {wanted}: one per channel.")
        average = float(f"{sum(values) / len(values):.6g}")
        options = options.evolve(**{name: [average] * wanted})
        what = f"--{name} {average:g}: the average of the model's {len(values)} channels"
        notes.append(f"{what}, because the images have {wanted}; give --{name} for your images.")
    return options, notes


def for_this_machine(options: ScriptOptions) -> tuple[ScriptOptions, list[str]]:
    """The options with a device that this machine has, and a note if that is not timm's default.

    A recipe's amp is left out where it is slow, see `keep_amp`.
    Data workers are at most as many as the cores of the process, unless the user gave a number.
    """
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if "workers" not in options.given and getattr(options, "workers", 0) > cores:
        options = options.evolve(workers=cores)
    notes = []
    if options.device == "cuda" and "device" not in options.given and not torch.cuda.is_available():
        options, notes = options.evolve(device="cpu"), ["--device cpu: PyTorch sees no CUDA GPU here."]
    check_device(options.device)
    if options.amp and not keep_amp(options.device, "amp" in options.given):
        options = options.evolve(amp=False)
    return options, notes


def check_input_mode(options: ScriptOptions) -> None:
    """Refuses timm's --input-img-mode: our reader converts images to --in-chans channels."""
    if mode := getattr(options, "input_img_mode", None):
        raise ValueError(f"--input-img-mode {mode} is for timm's own reader. Leave it out and set --in-chans instead.")
