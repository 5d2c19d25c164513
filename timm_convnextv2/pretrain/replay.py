"""An update whose loss was not finite: what is kept of it, and its forward once more, to find where that began."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import load_checkpoint
from ..data import sample_seed
from ..models import FCMAE
from .batches import Batches
from .trainer import removed_channels

KEYS = {"epoch", "update", "number", "loss", "settings", "images", "world_size", "checkpoint"}


def write_record(
    folder: Path,
    *,
    epoch: int,
    update: int,
    number: int,
    loss: float,
    settings: dict[str, Any],
    images: list[list[tuple[int, str]] | None],
    model: FCMAE | None,
) -> Path:
    """Writes `bad-step-EPOCH-UPDATE.json`, and the weights beside it as `.pt`.

    Args:
        folder: Of the run.
        epoch: From 0.
        update: Within the epoch, from 0.
        number: Updates of the run before it.
        loss: Its value.
        settings: Of the run; its seed decides on crops, masks and drop path.
        images: For each process the indices and names of its images, in order; None for a stream.
        model: With the weights that the update began with; None writes none.

    Returns:
        The path of the JSON file.
    """
    path = folder / f"bad-step-{epoch + 1}-{update + 1}.json"
    record = {
        "epoch": epoch,
        "update": update,
        "number": number,
        "loss": str(loss),
        "checkpoint": "last.pth.tar",
        "weights": None if model is None else path.with_suffix(".pt").name,
        "masks_seed": settings["seed"],
        "rng_seeds": [sample_seed(settings["seed"], number, rank) for rank in range(len(images))],
        "world_size": len(images),
        "images": images,
        "settings": settings,
    }
    if model is not None:
        _replace(path.with_suffix(".pt"), lambda part: torch.save(model.state_dict(), part))
    _replace(path, lambda part: part.write_text(json.dumps(record, indent=1)))
    return path


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        ValueError: The file cannot be read, or is another.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--replay {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not record.keys() >= KEYS or not isinstance(record["settings"], dict):
        raise ValueError(f"--replay {path}: expected the bad-step-EPOCH-UPDATE.json that a run wrote into its folder.")
    if record["world_size"] > 1 and None in record["images"]:
        raise ValueError(f"--replay {path}: a stream that several processes shared cannot be read again by one.")
    return record


def load_weights(record: dict[str, Any], path: Path, model: FCMAE) -> str:
    """Loads the weights of the update, or of the last checkpoint; returns which ones these are."""
    own = path.with_suffix(".pt")
    if record.get("weights") and own.is_file():
        model.load_state_dict(torch.load(own, map_location="cpu", weights_only=True))
        return f"{own.name}, those of that update"
    checkpoint = load_checkpoint(path.parent / record["checkpoint"])
    model.load_state_dict(checkpoint["state_dict"])
    done, name = checkpoint["progress"], record["checkpoint"]
    where = f"{name}, saved after update {done['update']} of epoch {done['epoch'] + 1}"
    if (done["epoch"], done["update"]) == (record["epoch"], record["update"]):
        return f"{where}: those of that update"
    return f"{where}: not those of that update, so that the forward may differ"


class Finding(NamedTuple):
    """What the forward of a batch gave.

    Attributes:
        rank: Process that had the batch.
        step: Batch of the update, from 0.
        loss: Its value.
        cause: The first thing that is not finite; '' where all is finite.
    """

    rank: int
    step: int
    loss: float
    cause: str


def replay(
    record: dict[str, Any], model: FCMAE, open_batches: Callable[[int], Batches], device: torch.device
) -> Iterator[Finding]:
    """Repeats the forward of an update, for all processes in turn, without compilation.

    Modules are watched through hooks, so that they run in plain operations: values differ from fused ones by rounding.

    Args:
        record: See `read_record`.
        model: With the weights.
        open_batches: The data of a process of the run.
        device: Where the forward runs.

    Yields:
        A finding a batch.
    """
    settings, steps = record["settings"], record["settings"]["grad_accum_steps"]
    amp = getattr(torch, settings["amp_dtype"]) if settings["amp"] else None
    model.to(device).train()
    for rank in range(record["world_size"]):
        batches = open_batches(rank)
        torch.manual_seed(sample_seed(settings["seed"], record["number"], rank))
        names = [name for _, name in record["images"][rank] or []]
        taken = islice(batches.iterate(record["epoch"], record["update"] * steps), steps)
        for step, (images, masks, _) in enumerate(taken):
            removed = removed_channels(
                settings.get("channel_dropout", 0.0), model.in_chans, settings["seed"], record["number"], step, steps,
                len(images), rank, record["world_size"],
            )  # fmt: skip
            channels = None if removed is None else removed.to(device)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss, cause = _forward(model, images.to(device), masks, channels)
            bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
            if bad:
                known = [names[step * len(images) + i] for i in bad] if names else [f"number {i + 1}" for i in bad]
                cause = f"images of the batch have pixels that are not finite: {', '.join(known)}"
            yield Finding(rank, step, loss, cause)


def _forward(
    model: FCMAE, images: torch.Tensor, masks: torch.Tensor, channels: torch.Tensor | None = None
) -> tuple[float, str]:
    """The loss, and what was first not finite on the way to it."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return float("nan"), f"the parameter {name} is not finite, so that an earlier update did the damage"
    found: list[str] = []

    def watch(name: str) -> Callable:
        def look(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                tensors = [x.detach() for x in inputs if isinstance(x, torch.Tensor)]
                largest = max((float(x.abs().max()) for x in tensors), default=0)
                dtype = str(output.dtype).removeprefix("torch.")
                found.append(
                    f"the output of {name} ({type(module).__name__}, {dtype}) is not finite; the largest value that "
                    f"went in is {largest:.3g}"
                )

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        layout = model.visible(images, masks)
        loss = float(model(images, layout, return_pred=False, channels=channels).loss.detach())
    if not found and not torch.isfinite(torch.tensor(loss)):
        found.append("the loss itself is not finite, or what the prediction layer gave it")
    return loss, found[0] if found else ""
