"""`RunFolder`: the folder of a run, who may have it, and what is written there."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import trim_summary, update_summary

from ..checkpoint import load_checkpoint
from .distributed import World
from .start import short_name

__all__ = ["Progress", "RunFolder", "experiment_name"]

# A checkpoint fits only a model, and its optimizer state only an optimizer, that agree in these.
# `pretrained` decides on the licence.
ARCHITECTURE = ("model", "pretrained", "in_chans", "patch_size", "decoder_depth", "decoder_dim", "model_kwargs", "opt")
ARCHITECTURE += ("weights",)
# A run that stopped in the middle of an epoch resumes only with the same of these.
DATA_ORDER = ("seed", "batch_size", "grad_accum_steps")
# What a run writes into its folder: --overwrite removes these, and nothing else.
WRITTEN = (
    "args.yaml",
    "summary.csv",
    "loss.png",
    "*.png.part",
    "*.pth.tar",
    "*.pth.part",
    "encoder",
    "reconstructions",
)
WRITTEN += ("events.out.tfevents.*", "wandb", "bad-step-*")


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


def experiment_name(model: str, input_size: list[int], world: World) -> str:
    """Time, model and size, the same on all processes."""
    stamp = world.share(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return f"{stamp}-{short_name(model).replace('.', '_')}-{'x'.join(map(str, input_size[1:]))}"


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

    Raises:
        ValueError: The folder holds something else, lies outside `output`, or the checkpoint cannot be read; or it is
            to be overwritten and is not of a run, or has to do with `sources`.
    """

    def __init__(
        self, output: str, experiment: str, resume: str = "", overwrite: bool = False, sources: Sequence[str] = ()
    ) -> None:
        self.path = Path(output) / experiment
        if Path(output).resolve() not in self.path.resolve().parents:
            raise ValueError(f"--experiment {experiment} is not a folder below --output {output}.")
        self.checkpoint: dict[str, Any] | None = None
        self.resumed_from = self.path / "last.pth.tar" if resume == "auto" else Path(resume)
        if resume and (resume != "auto" or self.resumed_from.exists()):
            self.checkpoint = load_checkpoint(self.resumed_from)
        here = resume == "auto" or bool(resume) and self.resumed_from.resolve().parent == self.path.resolve()
        # where this run resumes, what is there is part of it
        self._empties = overwrite and not (self.checkpoint is not None and here)
        if self.path.is_dir() and any(self.path.iterdir()) and not self._empties and not here:
            raise ValueError(
                f"The output folder {self.path} is not empty. Resume that run: --resume auto. Start again and delete "
                "what it wrote: --overwrite. Or choose another --experiment or --output."
            )

        if self._empties and self.path.is_dir() and any(self.path.iterdir()):
            self._check_overwrite(sources)

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
        before, then = self.checkpoint.get("args"), self.checkpoint.get("progress")
        if not isinstance(before, dict) or not isinstance(then, dict):
            raise ValueError(
                f"{self.resumed_from} is not a checkpoint of this script: it has no training state to resume."
            )
        self._compare(before, then, settings, asdict(now))
        return Progress(**{**then, "world_size": world_size, "num_images": num_images})

    def _compare(self, before: dict, then: dict, settings: dict, now: dict) -> None:
        """Refuses a checkpoint of another model, and one from the middle of an epoch of other data."""
        path = self.resumed_from
        differs = _differences(before, settings, ARCHITECTURE)
        if differs:
            raise ValueError(
                f"Cannot resume from {path}, which differs in {'; '.join(differs)}. Repeat the settings of that run "
                "(its args.yaml), or start a new --experiment."
            )
        if settings["model_ema"] and "state_dict_ema" not in self.checkpoint:
            raise ValueError(f"Cannot resume from {path} with --model-ema: that run kept no moving average.")
        differs = _differences(before, settings, DATA_ORDER) + _differences(then, now, ("world_size", "num_images"))
        if differs and then["update"]:
            raise ValueError(
                f"Cannot resume from {path}: it was saved in the middle of an epoch, and the order of the images "
                f"differs in {'; '.join(differs)}. Resume with the same, or from a milestone checkpoint."
            )

    def claim(self, settings: dict[str, Any], versions: str, epoch: int) -> None:
        """Makes the folder, proves that it can be written, and writes args.yaml.

        Args:
            settings: Of the run.
            versions: Of the packages.
            epoch: Epochs that are complete; the summary forgets what came after.

        Raises:
            ValueError: The folder cannot be written.
        """
        try:
            if self._empties and self.path.is_dir():
                self._remove_run()
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"
            probe.write_text("")
            probe.unlink()
        except OSError as e:
            raise ValueError(
                f"The output folder {self.path} cannot be written ({e}). Choose another with --output."
            ) from e
        text = f"# {versions}\n" + yaml.safe_dump(settings, sort_keys=False)
        (self.path / "args.yaml").write_text(text)
        trim_summary(str(self.summary), epoch)

    def add_row(self, epoch: int, metrics: dict[str, float], measured: dict[str, float], lr: float) -> None:
        """Adds an epoch to summary.csv: columns `train_*`, then `eval_*` of what was measured.

        Args:
            epoch: From 0.
            metrics: Of training.
            measured: Of the measures, the same names in every epoch.
            lr: Learning rate of the last update.
        """
        update_summary(epoch, metrics, measured, str(self.summary), lr=lr)

    def save(self, state: dict[str, Any], settings: dict[str, Any], progress: Progress, milestone: bool) -> None:
        """Writes the checkpoint in timm's format, each file whole or not at all.

        Args:
            state: Of the trainer.
            settings: Of the run.
            progress: Where it is.
            milestone: Also under a name that stays.
        """
        content = {
            "epoch": progress.epoch - 1,  # timm: the last one completed
            "arch": settings["model"],
            "version": 2,
            "args": settings,
            "progress": asdict(progress),
            **state,
        }
        for name in [f"milestone-{progress.epoch}"] * milestone + ["last"]:  # 'last' is last: the rest of it is there
            path = self.path / f"{name}.pth.tar"
            part = path.with_suffix(".part")
            torch.save(content, part)
            os.replace(part, path)


def _differences(old: dict, new: dict, names: tuple[str, ...]) -> list[str]:
    return [f"{name}: {old.get(name)!r} there, {new[name]!r} here" for name in names if old.get(name) != new[name]]
