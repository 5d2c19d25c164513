"""What training or evaluation starts from: a file of weights, its licence, what its folder says of the images."""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict

from ..checkpoint.files import model_pixels, weights_in
from ..checkpoint.finetuned import origin_of_run
from ..checkpoint.provenance import resolve_license
from ..console import say
from ..data import Pixels
from ..files import CheckpointError, load_checkpoint
from ..models import ConvNeXtV2
from ..models.weights import check_weights
from ..registry import filter_weights

TORN = ("tmp.pth.tar", "recovery_tmp.pth.tar")  # timm's names of a file that is being written


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; of links to one file, `last.pth.tar` comes first."""
    found = [path for path in folder.glob("*.pth.tar") if path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, not path.name.startswith("last"), path.name))


def _whole(folder: Path) -> Iterator[tuple[Path, int]]:
    """Each checkpoint that can be read and resumed from, with the number of epochs that are done in it."""
    for path in _newest_first(folder):
        try:
            content = load_checkpoint(path)
        except (CheckpointError, OSError):
            continue
        epoch = content.get("epoch")
        if isinstance(epoch, int) and "state_dict" in content and "optimizer" in content:
            yield path, epoch if path.name.startswith("recovery") else epoch + 1


def newest_whole(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be resumed from, and the number of epochs that are done in it."""
    return next(_whole(folder), None)


def check_resume(path: Path) -> None:
    """Reads the checkpoint that is to be resumed from.

    Raises:
        ValueError: It is missing, damaged or no checkpoint of train.py; names the newest one beside it that is whole.
    """
    try:
        content = load_checkpoint(path)
        if "epoch" in content and "state_dict" in content:
            return
        reason = (
            f"--resume '{path}' is not a checkpoint of train.py: it has no epoch or no weights ('state_dict'). Weights "
            f"to start from are --pretrained --pretrained-path {path}."
        )
    except (CheckpointError, OSError) as e:
        reason = f"--resume: {e}" if path.exists() else f"--resume '{path}' does not exist."
    found = newest_whole(path.parent)
    raise ValueError(f"{reason} {f'Whole beside it: {found[0]}.' if found else 'No checkpoint beside it is whole.'}")


def tell(folder: Path, epochs: int, experiment: str) -> str:
    """What is whole in the folder of a run that failed, and how to resume it; removes what is torn.

    Args:
        folder: The run's.
        epochs: As many as the run was to have.
        experiment: Its name.
    """
    found, lines = newest_whole(folder), []
    for path in (folder / name for name in TORN):
        if path.is_file() and (found is None or path != found[0]):
            size = path.stat().st_size
            path.unlink()
            lines.append(f"{path.name} ({size / 2**20:.1f} MiB), which was being written, is removed.")
    if folder.is_dir() and found and shutil.disk_usage(folder).free < found[0].stat().st_size:
        lines.append(f"The disk of {folder} has no space for another checkpoint.")
    if found is None:
        lines.insert(0, f"No whole checkpoint is in {folder}: the run starts anew with the same command.")
    else:
        path, done = found
        lines.insert(0, f"The last whole checkpoint is {path} (after epoch {done} of {epochs}).")
        lines.append(f"The same command with --experiment {experiment} --resume {path} resumes it.")
    return " ".join(lines)


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
