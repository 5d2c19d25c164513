"""The figures of `evaluate` and `collapse`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..report.images import new_figure, save_figure
from .channels import BlockCollapse

GREYS = ("#c4c4c4", "#a6a6a6", "#888888", "#5f5f5f", "#303030")  # baselines
MARKERS = "s^vDx"
NAME_LENGTH = 40


def _axes(size: tuple[float, float], ylabel: str, count: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes in a row, which share the vertical scale."""
    figure = new_figure(size)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def _line(axis: Any, y: float, label: str) -> None:
    axis.axhline(y, color="#bbbbbb", linewidth=1, linestyle="--", label=label, zorder=0)


def _save(figure: Any, path: str | Path, columns: int = 1) -> None:
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=columns)
    save_figure(figure, path)


def _styled(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, Any, str]]:
    """Each result with its colour and marker: greys for baselines."""
    greys = zip(GREYS, MARKERS, strict=True)
    colours = iter(_colours(sum("baseline" not in result for result in results)))
    for result in results:
        colour, marker = next(greys) if "baseline" in result else (next(colours), "o")
        yield result, colour, marker


def _unit(found: Mapping[str, Any]) -> str:
    return "mean average precision (%)" if found["data"]["several_labels"] else "accuracy (%)"


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(count)]


def short(name: str) -> str:
    """The end of a long name, which differs more between models than its start."""
    return name if len(name) <= NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]


def save_measures(found: Mapping[str, Any], path: str | Path) -> None:
    """Draws the measures of `evaluate_models` with their 95 % intervals, except the rank, as a PNG."""
    results = found["results"]
    keys = [key for key in results[0]["measures"] if key != "rank"]
    figure, (axis,) = _axes((1.6 + 1.3 * len(keys), 3.6 + 0.22 * len(results)), _unit(found))
    for i, (result, colour, _) in enumerate(_styled(results)):
        shift = 0.7 * ((i + 0.5) / len(results) - 0.5)
        value, low, high = ([100 * result["measures"][key][end] for key in keys] for end in ("value", "low", "high"))
        below = [max(v - end, 0) for v, end in zip(value, low, strict=True)]
        above = [max(end - v, 0) for v, end in zip(value, high, strict=True)]
        axis.errorbar(
            [x + shift for x in range(len(keys))], value, yerr=[below, above], fmt="s" if "baseline" in result else "o",
            markersize=5, linewidth=1.3, capsize=2, color=colour, label=short(result["model"]),
        )  # fmt: skip
    chance = 100 * found["data"]["chance"]
    _line(axis, chance, f"chance, {chance:.1f} %")
    axis.set_xticks(range(len(keys)), [key.replace("knn_", "kNN ") for key in keys])
    _save(figure, path, columns=1 if len(results) < 4 else 2)


def save_budgets(found: Mapping[str, Any], path: str | Path) -> None:
    """Draws the measures of `evaluate_models` over the number of labelled images, with their bands, as a PNG."""
    results = [result for result in found["results"] if "budgets" in result]
    keys = [*results[0]["budgets"][0]["measures"]]
    figure, axes = _axes((1 + 3.6 * len(keys), 3.8 + 0.2 * len(results)), _unit(found), len(keys))
    chance = 100 * found["data"]["chance"]
    for result, colour, marker in _styled(results):
        images = [budget["images"] for budget in result["budgets"]]
        for axis, key in zip(axes, keys, strict=True):
            bands = [budget["measures"][key] for budget in result["budgets"]]
            value, low, high = ([100 * band[end] for band in bands] for end in ("value", "low", "high"))
            label = short(result["model"]) if key == keys[0] else None
            axis.plot(
                images, value, color=colour, marker=marker, markersize=5, label=label,
                linestyle="--" if "baseline" in result else "-",
            )  # fmt: skip
            axis.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, key in zip(axes, keys, strict=True):
        axis.axhline(chance, color="#bbbbbb", linewidth=1, linestyle=":", zorder=0)
        label_counts(axis, [budget["images"] for budget in results[0]["budgets"]])
        axis.set_title({"knn": "kNN", "ridge": "ridge", "probe": "linear probe"}[key], fontsize=10)
        axis.set_xlabel("labelled training images")
    _save(figure, path, columns=1 if len(results) < 4 else 2)


def label_counts(axis: Any, sizes: Sequence[int]) -> None:
    """Makes the x axis logarithmic, with these numbers of images as its only ticks."""
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])


def save_distances(found: Mapping[str, Sequence[BlockCollapse]], path: str | Path) -> None:
    """Draws the mean cosine distance of channels over depth, one line per model, as a PNG (the paper's figure 4)."""
    figure, (axis,) = _axes((6.5, 4 + 0.2 * len(found)), "mean cosine distance of channels")
    for colour, (name, blocks) in zip(_colours(len(found)), found.items(), strict=True):
        dead = 100 * sum(block.dead for block in blocks) / len(blocks)
        label = short(name) + (f" ({dead:.2g} % of channels dead)" if dead else "")
        depth, distance = [block.depth for block in blocks], [block.distance for block in blocks]
        axis.plot(depth, distance, color=colour, marker="o", markersize=3.5, label=label)
    _line(axis, 0.5, "independent channels, 0.5")
    axis.set_xlabel("depth (0: first block, 1: last)")
    axis.set_ylim(0, 1.05 * max([0.5, *(block.distance for blocks in found.values() for block in blocks)]))
    _save(figure, path)


def save_channels(shown: Sequence[Tensor], maps: Mapping[str, tuple[str, Tensor]], path: str | Path) -> None:
    """Draws images, and beside each the channels of a block as small squares, as a PNG (the paper's figure 3).

    Each square is scaled to its own range, which hides its strength. A square of one colour is a constant channel.
    `shown` has images `[h, w, 3]` in 0..1, `maps` the results of `channel_maps` by model.
    """
    figure = new_figure((1.6 + 2.6 * len(maps), 0.5 + 2.5 * len(shown)), 150)
    widths = [1.4, *[2.6] * len(maps)]
    axes = figure.subplots(len(shown), 1 + len(maps), squeeze=False, gridspec_kw={"width_ratios": widths})
    for i, image in enumerate(shown):
        axes[i][0].imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
        for j, (_, channels) in enumerate(maps.values(), start=1):
            axes[i][j].imshow(_mosaic(channels[i]).numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for j, name in enumerate(maps, start=1):
        axes[0][j].set_title(f"{short(name)}\n{maps[name][0]}", fontsize=7)
    for axis in axes.flat:
        axis.axis("off")
    save_figure(figure, path)


def _mosaic(channels: Tensor) -> Tensor:
    """Maps `[C, h, w]`, each scaled to 0..1, in a square of squares with gaps (NaN)."""
    low, high = channels.amin((1, 2), keepdim=True), channels.amax((1, 2), keepdim=True)
    gap = max(1, channels.shape[1] // 8)
    scaled = F.pad((channels - low) / (high - low).clamp_min(1e-12), (0, gap, 0, gap), value=math.nan)
    side = math.ceil(math.sqrt(len(channels)))
    blank = scaled.new_full((side**2 - len(scaled), *scaled.shape[1:]), math.nan)
    return (
        torch.cat([scaled, blank]).unflatten(0, (side, side)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-gap, :-gap]
    )
