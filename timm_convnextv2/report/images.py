"""PNG figures of a run: curves, reconstructions, neighbours, histograms, contact sheets."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.display import display_of
from ..files import read_rows, whole_file
from ..models.fcmae import FCMAE, normalize_target, patchify, unpatchify

if TYPE_CHECKING:
    from ..data.measure.pixel_statistics import PixelStatistics

NEUTRAL = 0.5  # grey of patches that are not shown, on light and dark pages
FIGURE_OF = "timm_convnextv2 figure"  # in the header of every figure: commands replace only files with a mark
_COLUMNS = 8  # of a contact sheet
_HISTOGRAM_COLUMNS = 4


def save_contact_sheet(images: Sequence[tuple[np.ndarray | None, str]], path: str | Path, title: str = "") -> None:
    """Draws `(image, text)` in rows of eight; images are `[H, W, 3]` in [0, 1], or None for a crossed-out field."""
    columns = min(_COLUMNS, max(4, len(images)))
    rows: list[Any] = [[*images[i : i + columns]] for i in range(0, len(images), columns)] or [[]]
    rows[-1] += [("", "")] * (columns - len(rows[-1]))  # blank
    save_rows(path, rows, (1.6 * columns, 0.4 + 1.9 * len(rows)), title)


def save_rows(
    path: str | Path, rows: Sequence[Sequence[tuple[Any, str]]], size: tuple[float, float], title: str = "",
    legend: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Draws rows of `(image, text)` as a PNG of `size` inches; `legend` has matplotlib handles.

    Images are `[H, W, 3]` in [0, 1]; None is a crossed-out field, '' a blank one.
    """
    figure = new_figure(size)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, (image, text) in zip(axes.flat, chain(*rows), strict=True):
        axis.axis("off")
        axis.set_title(text, fontsize=7, parse_math=False)  # a name may contain $
        if image is None:
            axis.set_aspect("equal")
            axis.plot([0, 1, None, 0, 1], [0, 1, None, 1, 0], color="#c0392b", linewidth=1)
        elif not isinstance(image, str):
            axis.imshow(np.asarray(image), interpolation="nearest", vmin=0, vmax=1)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, title)


def save_histograms(found: "PixelStatistics", path: str | Path, title: str = "") -> None:
    """Draws the histogram of each channel with its mean and its 1st and 99th percentile."""
    from matplotlib.ticker import NullFormatter

    columns = min(_HISTOGRAM_COLUMNS, found.channels)
    rows = -(-found.channels // columns)
    figure = new_figure((max(4.5, 3 * columns), 0.5 + 2.2 * rows), 110)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    low, high = found.percentile(1), found.percentile(99)
    for c, axis in enumerate(axes):
        if c >= found.channels:
            axis.set_visible(False)
            continue
        edges, counts = found.histogram(c)
        axis.stairs(counts / max(1, found.count[c]), edges, fill=True, color="#1f5fa8", alpha=0.75)
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.axvline(found.mean[c], color="black", linewidth=1, label="mean")
        for value, label in ((low[c], "p1, p99"), (high[c], None)):
            axis.axvline(value, color="#c0392b", linewidth=1, linestyle="--", label=label)
        axis.set_title(f"channel {c + 1}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    for axis in axes[np.arange(len(axes)) % columns == 0]:
        axis.set_ylabel("share of pixels", fontsize=8)
    save_figure(figure, path, title)


def new_figure(size: tuple[float, float], dpi: int = 120) -> Any:
    """A figure of `size` inches, without pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=dpi, layout="constrained")


def save_figure(figure, path: str | Path, title: str = "") -> None:
    """Writes a figure as PNG, completely or not at all (`WriteError`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=9, parse_math=False)  # a name may contain $
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata={"Software": FIGURE_OF})


def save_loss_curve(summary: str | Path, path: str | Path) -> None:
    """Draws loss and learning rate of a `summary.csv` as a PNG."""
    rows, _ = read_rows(Path(summary))
    epochs, losses, rates = ([float(str(r[name])) for r in rows] for name in ("epoch", "train_loss", "lr"))
    epochs = [epoch + 1 for epoch in epochs]
    figure = new_figure((7, 4))
    axis = figure.add_subplot()
    axis.plot(epochs, losses, color="#1f5fa8", marker="o" if len(rows) < 40 else None, markersize=3)
    axis.set(xlabel="epoch", ylabel="loss on masked patches")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(epochs, rates, color="#999999", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)", color="#777777")
    rate.set_ylim(bottom=0)
    for side in (axis, rate):
        side.spines["top"].set_visible(False)
    save_figure(figure, path)


def save_neighbours(
    path: str | Path,
    images: torch.Tensor,
    neighbours: Sequence[tuple[int, Sequence[int]]],
    title: str = "",
    bands: Sequence[int] | None = None,
) -> None:
    """Draws images `[N, C, H, W]` and their nearest neighbours as a PNG, one row per image.

    `neighbours` holds for each row the index of its image and those of its neighbours, the nearest first. For `bands`
    see `display_of`.
    """
    if not neighbours:
        raise ValueError("neighbours is empty, expected at least one row (index, [indices of its neighbours]).")
    images = images.float().cpu()
    display = display_of([*images], bands)
    shown = display.rgb(images)
    columns, aspect = 1 + max(len(near) for _, near in neighbours), images.shape[2] / images.shape[3]
    texts = ["image", "nearest", *[""] * columns]
    rows: list[Any] = []
    for query, near in neighbours:
        rows.append([(shown[i], text) for i, text in zip((query, *near), texts, strict=False)])
        rows[-1] += [("", "")] * (columns - len(rows[-1]))
        texts = [""] * columns
    save_rows(path, rows, (8, 0.4 + 8 / columns * aspect * len(neighbours)), f"{title}; {display}")


@torch.no_grad()
def save_reconstructions(
    path: str | Path,
    model: FCMAE,
    images: torch.Tensor,
    masks: torch.Tensor,
    title: str = "",
    bands: Sequence[int] | None = None,
) -> None:
    """Draws each image as original, masked input, prediction, and prediction with the visible patches.

    If the target is normalised per patch, the prediction gets the patch's true mean and standard deviation, as in
    MAE's demo: it shows the predicted structure, in a brightness that the model did not predict.

    Args:
        images: As the network sees them, `[B, C, H, W]`.
        masks: Bool `[B, h, w]`, True = removed.
        bands: See `display_of`; the originals set the range of all columns.
    """
    training, device = model.training, model.mask_token.device
    model.eval()
    pred = model(images.to(device), masks).pred.float().cpu()
    model.train(training)

    grid, stride = (masks.shape[1], masks.shape[2]), model.stride
    if model.norm_pix_loss:
        _, patch_mean, patch_std = normalize_target(patchify(images, stride))
        pred = pred * patch_std + patch_mean
    pred = unpatchify(pred, grid, stride)
    gap = masks.repeat_interleave(stride, 1).repeat_interleave(stride, 2).unsqueeze(-1)

    display = display_of([*images], bands)
    shown, predicted = display.rgb(images), display.rgb(pred)
    columns = {
        "original": shown,
        "masked input": torch.where(gap, NEUTRAL, shown),
        "prediction": torch.where(gap, predicted, NEUTRAL),
        "prediction + visible": torch.where(gap, predicted, shown),
    }
    rows = [[(drawn[i], name * (i == 0)) for name, drawn in columns.items()] for i in range(len(images))]
    size = (8, 0.3 + 2 * len(images) * images.shape[2] / images.shape[3])
    save_rows(path, rows, size, f"{title}; {display}")
