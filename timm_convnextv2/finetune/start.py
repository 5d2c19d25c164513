"""What training or evaluation starts from: a file of weights, its licence, what its folder says of the images."""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict

from ..checkpoint import load_checkpoint
from ..checkpoint.files import weights_in
from ..checkpoint.finetuned import origin_of_run
from ..checkpoint.loading import model_pixels
from ..command import say
from ..data import Pixels
from ..models import ConvNeXtV2
from ..models.registry import filter_weights
from ..models.weights import check_weights
from ..provenance import resolve_license

__all__ = ["check_start_file", "choose_pixels", "settle_license"]


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


def choose_pixels(nodata: float | None, model: str, in_chans: int, record: dict[str, Any] | None = None) -> Pixels:
    """How stored values become pixels: as for the images that the model was trained on, with the value given.

    Args:
        nodata: Value of pixels without data, `--nodata`; None for the model's.
        model: Name for timm's factory; a folder or repository has a record.
        in_chans: Channels of the images.
        record: In the place of the model's.

    Raises:
        ValueError: The record is of another number of channels.
    """
    inherited = Pixels.from_record(record) if record else model_pixels(model, in_chans)
    pixels = inherited if nodata is None else inherited._replace(nodata=nodata)
    if not inherited.plain and not record:
        note = f"; --nodata={nodata:g} replaces that" if nodata is not None else "; --nodata=nan: none"
        note = "" if inherited.nodata is None else note
        say(f"Pixels as of the images that {model} was trained on: {inherited}{note}.")
    return pixels.check(in_chans)
