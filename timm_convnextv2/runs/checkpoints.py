"""`Checkpoint`: what a run saves, in the format of timm's train.py, and the checks before a run resumes from it."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError, load_checkpoint
from ..models.weights import check_weights, first_not_finite

LAST = "last.pth.tar"

# Optimizers that keep the same state for every parameter; those that factor do not.
_UNIFORM = ("adam", "adamw", "lamb", "lion", "momentum", "nadam", "nadamw", "sgd")

# State that optimizers keep in the shape of the parameter, or as one number per parameter.
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


@dataclass
class Progress:
    """How far a run is; its checkpoints hold it."""

    epoch: int = 0  # complete epochs
    update: int = 0  # updates made in the next one
    sums: dict[str, float] = field(default_factory=dict)  # sums of their losses by name
    bad_images: dict[str, str] = field(default_factory=dict)  # reasons by name of image, of the whole run
    world_size: int = 1
    num_images: int = 0  # of the data set
    bad_steps: int = 0  # updates of the run that were skipped because their loss was not finite
    skipped: int = 0  # those in the epoch that is not complete
    stream_workers: int | None = None  # data processes that share a stream, per process; None without a stream

    def __str__(self) -> str:
        inside = f", and update {self.update} of the next" if self.update else ""
        return f"after epoch {self.epoch}{inside}"


@dataclass(frozen=True)
class TrainerState:
    """The state of a trainer, under timm's names."""

    state_dict: dict[str, Tensor]
    optimizer: dict[str, Any]
    state_dict_ema: dict[str, Tensor] | None = None
    amp_scaler: dict[str, Any] | None = None

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights and their moving average, by the names of the fields."""
        average = {} if self.state_dict_ema is None else {"state_dict_ema": self.state_dict_ema}
        return {"state_dict": self.state_dict, **average}

    def not_finite(self) -> str | None:
        """Name of the first weight that is not finite; None if all are."""
        return next((name for w in self.weights().values() if (name := first_not_finite(w))), None)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run; `path` is the file that it was read from, for messages."""

    settings: dict[str, Any]
    progress: Progress
    state: TrainerState
    path: Path = Path()

    def content(self) -> dict[str, Any]:
        """The file's content, in timm's format."""
        return {
            "epoch": self.progress.epoch - 1,  # timm: the last complete one
            "arch": self.settings.get("model", ""),
            "version": 2,
            "args": self.settings,
            "progress": asdict(self.progress),
            **{name: value for name, value in vars(self.state).items() if value is not None},
        }

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint; a `CheckpointError` if a part is missing or of another type, or a weight not finite."""
        content = load_checkpoint(path)
        settings, progress = content.get("args"), content.get("progress")
        if not isinstance(settings, dict) or not isinstance(progress, dict):
            raise CheckpointError(f"{path} is not a checkpoint of a run: it has no training state to resume.")
        try:
            for name in ("batch_size", "grad_accum_steps"):
                if type(settings.get(name)) is not int:
                    raise ValueError(f"'args' has {name} {settings.get(name)!r}, expected a whole number")
            _check_progress(progress)
            _check_optimizer(content.get("optimizer"), uniform=settings.get("opt") in _UNIFORM)
            for name in ("state_dict", *(["state_dict_ema"] if "state_dict_ema" in content else [])):
                _check_weights(name, content.get(name))
        except ValueError as e:
            raise CheckpointError(f"Cannot resume from checkpoint '{path}': {e}.") from e
        state = TrainerState(**{f.name: content[f.name] for f in fields(TrainerState) if f.name in content})
        return cls(settings, Progress(**progress), state, path)

    def check_fits(self, own: TrainerState, shapes: Sequence[torch.Size], updates_per_epoch: int) -> None:
        """Raises a `CheckpointError` if a weight or a part of the optimizer's state does not fit a trainer.

        `own` is the trainer's state, `shapes` has the shapes of the parameters in the order of its optimizer.
        """
        there, progress = self.state.weights(), self.progress
        for name, here in own.weights().items():
            if name not in there:
                raise CheckpointError(f"Cannot resume from {self.path} with --model-ema: that run kept no average.")
            found = {k: v.shape if v.dtype == here.get(k, v).dtype else v.dtype for k, v in there[name].items()}
            try:
                check_weights(found, here, f"Checkpoint '{self.path}' does not fit this model in '{name}'")
            except ValueError as e:
                raise CheckpointError(str(e)) from e
        try:
            scaler = self.state.amp_scaler
            if own.amp_scaler is not None and scaler is not None and not _is_scaler(scaler, own.amp_scaler):
                raise ValueError(f"'amp_scaler' is {scaler!r}, expected a state like {own.amp_scaler!r}")
            groups = [[g["params"] for g in state["param_groups"]] for state in (self.state.optimizer, own.optimizer)]
            if groups[0] != groups[1]:
                raise ValueError("the optimizer's groups hold other parameters")
            _check_shapes(self.state.optimizer["state"], shapes)
            if progress.update >= updates_per_epoch:
                raise ValueError(f"it was saved after update {progress.update} of an epoch of {updates_per_epoch}")
        except ValueError as e:
            raise CheckpointError(f"Cannot resume from checkpoint '{self.path}': {e}.") from e


def whole_beside(path: Path) -> Iterator[Checkpoint]:
    """The other checkpoints in a run's folder that are whole, the newest first."""
    found = {other: re.fullmatch(r"milestone-(\d+)\.pth\.tar", other.name) for other in path.parent.glob("*.pth.tar")}
    ages = {other: int(match[1]) for other, match in found.items() if match}
    ages[path.with_name(LAST)] = max(ages.values(), default=0) + 1
    for other in sorted(ages, key=lambda other: ages[other], reverse=True):
        if other.name != path.name:
            with contextlib.suppress(CheckpointError):
                yield Checkpoint.read(other)


