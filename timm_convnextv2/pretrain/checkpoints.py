"""`RunFolder`: the folder of a run, who may have it, and what is written there."""

import contextlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..checkpoint import CheckpointError, load_checkpoint
from ..files import WriteError, remove_leftovers, save_torch, whole_file
from ..models.weights import check_weights, first_not_finite
from ..runs import summary
from ..runs.folder import head_comment
from ..runs.lock import LOCK, Lock, LockLostError, refuse_locked
from .trainer import Trainer

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


# A checkpoint fits only a model, and its optimizer state only an optimizer, that agree in these.
# `pretrained` decides on the licence.
ARCHITECTURE = ("model", "pretrained", "in_chans", "patch_size", "decoder_depth", "decoder_dim", "model_kwargs", "opt")


ARCHITECTURE += ("weights",)


# A run on a stream that stopped in the middle of an epoch resumes only with the same of these; others need the same
# images per update, whoever takes them.
STREAM_ORDER = ("batch_size", "grad_accum_steps")


# What a run writes into its folder: --overwrite removes these, and nothing else.
WRITTEN = ("args.yaml", "summary.csv", "loss.png", "*.pth.tar", "encoder", "reconstructions")


WRITTEN += ("report.html", "collapse.csv", "probe.json", "neighbours", "encoder-best")


WRITTEN += ("events.out.tfevents.*", "wandb", "bad-step-*")


# What version 0.1 left of files that it was writing when it was killed.
LEFT_BY_0_1 = ("*.pth.part", "*.png.part", "reconstructions/*.png.part", ".encoder.[0-9]*.tmp")


class NotSavedError(Exception):
    """A run cannot save its state any more: says why, what is the last whole checkpoint, and what to do."""


@dataclass
class Progress:
    """How far a run is; saved in its checkpoints.

    Attributes:
        epoch: Epochs that are complete.
        update: Updates of the next one that are made.
        loss_sum: Sum of their losses.
        bad_images: Reason by name of the images that could not be decoded so far.
        world_size: Processes of the run.
        num_images: Images of the data set.
        bad_steps: Updates of the run that were skipped, their loss not being finite.
        skipped: Those of the epoch that is not complete.
        stream_workers: Data processes that share a stream, per process; None where there is no stream.
    """

    epoch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    bad_images: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    num_images: int = 0
    bad_steps: int = 0
    skipped: int = 0
    stream_workers: int | None = None


