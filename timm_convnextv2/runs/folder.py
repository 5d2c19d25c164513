"""`RunFolder`: the folder of a run, which process may write there, and what is written."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ..config import parse_yaml
from ..files import CheckpointError, WriteError, remove_leftovers, save_torch, whole_file
from ..version import __version__
from . import summary
from .checkpoints import LAST, Checkpoint, Progress, TrainerState, whole_beside
from .errors import NotSavedError
from .lock import LOCK, Lock, LockLostError, refuse_locked
from .trainer import Trainer
from .world import World

VERSIONS = f"timm_convnextv2 {__version__}, timm {timm.__version__}, torch {torch.__version__}"

# What every run writes into its folder; --overwrite removes this and what the task adds, and nothing else.
WRITTEN = ("args.yaml", "summary.csv", "*.pth.tar", "report.html", "events.out.tfevents.*", "wandb")


# Settings that change no weight: a run may resume with others without a word.
FREE = set(
    "output experiment device workers pin_mem log_interval log_wandb wandb_project log_tensorboard torchcompile "
    "license checkpoint_interval recovery_interval checkpoint_minutes milestone_interval recon_interval show_bands "
    "probe_dir probe_interval keep_best index recipe eval_interval shown_images".split()
)


class RunFolder:
    """The folder of a run. Opening it writes nothing; `claim` does.

    A `ValueError` refuses a folder that holds something else, lies outside `output`, is in use by another run, or is
    to be overwritten but no run's or one of `sources`; and a checkpoint that cannot be read.

    Args:
        output: Folder of all runs.
        experiment: Name of this run below it.
        resume: 'auto' for the run's last checkpoint if there is one, the path of a checkpoint, or ''.
        overwrite: Remove what an earlier run wrote there.
        sources: Folders that the run reads: its images, the model that it starts from.
        writes: Files that the task writes, as patterns, in addition to `WRITTEN`.
        task: The task of the run; the folder of a run of another task is never overwritten or resumed.
    """

    def __init__(
        self, output: str | Path, experiment: str, resume: str = "", overwrite: bool = False,
        sources: Sequence[str | Path] = (), writes: Sequence[str] = (), task: str = "pretraining",
    ) -> None:  # fmt: skip
        self.path = Path(output) / experiment
        if Path(output).resolve() not in self.path.resolve().parents:
            raise ValueError(f"--experiment {experiment} is not a folder below --output {output}.")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The output folder '{self.path}' is a file. Choose another --experiment or --output.")
        refuse_locked(self.path)
        self.written = (*WRITTEN, *writes)
        self.checkpoint: Checkpoint | None = None  # to resume from; None for a new run, and after `restore`
        self.notes: list[str] = []  # warnings, such as a corrupt last checkpoint
        self._lock: Lock | None = None
        self._before = _stamp(self.path / LAST)
        self._saved = ""  # the last checkpoint that this process has seen or written whole
        source = self.path / LAST if resume == "auto" else Path(resume)
        if resume and (resume != "auto" or source.exists()):
            self._load(source, fall_back=resume == "auto")
        here = resume == "auto" or bool(resume) and source.resolve().parent == self.path.resolve()
        self.continues = here and self.checkpoint is not None  # that of this folder
        # a run that resumes here keeps its folder
        self._empties = overwrite and not self.continues
        # a run that was killed before it wrote anything leaves its lock
        used = self.path.is_dir() and any(not p.name.startswith(LOCK) for p in self.path.iterdir())
        other = self._other_task(task) if used else ""
        if other:
            raise ValueError(f"{self.path} holds a run of {other}, not of {task}. Choose another --experiment.")
        if used and self._empties:
            self._check_overwrite(sources)
        elif used and not here:
            raise ValueError(
                f"The output folder {self.path} is not empty. Resume that run: --resume auto. Start again and delete "
                "what it wrote: --overwrite. Or choose another --experiment or --output."
            )

    def _load(self, path: Path, fall_back: bool) -> None:
        """Reads the checkpoint to resume from; if it is corrupt, takes or names whole ones beside it."""
        try:
            self.checkpoint = Checkpoint.read(path)
        except CheckpointError as e:
            others = whole_beside(path)
            if not fall_back:
                names = ", ".join(other.path.name for other in others)
                raise CheckpointError(f"{e} Whole checkpoints beside it: {names}." if names else str(e)) from e
            self.checkpoint = next(others, None)
            if self.checkpoint is None:
                raise CheckpointError(
                    f"{e} No other checkpoint beside it is whole. Start again and delete what the run wrote: "
                    "--overwrite. Or choose another --experiment."
                ) from e
            self.notes.append(f"{e} Resuming from the newest whole checkpoint beside it: {self.checkpoint.path.name}.")
        self._saved = f"{self.checkpoint.path} ({self.checkpoint.progress})"

    def _other_task(self, task: str) -> str:
        """The task of the run in the folder, '' if it is `task` or unknown. Finetuning's args.yaml is timm's."""
        try:
            found = parse_yaml((self.path / "args.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        found = found if isinstance(found, dict) else {}
        there = str(found.get("task") or ("pretraining" if "mask_ratio" in found else "finetuning"))
        return "" if there == task else there

    def _check_overwrite(self, sources: Sequence[str | Path]) -> None:
        """Refuses to remove files from a folder that no run made, or that the run reads from."""
        nothing = "so nothing in it is removed. Choose another --experiment or --output."
        if not (self.path / "args.yaml").is_file():
            raise ValueError(f"--overwrite: {self.path} is not the folder of a run (it has no args.yaml), {nothing}")
        here = self.path.resolve()
        for source in sources:
            there = Path(source).resolve()
            if here == there or here in there.parents or there in here.parents:
                raise ValueError(f"--overwrite: {self.path} overlaps {source}, which this run reads, {nothing}")

    @property
    def summary(self) -> Path:
        """The table with one row per epoch."""
        return self.path / "summary.csv"

    def check_same(self, settings: dict[str, Any], names: Sequence[str]) -> None:
        """Refuses to resume if any of these settings differs."""
        differs = [] if self.checkpoint is None else differences(self.checkpoint.settings, settings, names)
        if differs:
            self.refuse(differs)

    def refuse(self, differs: Sequence[str]) -> None:
        """Raises the `ValueError` of a checkpoint whose settings differ."""
        assert self.checkpoint is not None
        raise ValueError(
            f"Cannot resume from {self.checkpoint.path}, which differs in {'; '.join(differs)}. Repeat the settings "
            "of that run (its args.yaml), or start a new --experiment."
        )

    def progress(self, world_size: int, num_images: int) -> Progress:
        """The progress that the run begins with: zero, or that of its checkpoint."""
        then = Progress() if self.checkpoint is None else self.checkpoint.progress
        return replace(then, world_size=world_size, num_images=num_images)

    def restore(self, trainer: Trainer, updates_per_epoch: int) -> None:
        """Loads the checkpoint's state into the trainer, or raises a `CheckpointError`; then frees its memory."""
        if self.checkpoint is None:
            return
        shapes = [p.shape for group in trainer.optimizer.param_groups for p in group["params"]]
        self.checkpoint.check_fits(trainer.state(), shapes, updates_per_epoch)
        trainer.load(self.checkpoint.state, self.checkpoint.progress.sums, self.checkpoint.progress.skipped)
        self.checkpoint = None

    def claim(
        self, settings: dict[str, Any] | None, epoch: int, command: str = "", warnings: Sequence[str] = ()
    ) -> None:
        """Makes and locks the folder, removes what a killed process left, and writes args.yaml if there are `settings`.

        Its head has the `command` and the `warnings` about the run, for the report.
        Rows of the summary after `epoch`, the complete epochs, are removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
            if self._before != _stamp(self.path / LAST):
                raise ValueError(f"Another run has written {self.path / LAST} since this one began. Start again.")
            for old in [old for pattern in self.written for old in self.path.glob(pattern) if self._empties]:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            remove_leftovers(self.path, (*self.written, LOCK), alone=True)
            remove_leftovers(self.path / "reconstructions", ("*.png",), alone=True)
            if settings is not None:
                head = head_comment(VERSIONS, command, warnings)
                with whole_file(self.path / "args.yaml") as part:
                    part.write_text(head + yaml.safe_dump(settings, sort_keys=False))
            self.notes += summary.trim(self.summary, epoch)
        except BaseException as e:
            if self._lock is not None:
                self._lock.release()
            if isinstance(e, OSError):
                text = f"The output folder {self.path} cannot be written ({e}). Choose another with --output."
                raise ValueError(text) from e
            raise

    def add_row(self, epoch: int, metrics: dict[str, float], measured: dict[str, Any], lr: float) -> None:
        """Adds an epoch to summary.csv; see `summary.add_row`."""
        self.notes += summary.add_row(self.summary, epoch, metrics, measured, lr)

    def save(self, checkpoint: Checkpoint, milestone: bool = False) -> None:
        """Writes a checkpoint whole or not at all; a `milestone` also under a name that stays.

        A `NotSavedError` says that the disk is full, read-only or gone, or that another run has taken the folder over.
        """
        # the milestone must be on the disk before it replaces 'last'
        for name in [f"milestone-{checkpoint.progress.epoch}.pth.tar"] * milestone + [LAST]:
            try:
                if self._lock is not None:
                    self._lock.check()
                save_torch(checkpoint.content(), self.path / name)
            except WriteError as e:
                raise NotSavedError(f"{e} {self.last_whole} Make room there, or give the run another disk.") from e
            except LockLostError as e:
                raise NotSavedError(f"{e} {self.last_whole} Let one of the two runs end.") from e
            self._saved = f"{self.path / name} ({checkpoint.progress})"

    def check_finite(self, state: TrainerState) -> None:
        """Raises `NotSavedError` if a weight is not finite: neither a checkpoint nor an export of it is of use."""
        if bad := state.not_finite():
            raise NotSavedError(
                f"The weight '{bad}' is not finite, so nothing was saved. {self.last_whole} Lower the learning rate "
                "or clip the gradient."
            )

    @property
    def last_whole(self) -> str:
        """A sentence that names the last whole checkpoint."""
        return f"The last whole checkpoint is {self._saved}." if self._saved else "No checkpoint was saved before."


def differences(old: dict[str, Any], new: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The values that differ, in words."""
    return [f"{name}: {old.get(name)!r} there, {new[name]!r} here" for name in names if old.get(name) != new[name]]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file's content does."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def experiment_name(world: World, *parts: str) -> str:
    """The name of a run without --experiment: the time and these parts, the same on all processes."""
    stamp = world.share(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return "-".join([stamp, *(part.replace(".", "_") for part in parts)])


def head_comment(versions: str, command: str = "", warnings: Sequence[str] = ()) -> str:
    """The comment lines above the settings in args.yaml, which `report.run` reads; JSON keeps a command on one line."""
    lines = [versions, *([f"command: {json.dumps(command)}"] if command else [])]
    lines += [f"warning: {' '.join(warning.split())}" for warning in warnings]
    return "".join(f"# {line}\n" for line in lines)
