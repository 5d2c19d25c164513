"""The images that a run draws: its loss curve, and what the model predicts."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import whole_file
from ..models.fcmae import FCMAE, normalize_target, patchify, unpatchify

__all__ = ["save_figure", "save_loss_curve", "save_reconstructions"]


def save_figure(figure, path: str | Path) -> None:
    """Writes a figure so that a viewer never sees half of it.

    Raises:
        WriteError: (an OSError) It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def save_loss_curve(summary: str | Path, path: str | Path) -> None:
    """Draws loss and learning rate of a `summary.csv` as a PNG.

    Raises:
        OSError: The summary cannot be read, or the image not written.
    """
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
    axis.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(epochs, [float(r["lr"]) for r in rows], color="#999999", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)", color="#777777")
    rate.set_ylim(bottom=0)
    for side in (axis, rate):
        side.spines["top"].set_visible(False)
    save_figure(figure, path)


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
    mean: Sequence[float],
    std: Sequence[float],
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
        title: Line above the images.
    """
    from matplotlib.figure import Figure

    training, device = model.training, model.mask_token.device
    model.eval()
    pred = model(images.to(device), masks).pred.float().cpu()
    model.train(training)

    grid, stride = (masks.shape[1], masks.shape[2]), model.stride
    if model.norm_pix_loss:
        _, patch_mean, patch_std = normalize_target(patchify(images, stride))
        pred = pred * patch_std + patch_mean
    pred = unpatchify(pred, grid, stride)
    gap = masks.repeat_interleave(stride, 1).repeat_interleave(stride, 2).unsqueeze(1)

    means, stds = torch.tensor(mean), torch.tensor(std)
    shown = _displayable(images, means, stds)
    low, high = (0.0, 1.0) if -0.1 <= shown.min() and shown.max() <= 1.5 else (shown.min(), shown.max())
    columns = {
        "original": shown,
        "masked input": torch.where(gap.permute(0, 2, 3, 1), low + 0.5 * (high - low), shown),
        "prediction": torch.where(gap.permute(0, 2, 3, 1), _displayable(pred, means, stds), high),
        "prediction + visible": _displayable(torch.where(gap, pred, images), means, stds),
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
    save_figure(figure, path)
