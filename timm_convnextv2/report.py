"""What a run shows: progress, memory, logs, the loss curve, and pictures of what the model predicts."""

import copy
import csv
import importlib
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .fcmae import FCMAE, normalize_target, patchify, unpatchify
from .masking import Visible, num_visible
from .ops.backends import backend, use_backend

__all__ = [
    "Progress",
    "check_logs",
    "memory_estimate",
    "open_logs",
    "peak_memory",
    "save_loss_curve",
    "save_reconstructions",
]


class Progress:
    """Progress of a whole run: a bar on a terminal, plain lines elsewhere, silence where not enabled.

    Args:
        total: Updates in the run.
        done: Updates done before (resumed runs).
        epochs: Epochs in the run.
        interval: Updates between plain lines.
        enabled: False on all ranks but the first.
    """

    def __init__(self, total: int, done: int, epochs: int, interval: int, enabled: bool = True) -> None:
        self.total, self.first, self.done, self.epochs = total, done, done, epochs
        self.interval, self.enabled = interval, enabled
        self.start = time.perf_counter()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def note(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def update(self, epoch: int, loss: float, lr: float, images_per_s: float, data_wait: float) -> None:
        """Counts one update; `data_wait` is the share of the time spent waiting for data."""
        self.done += 1
        if not self.enabled:
            return
        text = f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:.1f} images/s  data wait {data_wait:.0%}"
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.done % self.interval == 0 or self.done == self.total:
            left = (time.perf_counter() - self.start) / (self.done - self.first) * (self.total - self.done)
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            print(f"epoch {epoch + 1}/{self.epochs}  step {self.done}/{self.total}  {text}  left {clock}", flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.close()


def _save(figure, path: str | Path) -> None:
    """Writes a figure so that a viewer never sees half of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    part = f"{path}.part"
    FigureCanvasAgg(figure)
    figure.savefig(part, format="png")
    os.replace(part, path)


def save_loss_curve(summary: str | Path, path: str | Path) -> None:
    """Draws loss and learning rate of a `summary.csv` as a PNG."""
    from matplotlib.figure import Figure

    with open(summary, newline="") as f:
        rows = list(csv.DictReader(f))
    epochs = [int(r["epoch"]) + 1 for r in rows]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    marker = "o" if len(rows) < 40 else None
    axis.plot(
        epochs, [float(r["train_loss"]) for r in rows], color="#1f5fa8", marker=marker, markersize=3, label="loss"
    )
    axis.set(xlabel="epoch", ylabel="loss on masked patches")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(epochs, [float(r["lr"]) for r in rows], color="#999999", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)", color="#777777")
    rate.set_ylim(bottom=0)
    for side in (axis, rate):
        side.spines["top"].set_visible(False)
    _save(figure, path)


def _displayable(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Normalised `[B, C, H, W]` as RGB `[B, H, W, 3]` in [0, 1]: the first three channels, or the first as grey."""
    x = images * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1)


@torch.no_grad()
def save_reconstructions(
    path: str | Path,
    model: FCMAE,
    images: torch.Tensor,
    masks: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    title: str = "",
) -> None:
    """Draws original, masked input, prediction of the removed patches, and both together, of each image as a PNG.

    Where the target is normalised per patch, the prediction is put back with the patch's true mean and standard
    deviation, as MAE's demo does: it shows the structure that was predicted, in the brightness that was not asked for.

    Args:
        path: PNG to write.
        model: The model, on any device.
        images: Normalised images `[B, C, H, W]`.
        masks: Bool `[B, h, w]`, True = removed.
        mean: Mean per channel that the images were normalised with.
        std: Standard deviation likewise.
        title: Line above the pictures.
    """
    from matplotlib.figure import Figure

    training, device = model.training, model.mask_token.device
    model.eval()
    pred = model(images.to(device), masks).pred.float().cpu()
    model.train(training)

    grid, stride = tuple(masks.shape[1:]), model.stride
    if model.norm_pix_loss:
        _, patch_mean, patch_std = normalize_target(patchify(images, stride))
        pred = pred * patch_std + patch_mean
    pred = unpatchify(pred, grid, stride)
    gap = masks.repeat_interleave(stride, 1).repeat_interleave(stride, 2).unsqueeze(1)

    mean, std = torch.tensor(mean), torch.tensor(std)
    shown = _displayable(images, mean, std)
    low, high = (0.0, 1.0) if -0.1 <= shown.min() and shown.max() <= 1.5 else (shown.min(), shown.max())
    columns = {
        "original": shown,
        "masked input": torch.where(gap.permute(0, 2, 3, 1), low + 0.5 * (high - low), shown),
        "prediction": torch.where(gap.permute(0, 2, 3, 1), _displayable(pred, mean, std), high),
        "prediction + visible": _displayable(torch.where(gap, pred, images), mean, std),
    }
    count, aspect = images.shape[0], images.shape[2] / images.shape[3]
    figure = Figure(figsize=(8, 0.3 + 2 * count * aspect), dpi=120, layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        for row in range(count):
            picture = ((pictures[row] - low) / (high - low)).clamp(0, 1)
            axes[row][column].imshow(picture.numpy(), interpolation="nearest")
            axes[row][column].axis("off")
        axes[0][column].set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=9)
    _save(figure, path)


def memory_estimate(
    model: FCMAE, batch_size: int, ema: bool = False, amp: bool = False, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Memory that training takes, in GiB: weights, gradients and AdamW's state; what a step keeps for its backward.

    The second is counted on one image of `model.img_size` on the meta device, where tensors have shapes and no memory.
    With the backend 'reference' it is what the operations of a GPU keep; those of a CPU keep up to a third less.

    Args:
        model: On any device; left as it is.
        batch_size: Images per step.
        ema: Counts a moving average of the weights.
        amp: Mixed precision: nearly all that is kept is half as large.
        device: What trains, whose `ops.backend` decides what is kept; by default where the model is.
    """
    device = next(model.parameters()).device if device is None else device
    twin = copy.deepcopy(model).to("meta")
    grid = twin.grid(*twin.img_size)
    mask = torch.empty(1, *grid, dtype=torch.bool, device="meta")
    layout = Visible(mask, num_visible(grid, twin.mask_ratio))
    images = torch.empty(1, twin.in_chans, *twin.img_size, device="meta")
    weights = {p.untyped_storage()._cdata for p in twin.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds the tensors: the address of a freed one may be used again

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    with use_backend(backend(device)), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        twin(images, layout, return_pred=False)
    per_image = sum(x.untyped_storage().nbytes() for x in kept.values())
    params = sum(p.numel() for p in model.parameters())
    return params * 4 * (5 if ema else 4) / 2**30, per_image * batch_size * (0.5 if amp else 1.0) / 2**30


def peak_memory(device: torch.device) -> float:
    """Peak GiB: of the GPU's memory, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
        import wandb as api

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
