"""The folder of a run of detection or segmentation: its lock, its checkpoint, its settings and its summary."""

import json
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from ..files import WriteError, remove_leftovers, save_torch, whole_file
from ..pretrain.start import short_name
from . import summary
from .end import VERSIONS
from .lock import LOCK, Lock, LockLostError, refuse_locked
from .world import World

CHECKPOINT = "last.pth.tar"


WRITTEN = ("args.yaml", "summary.csv", CHECKPOINT, "predictions", "model", "report.html")


WRITTEN += ("events.out.tfevents.*", "wandb")


class NotSavedError(Exception):
    """A run cannot save its state any more: says why."""


class TransferFolder:
    """The folder of a run. Opening it writes nothing; `claim` does.

    Args:
        path: The folder.
        resume: Continue the run that it holds, if it holds one.
        overwrite: Whether what an earlier run wrote there may be removed.

    Attributes:
        checkpoint: What `save` wrote, None for a new run; `Training.load` takes it.

    Raises:
        ValueError: It holds something already, is in use, or its checkpoint cannot be read.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.checkpoint: dict[str, Any] | None = None
        self._overwrite, self._lock = overwrite, None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The output '{self.path}' is a file, expected a folder.")
        refuse_locked(self.path)
        last = self.path / CHECKPOINT
        if resume and last.is_file():
            try:
                found = torch.load(last, map_location="cpu", weights_only=True)
                self.checkpoint = {key: found[key] for key in ("update", "settings", "state_dict")} | found
            except Exception as e:
                raise ValueError(f"The checkpoint '{last}' cannot be read ({type(e).__name__}: {e}).") from e
        used = self.path.is_dir() and any(not p.name.startswith(LOCK) for p in self.path.iterdir())
        if used and self.checkpoint is None:
            if not overwrite:
                raise ValueError(
                    f"The output folder {self.path} is not empty. Continue the run in it: --resume auto. Start again "
                    "and delete what it wrote: --overwrite. Or choose another --output or --experiment."
                )
            if not (self.path / "args.yaml").is_file():
                raise ValueError(
                    f"--overwrite: {self.path} is not the folder of a run (it has no args.yaml), so nothing in it is "
                    "removed. Choose another --output or --experiment."
                )

    @property
    def summary(self) -> Path:
        """A row an epoch."""
        return self.path / "summary.csv"

    def check_same(self, settings: dict[str, Any], names: Sequence[str]) -> None:
        """Refuses to resume where one of these settings, on which the order of images or the weights depend, differs.

        Raises:
            ValueError: Names them.
        """
        if self.checkpoint is None:
            return
        then = self.checkpoint["settings"]
        differs = [f"{n}: {then.get(n)!r} there, {settings.get(n)!r} here" for n in names if then.get(n) != settings[n]]
        if differs:
            raise ValueError(
                f"Cannot resume from {self.path / CHECKPOINT}, which differs in {'; '.join(differs)}. Repeat the "
                "settings of that run (its args.yaml), or start a new one."
            )

    def claim(self, settings: dict[str, Any], *, command: str = "", epoch: int = 0) -> None:
        """Makes and locks the folder, removes what is to be overwritten, and writes args.yaml.

        Args:
            settings: Of the run, plain values.
            command: That started it.
            epoch: Epochs that are complete; the summary forgets what came after.

        Raises:
            ValueError: The folder cannot be written, or another run has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
            if self._overwrite and self.checkpoint is None:
                self._remove()
            remove_leftovers(self.path, (*WRITTEN, LOCK), alone=True)
            with whole_file(self.path / "args.yaml") as part:
                part.write_text(head_comment(VERSIONS, command) + yaml.safe_dump(settings, sort_keys=False))
            summary.trim(self.summary, epoch)
        except OSError as e:
            self.release()
            raise ValueError(f"The output folder {self.path} cannot be written ({e}). Choose another --output.") from e

    def _remove(self) -> None:
        for pattern in WRITTEN:
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def save(self, content: dict[str, Any]) -> None:
        """Writes the checkpoint, whole or not at all.

        Raises:
            NotSavedError: The disk is full, read-only or gone, or another run has taken the folder over.
        """
        try:
            if self._lock is not None:
                self._lock.check()
            save_torch(content, self.path / CHECKPOINT)
        except (WriteError, LockLostError) as e:
            raise NotSavedError(str(e)) from e

    def release(self) -> None:
        """Lets other runs have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def experiment_name(model: str, input_size: list[int], world: World) -> str:
    """Time, model and size, the same on all processes."""
    stamp = world.share(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return f"{stamp}-{short_name(model).replace('.', '_')}-{'x'.join(map(str, input_size[1:]))}"


def head_comment(versions: str, command: str = "") -> str:
    """The comment lines above the settings in args.yaml; `read_run` reads them.

    The command is quoted as JSON does it, so that it stays a line, whatever a path in it holds.
    """
    return f"# {versions}\n" + (f"# command: {json.dumps(command)}\n" if command else "")
