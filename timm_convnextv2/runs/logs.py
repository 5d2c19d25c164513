"""Logs of the metrics of an epoch beside `summary.csv`: TensorBoard, Weights & Biases."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import option

Log = Callable[[int, dict], None]  # takes the epoch and its metrics


@dataclass(frozen=True)
class Logs:
    """The logs that a run writes."""

    log_wandb: bool = option(False, "log to Weights & Biases")
    wandb_project: str | None = option(None, "project of Weights & Biases", metavar="NAME")
    log_tensorboard: bool = option(False, "log to TensorBoard")

    def check(self) -> None:
        """Raises a `ValueError` if a log needs a package that is missing."""
        wanted = [("wandb", "wandb")] * self.log_wandb
        wanted += [("tensorboard", "torch.utils.tensorboard")] * self.log_tensorboard
        for package, module in wanted:
            try:
                importlib.import_module(module)
            except ImportError as e:
                text = f"--log-{package} needs a package that is missing: pip install {package} ({e})."
                raise ValueError(text) from e

    def open(self, folder: Path, settings: dict) -> list[Log]:
        """Functions that write the metrics of an epoch."""
        logs: list[Log] = []
        if self.log_wandb:
            import wandb as api  # pyright: ignore[reportMissingImports]

            api.init(project=self.wandb_project, name=folder.name, config=settings, dir=folder)
            logs.append(lambda epoch, metrics: api.log({**metrics, "epoch": epoch}))
        if self.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder)

            def write(epoch: int, metrics: dict) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, epoch)
                writer.flush()

            logs.append(write)
        return logs