def _check_progress(progress: dict[str, Any]) -> None:
    known = {f.name for f in fields(Progress)}
    if other := known ^ progress.keys():
        raise ValueError(f"'progress' has the wrong names {', '.join(sorted(map(str, other)))}")
    for name, value in progress.items():
        if name in ("sums", "bad_images"):
            kind = str if name == "bad_images" else float
            fits = isinstance(value, dict) and all(
                isinstance(k, str) and isinstance(v, kind) and (isinstance(v, str) or math.isfinite(v))
                for k, v in value.items()
            )
            if not fits:
                raise ValueError(f"'progress' has {name} = {value!r}, expected a table of {kind.__name__} by name")
        elif not (name == "stream_workers" and value is None) and not (type(value) is int and value >= 0):
            raise ValueError(f"'progress' has {name} = {value!r}, expected a whole number from 0")


def _plain(value: object) -> bool:
    """Whether it is a tensor with its numbers in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_weights(name: str, weights: object) -> None:
    if not isinstance(weights, Mapping):
        found = "missing" if weights is None else type(weights).__name__
        raise ValueError(f"'{name}' is {found}, expected weights by name")
    for key, value in weights.items():
        if not isinstance(key, str) or not _plain(value):
            raise ValueError(f"'{name}' has {key!r}, a {type(value).__name__}; expected a tensor by its name")
    if bad := first_not_finite(weights):
        raise ValueError(f"'{bad}' in '{name}' has values that are not finite")


def _check_optimizer(state: object, uniform: bool) -> None:
    """`uniform`: it keeps the same state for every parameter."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict) or not isinstance(groups, list):
        raise ValueError("'optimizer' is not the state of an optimizer")
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise ValueError("the groups of 'optimizer' are not those of an optimizer")
    kinds: dict[str, Any] = {}
    for number, entries in state["state"].items():
        if type(number) is not int or not isinstance(entries, dict):
            raise ValueError(f"the state of 'optimizer' for parameter {number!r} is not that of an optimizer")
        found = {key: _kind(value) for key, value in entries.items()}
        kinds = {**found, **kinds}
        if any(kind != kinds[key] for key, kind in found.items()) or uniform and found.keys() != kinds.keys():
            raise ValueError(f"the state of 'optimizer' for parameter {number} differs in kind from that of the others")


def _kind(value: object) -> object:
    """A kind that the values of one name share over all parameters."""
    return (value.dtype, value.ndim == 0) if isinstance(value, Tensor) and _plain(value) else type(value)


def _check_shapes(state: dict[int, dict[str, Any]], shapes: Sequence[torch.Size]) -> None:
    if state and state.keys() != set(range(len(shapes))):
        raise ValueError(f"its optimizer has {len(state)} parameters, the model has {len(shapes)}")
    for number, entries in state.items():
        for key in _SHAPED:
            value = entries.get(key)
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[number]:
                found, wanted = list(value.shape), list(shapes[number])
                raise ValueError(f"{key} of parameter {number} is {found}, expected {wanted}")


def _is_scaler(there: Any, here: dict[str, Any]) -> bool:
    """Whether it is a table of numbers with the same names."""
    same = isinstance(there, dict) and there.keys() == here.keys()
    return same and all(type(value) in (int, float) for value in there.values())
