"""What training or evaluation starts from: a file of weights, its licence, what the folder says of the images."""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict, parse_model_name

from ..checkpoint import load_checkpoint
from ..checkpoint.files import weights_in
from ..checkpoint.finetuned import origin_of_run
from ..command import say
from ..models import ConvNeXtV2
from ..models.registry import filter_weights
from ..models.weights import check_weights
from ..provenance import config_beside, nodata_of, resolve_license

__all__ = ["check_start_file", "choose_nodata", "settle_license"]


def check_start_file(option: str, path: str, model: torch.nn.Module) -> None:
    """Reads a file of weights once, before timm's script does.

    Args:
        option: '--initial-checkpoint', '--resume' or '--checkpoint', whose weights timm loads as they are, or
            '--pretrained-path', whose names are converted and whose head may be another.
        path: Its value.
        model: That takes them; may be without memory.

    Raises:
        ValueError: The file is missing or damaged, or its weights are not those of the model.
    """
    if path.lower().endswith((".npz", ".npy")):  # of other architectures, which read them themselves
        return
    content = load_checkpoint(path)
    resumed = option == "--resume" and isinstance(content.get("state_dict"), dict)
    weights = clean_state_dict(content["state_dict"] if resumed else weights_in(content))
    if option == "--pretrained-path":
        if isinstance(model, ConvNeXtV2):
            try:
                filter_weights(weights, model)
            except ValueError as e:
                raise ValueError(f"{option} {path}: {e}") from e
        return
    remedy = {
        "--resume": "Give a checkpoint of this run, such as last.pth.tar; weights to start from are --pretrained "
        f"--pretrained-path {path}.",
        "--initial-checkpoint": f"--pretrained --pretrained-path {path} also takes an encoder without classifier, a "
        "classifier of other classes, and the names of transformers, MMPretrain and the official code.",
    }.get(option, "Give a checkpoint of this model, or its exported folder as --model local-dir:FOLDER.")
    what = f"{option} {path} is loaded as it is, and is not of this model (its first names: {sorted(weights)[:3]})"
    check_weights(weights, model.state_dict(), what, remedy=remedy)


def settle_license(args: argparse.Namespace, model: torch.nn.Module, folder: Path) -> None:
    """Refuses a licence that is not known or contradicts, before the run; keeps it where its source may be gone later.

    Args:
        args: Options of train.py.
        model: Made from them.
        folder: The run's.
    """
    if not isinstance(model, ConvNeXtV2):  # which cannot be exported
        return
    origin = origin_of_run(vars(args), args.model, model.pretrained_cfg, folder)
    license = resolve_license(args.license, origin.license, origin.unstated)
    if args.resume or args.initial_checkpoint or args.pretrained_path:
        args.license = license


def choose_nodata(given: float | None, model: str) -> float | None:
    """The value of pixels without data: the one given, else that of the images the model was made of.

    Args:
        given: The option.
        model: Name for timm's factory; a folder or repository tells it.
    """
    if given is not None:
        return given
    value = nodata_of(_config_of(model) or {})
    if value is not None:
        say(f"--nodata={value:g}, as of the images that {model} was trained on; --nodata=nan: none.")
    return value


def _config_of(name: str) -> dict[str, Any] | None:
    """The `config.json` that belongs to a model of timm's factory; None where it has none.

    Args:
        name: `local-dir:FOLDER`, `hf-hub:USER/NAME`, or another name, which has none.
    """
    source, place = parse_model_name(name)
    if source == "local-dir":
        return config_beside({"file": place})
    return config_beside({"hf_hub_id": place}) if source == "hf-hub" else None
