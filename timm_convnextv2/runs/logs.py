"""Where the metrics of an epoch go beside `summary.csv`: TensorBoard, Weights & Biases."""

import importlib
from collections.abc import Callable
from pathlib import Path


def check_logs(wandb: bool, tensorboard: bool) -> None:
    """Raises a `ValueError` where a log is asked for and its package is missing."""
    for wanted, module, package in ((wandb, "wandb", "wandb"), (tensorboard, "torch.utils.tensorboard", "tensorboard")):
        if wanted:
            try:
                importlib.import_module(module)
            except ImportError as e:
                raise ValueError(
                    f"--log-{package} needs a package that is missing: pip install {package} ({e})."
                ) from e


def open_logs(
    folder: Path, settings: dict, wandb: bool = False, wandb_project: str | None = None, tensorboard: bool = False
) -> list[Callable[[int, dict], None]]:
    """Functions `(epoch, metrics)` that send the metrics of an epoch to the logs asked for."""
    logs = []
    if wandb:
        import wandb as api  # pyright: ignore[reportMissingImports]

        api.init(project=wandb_project, name=folder.name, config=settings, dir=folder)
        logs.append(lambda epoch, metrics: api.log({**metrics, "epoch": epoch}))
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder)

        def write(epoch: int, metrics: dict) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        logs.append(write)
    return logs
