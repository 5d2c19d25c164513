"""Updates whose loss was not finite: their record, and their forward once more to find the first cause."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_checkpoint
from ..config import read_json
from ..files import save_torch, write_json
from ..models import FCMAE
from ..runs.checkpoints import LAST
from ..runs.errors import NotFiniteError
from ..runs.group import Processes
from ..seeds import sample_seed
from .batches import Batches
from .trainer import Place, removed_channels

KEYS = {"epoch", "update", "number", "loss", "settings", "images", "world_size", "checkpoint"}


def write_record(
    folder: Path, error: NotFiniteError, settings: dict[str, Any], place: tuple[int, int],
    images: list[list[tuple[int, str]] | None], model: FCMAE | None,
) -> Path:  # fmt: skip
    """Writes `bad-step-EPOCH-UPDATE.json`, and the weights before the update beside it as `.pt` if there is a `model`.

    `place` is the epoch and the update within it, from 0; `images` has for each process the indices and names of its
    images, in order, None for a stream. Crops, masks and drop path follow from the seed in `settings`.
    """
    epoch, update = place
    path, ranks = folder / f"bad-step-{epoch + 1}-{update + 1}.json", range(len(images))
    record = {
        "epoch": epoch, "update": update, "number": error.number, "loss": str(error.loss), "checkpoint": LAST,
        "weights": None if model is None else path.with_suffix(".pt").name, "masks_seed": settings["seed"],
        "rng_seeds": [sample_seed(settings["seed"], error.number, rank) for rank in ranks],
        "world_size": len(images), "images": images, "settings": settings,
    }  # fmt: skip
    if model is not None:
        save_torch(model.state_dict(), path.with_suffix(".pt"))
    write_json(path, record, indent=1)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Reads the JSON file of `write_record`."""
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--replay {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not record.keys() >= KEYS or not isinstance(record["settings"], dict):
        raise ValueError(f"--replay {path}: expected the bad-step-EPOCH-UPDATE.json that a run wrote into its folder.")
    if record["world_size"] > 1 and None in record["images"]:
        raise ValueError(f"--replay {path}: one process cannot repeat a stream that several processes shared.")
    return record


def load_weights(record: dict[str, Any], path: Path, model: FCMAE) -> str:
    """Loads the weights of the update, or of the last checkpoint; returns which ones, in words."""
    own = path.with_suffix(".pt")
    if record.get("weights") and own.is_file():
        model.load_state_dict(torch.load(own, map_location="cpu", weights_only=True))
        return f"{own.name}, those of that update"
    checkpoint = load_checkpoint(path.parent / record["checkpoint"])
    model.load_state_dict(checkpoint["state_dict"])
    done = checkpoint["progress"]
    same = (done["epoch"], done["update"]) == (record["epoch"], record["update"])
    which = "those of that update" if same else "not those of that update, so the forward may differ"
    return f"{record['checkpoint']}, saved after update {done['update']} of epoch {done['epoch'] + 1}: {which}"


def replay(
    record: dict[str, Any], model: FCMAE, open_batches: Callable[[int], Batches], device: torch.device
) -> Iterator[tuple[int, int, float, str]]:
    """Repeats the forward of an update for all processes in turn, without compilation. Yields process, batch, loss and
    cause, the first value that is not finite in words, '' if all are finite.

    Hooks on the modules rule out fused operations, so values differ from those of the run by rounding.
    `open_batches(rank)` opens the data of a process of the run.
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
            place, group = Place(settings["seed"], record["number"], step, steps), Processes(rank, record["world_size"])
            removed = removed_channels(settings["channel_dropout"], len(images), model.in_chans, place, group)
            channels = None if removed is None else removed.to(device)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss, cause = _forward(model, images.to(device), masks, channels)
            bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
            if bad:
                known = [names[step * len(images) + i] for i in bad] if names else [f"number {i + 1}" for i in bad]
                cause = f"images of the batch have pixels that are not finite: {', '.join(known)}"
            yield rank, step, loss, cause


def _forward(model: FCMAE, images: Tensor, masks: Tensor, channels: Tensor | None) -> tuple[float, str]:
    """The loss, and the first value on the way to it that is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return float("nan"), f"the parameter {name} is not finite, so an earlier update did the damage"
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        if found or not isinstance(output, Tensor) or torch.isfinite(output).all():
            return
        largest = max((float(x.detach().abs().max()) for x in inputs if isinstance(x, Tensor)), default=0)
        kind = f"{type(module).__name__}, {str(output.dtype).removeprefix('torch.')}"
        found.append(f"the output of {name} ({kind}) is not finite; the largest value of its input is {largest:.3g}")

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(partial(check, name)).remove)
        loss = float(model(images, model.visible(images, masks), return_pred=False, channels=channels).loss.detach())
    if not found and not torch.isfinite(torch.tensor(loss)):
        found.append("the loss itself is not finite, or the input of the prediction layer")
    return loss, found[0] if found else ""