class RunFolder:
    """The folder of a run. Opening it writes nothing; `claim` does.

    Args:
        output: Folder of all runs.
        experiment: Name of this one below it.
        resume: 'auto' for the run's last checkpoint if there is one, the path of a checkpoint, or ''.
        overwrite: Whether what an earlier run wrote there may be removed.
        sources: Folders that the run reads: its images, the model that it starts from.

    Attributes:
        path: The folder.
        checkpoint: The checkpoint to resume from, None for a new run.
        resumed_from: Its path.
        notes: What the user must know of it, such as a last checkpoint that is damaged.

    Raises:
        ValueError: The folder holds something else, lies outside `output`, is in use by another run, or the checkpoint
            cannot be read; or it is to be overwritten and is not of a run, or has to do with `sources`.
    """

    def __init__(
        self, output: str, experiment: str, resume: str = "", overwrite: bool = False, sources: Sequence[str] = ()
    ) -> None:
        self.path = Path(output) / experiment
        if Path(output).resolve() not in self.path.resolve().parents:
            raise ValueError(f"--experiment {experiment} is not a folder below --output {output}.")
        refuse_locked(self.path)
        self.checkpoint: dict[str, Any] | None = None
        self.notes: list[str] = []
        self._lock: Lock | None = None
        self._before = _stamp(self.path / "last.pth.tar")
        self._saved = ""  # the last checkpoint that this process knows to be whole
        self.resumed_from = self.path / "last.pth.tar" if resume == "auto" else Path(resume)
        if resume and (resume != "auto" or self.resumed_from.exists()):
            self._load(fall_back=resume == "auto")
        here = resume == "auto" or bool(resume) and self.resumed_from.resolve().parent == self.path.resolve()
        # where this run resumes, what is there is part of it
        self._empties = overwrite and not (self.checkpoint is not None and here)
        if self._used() and not self._empties and not here:
            raise ValueError(
                f"The output folder {self.path} is not empty. Resume that run: --resume auto. Start again and delete "
                "what it wrote: --overwrite. Or choose another --experiment or --output."
            )

        if self._empties and self._used():
            self._check_overwrite(sources)

    def _used(self) -> bool:
        """Whether something is there, beside the lock of a run that was killed before it wrote anything."""
        return self.path.is_dir() and any(not p.name.startswith(LOCK) for p in self.path.iterdir())

    def _load(self, fall_back: bool) -> None:
        """Reads the checkpoint to resume from; where it is damaged, another one or their names."""
        path = self.resumed_from
        try:
            self.checkpoint = load_run_checkpoint(path)
        except CheckpointError as e:
            whole = _whole_beside(path)
            if not fall_back:
                names = ", ".join(other.name for other, _ in whole)
                raise CheckpointError(f"{e} Whole checkpoints beside it: {names}." if names else str(e)) from e
            self.resumed_from, self.checkpoint = next(whole, (path, None))
            if self.checkpoint is None:
                raise CheckpointError(
                    f"{e} No other checkpoint beside it is whole. Start again and delete what the run wrote: "
                    "--overwrite. Or choose another --experiment."
                ) from e
            self.notes.append(f"{e} The newest whole checkpoint beside it is resumed from: {self.resumed_from.name}.")
        self._saved = f"{self.resumed_from} ({_where(self.checkpoint['progress'])})"

    def _check_overwrite(self, sources: Sequence[str]) -> None:
        """Refuses to remove anything from a folder that no run made, or that is where the run reads from."""
        if not (self.path / "args.yaml").is_file():
            raise ValueError(
                f"--overwrite: {self.path} is not the folder of a run (it has no args.yaml), so nothing in it is "
                "removed. Choose another --experiment or --output."
            )
        here = self.path.resolve()
        for source in map(Path, sources):
            there = source.resolve()
            if here == there or here in there.parents or there in here.parents:
                raise ValueError(
                    f"--overwrite: {self.path} has to do with {source}, which this run reads, so nothing in it is "
                    "removed. Choose another --experiment or --output."
                )

    def _remove_run(self) -> None:
        """Removes what an earlier run wrote; other files stay."""
        for pattern in WRITTEN:
            for path in self.path.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    @property
    def summary(self) -> Path:
        """A row an epoch."""
        return self.path / "summary.csv"

    @property
    def encoder(self) -> Path:
        """The exported encoder."""
        return self.path / "encoder"

    @property
    def best(self) -> Path:
        """The encoder that `--keep-best` keeps."""
        return self.path / "encoder-best"

    def progress(self, settings: dict[str, Any], world_size: int, num_images: int) -> Progress:
        """Where the run begins: at zero, or where the checkpoint was saved.

        Args:
            settings: Of the run that begins.
            world_size: Its processes.
            num_images: Its images.

        Raises:
            ValueError: The checkpoint is of another model, or from the middle of an epoch of other data.
        """
        now = Progress(world_size=world_size, num_images=num_images)
        if self.checkpoint is None:
            return now
        before, then = self.checkpoint["args"], self.checkpoint["progress"]
        self._compare(before, then, settings, asdict(now))
        return Progress(**{**then, "world_size": world_size, "num_images": num_images})

    def _compare(self, before: dict, then: dict, settings: dict, now: dict) -> None:
        """Refuses a checkpoint of another model, and one from the middle of an epoch of other data."""
        path = self.resumed_from
        before = {"holdout": 0.0, **before}
        differs = _differences(before, settings, (*ARCHITECTURE, "holdout"))
        if settings["holdout"]:  # else images that were trained on would be held out
            differs += _differences(before, settings, ("seed",)) + _differences(then, now, ("num_images",))
        if differs:
            raise ValueError(
                f"Cannot resume from {path}, which differs in {'; '.join(differs)}. Repeat the settings of that run "
                "(its args.yaml), or start a new --experiment."
            )
        if settings["model_ema"] and "state_dict_ema" not in (self.checkpoint or {}):
            raise ValueError(f"Cannot resume from {path} with --model-ema: that run kept no moving average.")
        differs = _differences(before, settings, ("seed", "source_weights"))
        differs += _differences(then, now, ("num_images",))
        if then.get("stream_workers") is not None:
            differs += _differences(before, settings, STREAM_ORDER) + _differences(then, now, ("world_size",))
        there, here = _images_per_update(before, then), _images_per_update(settings, now)
        if there != here:
            differs.append(f"images per update: {there} there, {here} here")
        if differs and then["update"]:
            raise ValueError(
                f"Cannot resume from {path}: it was saved in the middle of an epoch, and the order of the images "
                f"differs in {'; '.join(differs)}. Resume with the same, or from a milestone checkpoint."
            )

    def restore(self, trainer: Trainer, progress: Progress, updates_per_epoch: int) -> None:
        """Gives the checkpoint's state to the trainer, and frees its memory.

        Raises:
            CheckpointError: (a ValueError) It does not fit.
        """
        if self.checkpoint is None:
            return
        shapes = [p.shape for group in trainer.optimizer.param_groups for p in group["params"]]
        check_fits(self.checkpoint, trainer.state_dict(), shapes, updates_per_epoch, self.resumed_from)
        trainer.load_state_dict(self.checkpoint, progress.loss_sum, progress.skipped)
        self.checkpoint = None

    def claim(self, settings: dict[str, Any], versions: str, epoch: int, command: str = "") -> None:
        """Makes the folder, locks it, removes what a killed process left, and writes args.yaml.

        Args:
            settings: Of the run.
            versions: Of the packages.
            epoch: Epochs that are complete; the summary forgets what came after.
            command: That started the run, for the head of args.yaml.

        Raises:
            ValueError: The folder cannot be written, or another run has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
            self._check_unchanged()
            if self._empties:
                self._remove_run()
            self._remove_leftovers()
            with whole_file(self.path / "args.yaml") as part:
                part.write_text(head_comment(versions, command) + yaml.safe_dump(settings, sort_keys=False))
            self._note_damaged(summary.trim(self.summary, epoch))
        except BaseException as e:
            self.release()
            if not isinstance(e, OSError):
                raise
            raise ValueError(
                f"The output folder {self.path} cannot be written ({e}). Choose another with --output."
            ) from e

    def _check_unchanged(self) -> None:
        """Refuses where another run saved a checkpoint between the look into the folder and the lock."""
        last = self.path / "last.pth.tar"
        if self._before != _stamp(last):
            raise ValueError(f"Another run has written {last} since this one began. Start again to see it.")

    def _remove_leftovers(self) -> None:
        """Removes files that a process was writing when it was killed: they can be as large as the checkpoints."""
        remove_leftovers(self.path, (*WRITTEN, LOCK), alone=True)
        remove_leftovers(self.path / "reconstructions", ("*.png",), alone=True)
        for pattern in LEFT_BY_0_1:
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _note_damaged(self, lines: list[str]) -> None:
        self.notes += [f"{self.summary}: a line that was damaged is left out: {line!r}" for line in lines]

    def release(self) -> None:
        """Lets other runs have the folder."""
        if self._lock is not None:
            self._lock.release()

    def add_row(self, epoch: int, metrics: dict[str, float], measured: dict[str, float | str], lr: float) -> None:
        """Adds an epoch to summary.csv: columns `train_*`, then `eval_*` of what was measured.

        Args:
            epoch: From 0.
            metrics: Of training.
            measured: Of the measures; a new name is a new column.
            lr: Learning rate of the last update.

        Raises:
            OSError: It cannot be written; what was there stays.
        """
        self._note_damaged(summary.add_row(self.summary, epoch, metrics, measured, lr))

    def save(self, state: dict[str, Any], settings: dict[str, Any], progress: Progress, milestone: bool) -> None:
        """Writes the checkpoint in timm's format, each file whole or not at all.

        Args:
            state: Of the trainer.
            settings: Of the run.
            progress: Where it is.
            milestone: Also under a name that stays.

        Raises:
            NotSavedError: The disk is full, read-only or gone, or another run has taken the folder over. What was
                there stays.
        """
        content = {
            "epoch": progress.epoch - 1,  # timm: the last one completed
            "arch": settings["model"],
            "version": 2,
            "args": settings,
            "progress": asdict(progress),
            **state,
        }
        # 'last' is last: the rest of it is there, and what it replaces goes when the milestone is safe
        for name in [f"milestone-{progress.epoch}"] * milestone + ["last"]:
            path = self.path / f"{name}.pth.tar"
            try:
                if self._lock is not None:
                    self._lock.check()
                save_torch(content, path)
            except WriteError as e:
                raise NotSavedError(f"{e} {self.last_whole} Make room there, or give the run another disk.") from e
            except LockLostError as e:
                raise NotSavedError(f"{e} {self.last_whole} Let one of the two runs end.") from e
            self._saved = f"{path} ({_where(content['progress'])})"

    def check_finite(self, state: dict[str, Any]) -> None:
        """Raises `NotSavedError` where a weight is not finite: a checkpoint of it would be of no use."""
        for name in ("state_dict", "state_dict_ema"):
            bad = first_not_finite(state.get(name, {}))
            if bad:
                raise NotSavedError(
                    f"The weight '{bad}' is not finite, so that nothing of it was saved. {self.last_whole} Lower the "
                    "learning rate or clip the gradient."
                )

    @property
    def last_whole(self) -> str:
        """The last checkpoint that is whole, in words."""
        return f"The last whole checkpoint is {self._saved}." if self._saved else "No checkpoint was saved before."


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Tells apart what has been a file's content."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _whole_beside(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The other checkpoints of a run that are whole, with their content, the newest first."""
    found = {other: re.fullmatch(r"milestone-(\d+)\.pth\.tar", other.name) for other in path.parent.glob("*.pth.tar")}
    ages = {other: int(match[1]) for other, match in found.items() if match}
    ages[path.with_name("last.pth.tar")] = max(ages.values(), default=0) + 1
    for other in sorted(ages, key=lambda other: ages[other], reverse=True):
        if other.name != path.name:
            with contextlib.suppress(CheckpointError):
                yield other, load_run_checkpoint(other)


def _where(progress: dict[str, Any]) -> str:
    """How far a checkpoint is."""
    inside = f", and update {progress['update']} of the next" if progress["update"] else ""
    return f"after epoch {progress['epoch']}{inside}"


def _images_per_update(settings: dict[str, Any], progress: dict[str, Any]) -> int:
    return settings["batch_size"] * settings["grad_accum_steps"] * progress["world_size"]


def _differences(old: dict, new: dict, names: tuple[str, ...]) -> list[str]:
    return [f"{name}: {old.get(name)!r} there, {new[name]!r} here" for name in names if old.get(name) != new[name]]
