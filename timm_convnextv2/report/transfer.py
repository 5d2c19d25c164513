"""What a report says of a run of detection or segmentation."""

from collections.abc import Callable, Sequence
from typing import Any

from .kind import COST, COST_CHARTS, Chart, Kind, batch_of, cost_of, device_of, last_of
from .next_steps import next_steps_of_transfer
from .run import RunRecord

__all__ = ["DETECTION", "SEGMENTATION"]


def _facts_of_transfer(run: RunRecord) -> dict[str, str]:
    """What was trained on what."""
    of = run.settings
    names = [str(name) for name in of["classes"]]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    start = "random weights" if of["from_scratch"] else of["model"]
    kind = "UPerNet" if run.task == "segmentation" else "Faster R-CNN" if of.get("boxes_only") else "Mask R-CNN"
    prepared = ", ".join(f"{name} {value}" for name, value in (of.get("pixels") or {}).items())
    return {
        "Model": f"{kind} on {of['model']}",
        "Backbone started from": f"{start}{', and is frozen' if of.get('frozen') else ''}",
        "Data": of["data_dir"],
        "Images": f"{of['num_images']:,}, {of['num_validation']:,} to validate",
        "Classes": f"{len(names)}: {shown}",
        "Input": f"{of['in_chans']} channels, crops of {of['img_size']} x {of['img_size']}",
        "Stored values": prepared,
        "Recipe": str(of.get("recipe") or ""),
        "Updates": f"{of['total_updates']:,}",
        "Batch": batch_of(of, of["world_size"]),
        "Learning rate": f"{of['lr']:g}, layer decay {of.get('layer_decay', 1):g}",
        "Device": device_of(of),
        "Seed": str(of["seed"]),
        "Versions": run.versions,
        "Folder": str(run.path),
        "Command": run.command,
    }


def _about_transfer(run: RunRecord) -> str:
    """The run in a line."""
    facts, of = _facts_of_transfer(run), run.settings
    epochs = len(run.rows) and max(run.rows) + 1
    images = f"{of['num_images']:,} images, {of['num_validation']:,} to validate"
    return f"{facts['Model']}, on {facts['Data']}: {images}; {epochs} epochs"


def _numbers_of(measures: dict[str, str]) -> Callable[[RunRecord], dict[str, str]]:
    """The function for these measures, by name the column of summary.csv."""

    def numbers(run: RunRecord) -> dict[str, str]:
        found = {"Loss": last_of(run, "train_loss", "{:.4f}")}
        for name, column in measures.items():
            values = run.column(column)
            found[name] = f"{100 * values[max(values)]:.1f} %" if values else ""
        return {**found, **cost_of(run)}

    return numbers


def _findings_of(names: dict[str, str]) -> Callable[[RunRecord], list[str]]:
    """The function for these measures, by name the column of summary.csv."""

    def findings(run: RunRecord) -> list[str]:
        found = []
        for name, column in names.items():
            values = run.column(column)
            if values:
                best, last = max(values, key=lambda epoch: values[epoch]), max(values)
                since = "" if best == last else f", and is {100 * values[last]:.1f} % after epoch {last}"
                found.append(f"{name} was highest after epoch {best} ({100 * values[best]:.1f} %){since}.")
        if found and run.column("train_loss"):
            found.append("It was measured on the validation images, with the weights that are exported.")
        return found

    return findings


def _losses(runs: Sequence[RunRecord]) -> list[Chart]:
    """The sum, and each of its parts."""
    parts = dict.fromkeys(c for run in runs for row in run.rows.values() for c in row if c.startswith("train_loss_"))
    named = [Chart(f"Loss: {c.removeprefix('train_loss_').replace('_', ' ')}", {c: False}) for c in parts]
    return [Chart("Loss", {"train_loss": False}, "The sum of its parts, on the training images."), *named]


def _detection_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    masks = any(run.column("eval_mask_ap") for run in runs)
    note = "Solid: boxes. Dashed: masks." if masks else "Of boxes."
    dashed: dict[str, Any] = dict(scale=100, dashed="masks")
    return [
        Chart("AP, %", {"eval_box_ap": False, "eval_mask_ap": True}, f"{note} IoU 0.5 to 0.95.", **dashed),
        Chart("AP at IoU 0.5, %", {"eval_box_ap50": False, "eval_mask_ap50": True}, note, **dashed),
        *_losses(runs),
        *COST_CHARTS,
    ]


def _segmentation_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    return [
        Chart("mIoU, %", {"eval_miou": False}, "Mean over the classes that occur.", 100),
        Chart(
            "Accuracy, %",
            {"eval_accuracy": False, "eval_mean_accuracy": True},
            "Solid: of pixels. Dashed: mean over the classes.",
            100,
            dashed="mean over classes",
        ),  # fmt: skip
        *_losses(runs),
        *COST_CHARTS,
    ]


_BOXES = {
    "Box AP": "eval_box_ap",
    "Box AP50": "eval_box_ap50",
    "Mask AP": "eval_mask_ap",
    "Mask AP50": "eval_mask_ap50",
}
_PIXELS = {"mIoU": "eval_miou", "Accuracy": "eval_accuracy", "Mean accuracy": "eval_mean_accuracy"}

DETECTION = Kind(
    "Detection",
    "Report of detection",
    "model",
    "Images of the validation: the truth at the left, and what is found with a score of 0.5 and more at the right.",
    "The truth at the left and what was found at the right, a row an image",
    {"train_loss": ("loss", "{:.4f}"), **{c: (n, "{:.1%}") for n, c in _BOXES.items()}, **COST},
    _facts_of_transfer,
    _about_transfer,
    _numbers_of(_BOXES),
    _detection_charts,
    _findings_of({name: _BOXES[name] for name in ("Box AP", "Mask AP")}),
    next_steps_of_transfer,
)

SEGMENTATION = Kind(
    "Segmentation",
    "Report of segmentation",
    "model",
    "Images of the validation: the image, its mask, and what is found.",
    "Image, mask and what was found, a row an image",
    {"train_loss": ("loss", "{:.4f}"), **{c: (n, "{:.1%}") for n, c in _PIXELS.items()}, **COST},
    _facts_of_transfer,
    _about_transfer,
    _numbers_of(_PIXELS),
    _segmentation_charts,
    _findings_of({"mIoU": "eval_miou"}),
    next_steps_of_transfer,
)
