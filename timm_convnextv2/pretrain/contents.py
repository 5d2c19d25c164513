"""What a checkpoint of a run must hold to be resumed from; checked where it is read, and against what it is to fill."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, load_checkpoint
from ..models.weights import check_weights, first_not_finite

__all__ = ["check_fits", "load_run_checkpoint"]

_PROGRESS: dict[str, type | tuple[type, ...]] = dict(
    epoch=int, update=int, loss_sum=(int, float), bad_images=dict, world_size=int, num_images=int
)
# What version 0.1 did not save.
_NEWER: dict[str, type | tuple[type, ...]] = dict(bad_steps=int, skipped=int, stream_workers=(int, type(None)))
# Optimizers that keep the same for every parameter; those that factor do not.
_UNIFORM = ("adam", "adamw", "lamb", "lion", "momentum", "nadam", "nadamw", "sgd")
# What optimizers keep in the shape of the parameter, or as one number for it.
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def load_run_checkpoint(path: str | PathLike) -> dict[str, Any]:
    """Reads a checkpoint that a run of pretraining saved.

    Raises:
        CheckpointError: See `load_checkpoint`; or a part is missing, of another type, or a weight is not finite.
    """
    content = load_checkpoint(path)
    if not isinstance(content.get("args"), dict) or not isinstance(content.get("progress"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this script: it has no training state to resume.")
    wrong = _wrong_progress(content["progress"]) or _wrong_optimizer(
        content.get("optimizer"), uniform=content["args"].get("opt") in _UNIFORM
    )
    for name in ("state_dict", "state_dict_ema"):
        if name == "state_dict" or name in content:
            wrong = wrong or _wrong_weights(name, content.get(name))
    if wrong:
        raise CheckpointError(f"Checkpoint '{path}' cannot be resumed from: {wrong}.")
    return content


def check_fits(
    content: dict[str, Any],
    own: dict[str, Any],
    shapes: Sequence[torch.Size],
    updates_per_epoch: int,
    path: str | PathLike,
) -> None:
    """A checkpoint fits the trainer that is to take it.

    Args:
        content: From `load_run_checkpoint`.
        own: `Trainer.state_dict()` of that trainer.
        shapes: Of the parameters in the order of its optimizer.
        updates_per_epoch: Of the run.
        path: Of the checkpoint, for the message.

    Raises:
        CheckpointError: A weight or a part of the optimizer's state is missing, or of another shape or type.
    """
    wrong = ""
    for name in ("state_dict", "state_dict_ema"):
        if name in own:
            check = {k: v.shape if v.dtype == own[name].get(k, v).dtype else v.dtype for k, v in content[name].items()}
            try:
                check_weights(check, own[name], f"Checkpoint '{path}' does not fit this model in '{name}'")
            except ValueError as e:
                raise CheckpointError(str(e)) from e
    for name in own.keys() - {"state_dict", "state_dict_ema", "optimizer"}:  # the scaler
        if name in content and not _same_kind(content[name], own[name]):
            wrong = f"'{name}' is {content[name]!r}, expected something like {own[name]!r}"
    there, here = content["optimizer"], own["optimizer"]
    if [g["params"] for g in there["param_groups"]] != [g["params"] for g in here["param_groups"]]:
        wrong = "the groups of its optimizer are of other parameters"
    wrong = wrong or _wrong_shapes(there["state"], shapes)
    update = content["progress"]["update"]
    if update >= updates_per_epoch:
        wrong = wrong or f"it was saved after update {update} of an epoch, which has {updates_per_epoch}"
    if wrong:
        raise CheckpointError(f"Checkpoint '{path}' cannot be resumed from: {wrong}.")


def _wrong_progress(progress: dict[str, Any]) -> str:
    newer = {name: kind for name, kind in _NEWER.items() if name in progress}
    for name, kind in (_PROGRESS | newer).items():
        value = progress.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"'progress' has {name} = {value!r}, expected {_word(kind)}"
        if isinstance(value, int | float) and not (math.isfinite(value) and (value >= 0 or name == "loss_sum")):
            return f"'progress' has {name} = {value!r}, expected a number from 0"
    extra = progress.keys() - _PROGRESS.keys() - _NEWER.keys()
    if extra:
        return f"'progress' has the unknown {', '.join(sorted(map(str, extra)))}"
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in progress["bad_images"].items()):
        return "'progress' has bad_images that are not reasons by name"
    return ""


def _word(kind: type | tuple[type, ...]) -> str:
    return {int: "a whole number", dict: "a table"}.get(kind, "a number")  # type: ignore[call-overload]


def _plain(value: object) -> bool:
    """A tensor with its numbers in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _wrong_weights(name: str, weights: object) -> str:
    if not isinstance(weights, Mapping):
        return (
            f"'{name}' is {'missing' if weights is None else f'a {type(weights).__name__}'}, expected weights by name"
        )
    for key, value in weights.items():
        if not isinstance(key, str) or not _plain(value):
            return f"'{name}' has {key!r}, a {type(value).__name__}; a tensor by its name was expected"
    bad = first_not_finite(weights)
    return f"'{bad}' in '{name}' has values that are not finite" if bad else ""


def _wrong_optimizer(state: object, uniform: bool) -> str:
    """`uniform`: it keeps the same for every parameter."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict) or not isinstance(groups, list):
        return "'optimizer' is not the state of an optimizer"
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return "the groups of 'optimizer' are not those of an optimizer"
    kinds: dict[str, Any] = {}
    for number, entries in state["state"].items():
        if type(number) is not int or not isinstance(entries, dict):
            return f"the state of 'optimizer' for parameter {number!r} is not that of an optimizer"
        found = {key: _kind(value) for key, value in entries.items()}
        kinds = {**found, **kinds}
        if any(kind != kinds[key] for key, kind in found.items()) or uniform and found.keys() != kinds.keys():
            return f"the state of 'optimizer' for parameter {number} differs in kind from that of the others"
    return ""


def _kind(value: object) -> object:
    """What values of one name have in common over all parameters."""
    return (value.dtype, value.ndim == 0) if isinstance(value, Tensor) and _plain(value) else type(value)


def _wrong_shapes(state: dict[int, dict[str, Any]], shapes: Sequence[torch.Size]) -> str:
    if state and state.keys() != set(range(len(shapes))):
        return f"its optimizer knows {len(state)} parameters, the model has {len(shapes)}"
    for number, entries in state.items():
        for key in _SHAPED:
            value = entries.get(key)
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[number]:
                return (
                    f"{key} of parameter {number} is {list(value.shape)} in its optimizer, and {list(shapes[number])} "
                    "in the model"
                )
    return ""


def _same_kind(there: object, here: object) -> bool:
    """Nested tables have the same keys and numbers where the other has numbers."""
    if isinstance(here, dict):
        return (
            isinstance(there, dict)
            and there.keys() == here.keys()
            and all(_same_kind(there[key], value) for key, value in here.items())
        )
    number = isinstance(here, int | float)
    return isinstance(there, int | float) and not isinstance(there, bool) if number else type(there) is type(here)
