"""The texts, tables and charts of a report, per task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .next_steps import Step, next_steps, next_steps_of_transfer
from .run import RunRecord


class Chart(NamedTuple):
    """A chart over epochs.

    Attributes:
        title: Text above.
        columns: Columns of summary.csv; True for a dashed line.
        note: Explains the lines.
        scale: Factor of the values, whose axis then begins at 0; 0 for none.
        baseline: Measure of the probe whose baselines are drawn.
        dashed: Meaning of dashed lines.
    """

    title: str
    columns: dict[str, bool]
    note: str = ""
    scale: float = 0
    baseline: str = ""
    dashed: str = "held out"


class Kind(NamedTuple):
    """The differences between tasks.

    Attributes:
        title: Title of the page, before " of RUN".
        heading: Text above the names of the runs.
        model: Subfolder with the exported model.
        predictions: Explains the images of predictions.
        alt: Text alternative of such an image, before ", after epoch N".
        columns: Columns of summary.csv in the table of numbers: heading and format.
        facts: Rows about model, data and training.
        about: The run in one line.
        numbers: The latest measured numbers.
        charts: Candidates for charts; those without values are left out.
        findings: Sentences about the numbers.
        next_steps: Commands for the exported model.
    """

    title: str
    heading: str
    model: str
    predictions: str
    alt: str
    columns: dict[str, tuple[str, str]]
    facts: Callable[[RunRecord], dict[str, str]]
    about: Callable[[RunRecord], str]
    numbers: Callable[[RunRecord], dict[str, str]]
    charts: Callable[[Sequence[RunRecord]], list[Chart]]
    findings: Callable[[RunRecord], list[str]]
    next_steps: Callable[[dict[str, Any], Path], list[Step]]


# ------------------------------------------------------------------------------------------------------ of every task

COST = {
    "train_images_per_s": ("images/s", "{:.1f}"),
    "train_data_wait": ("data wait", "{:.0%}"),
    "train_memory_gib": ("memory GiB", "{:.2f}"),
    "lr": ("learning rate", "{:.2e}"),
}

COST_CHARTS = [
    Chart("Speed, images/s", {"train_images_per_s": False}, scale=1),
    Chart("Waiting for data, % of the time", {"train_data_wait": False}, "More than a few %: add data workers.", 100),
    Chart("Learning rate", {"lr": False}),
]


def cost_of(run: RunRecord) -> dict[str, str]:
    """Time, speed and memory."""
    rows = run.rows.values()
    seconds = sum(row.get("train_seconds", 0.0) for row in rows)
    speeds, waits, memory = (
        [row[name] for row in rows if name in row]
        for name in ("train_images_per_s", "train_data_wait", "train_memory_gib")
    )
    return {
        "Training time": duration(seconds) if seconds else "",
        "Speed": f"{median(speeds):.1f} images/s" if speeds else "",
        "Waiting for data": f"{100 * median(waits):.0f} % of the time" if waits else "",
        "Peak memory": f"{max(memory):.2f} GiB" if memory else "",
    }


def last_of(run: RunRecord, column: str, form: str) -> str:
    values = run.column(column)
    return form.format(values[max(values)]).replace("%", " %") if values else ""


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def batch_of(of: dict[str, Any], processes: int) -> str:
    accum = f" x {of['grad_accum_steps']} steps" if of["grad_accum_steps"] > 1 else ""
    return f"{of['batch_size']}{accum}" + (f" x {processes} processes" if processes > 1 else "")


def device_of(of: dict[str, Any]) -> str:
    return f"{of.get('device', '')}{', ' + str(of.get('amp_dtype')) if of.get('amp') else ''}"


BASELINES = {"random": "random weights", "pixels": "plain pixels"}

_COLUMNS = {
    "train_loss": ("loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_knn": ("kNN %", "{:.1f}"),
    "eval_ridge": ("ridge %", "{:.1f}"),
    "eval_rank": ("RankMe", "{:.1f}"),
    "eval_distance": ("distance", "{:.3f}"),
    "eval_dead": ("dead channels", "{:.1%}"),
    **COST,
}


def _facts(run: RunRecord) -> dict[str, str]:
    """Rows about model, data and training."""
    of, progress = run.settings, run.progress
    chans, height, width = of["input_size"]
    sources = [of["dataset"], of["data_dir"], of.get("data_list")]
    named = [word for source in sources if source for word in (source if isinstance(source, list) else [source])]
    data = "the embedded data set" if of["dataset"] == "embedded" else " ".join(named)
    images = progress.get("num_images") or of.get("train_num_samples")
    start = "random weights" if not of["pretrained"] else str(of.get("weights") or "published or given weights")
    probe = run.probe
    probed = f"{probe.get('data_dir', '')}: {len(probe.get('classes') or [])} classes, {probe.get('train', '?')} train"
    return {
        "Model": of["model"],
        "Started from": start,
        "Data": data,
        "Images": f"{images:,}" if isinstance(images, int) else "",
        "Input": f"{chans} x {height} x {width}, stem patch {of['patch_size']}",
        "Method": f"FCMAE, mask ratio {of['mask_ratio']:g}, decoder {of['decoder_depth']} x {of['decoder_dim']}, "
        + ("targets normalised per patch" if of.get("norm_pix_loss") else "plain pixels"),
        "Epochs": f"{len(run.rows) and max(run.rows) + 1} of {of['epochs']}",
        "Batch": batch_of(of, progress.get("world_size", 1)),
        "Device": device_of(of),
        "Seed": str(of["seed"]),
        "Probe": f"{probed}, {probe.get('test', '?')} test images" if probe else "",
        "Versions": run.versions,
        "Folder": str(run.path),
        "Command": run.command,
    }


def _about(run: RunRecord) -> str:
    """The run in one line."""
    facts = _facts(run)
    images = f"{facts['Images']} images" if facts["Images"] else "images"
    size = " x ".join(map(str, run.settings["input_size"]))
    return f"{facts['Model']} on {facts['Data']}, {images} of {size}, {facts['Epochs']} epochs"


def _numbers(run: RunRecord) -> dict[str, str]:
    """The latest measured numbers."""
    bad = run.progress.get("bad_images") or {}
    last_bad = last_of(run, "train_bad_images", "{:.0f}")
    return {
        "Loss": last_of(run, "train_loss", "{:.4f}"),
        "Held-out loss": last_of(run, "eval_loss", "{:.4f}"),
        "kNN": last_of(run, "eval_knn", "{:.1f}%"),
        "Ridge": last_of(run, "eval_ridge", "{:.1f}%"),
        "RankMe": last_of(run, "eval_rank", "{:.1f}"),
        "Distance of channels": last_of(run, "eval_distance", "{:.3f}"),
        "Dead channels": last_of(run, "eval_dead", "{:.2%}"),
        **cost_of(run),
        "Images that cannot be decoded": str(len(bad)) if bad else last_bad,
        "Skipped updates": str(run.progress["bad_steps"]) if "bad_steps" in run.progress else "",
    }


def _charts(runs: Sequence[RunRecord]) -> list[Chart]:
    held_out = any(run.column("eval_loss") for run in runs)
    note = "Solid: training. Dashed: held-out images." if held_out else "On masked patches of the training images."
    return [
        Chart("Loss", {"train_loss": False, "eval_loss": True}, note),
        Chart("kNN accuracy, %", {"eval_knn": False}, "Dotted: baselines that need no training.", baseline="knn"),
        Chart("Ridge accuracy, %", {"eval_ridge": False}, "A linear classifier in closed form.", baseline="ridge"),
        Chart("RankMe", {"eval_rank": False}, "Compares runs of one method only.", baseline="rank"),
        Chart("Mean distance of channels", {"eval_distance": False}, "0: collapsed. About 0.5: independent."),
        Chart("Dead channels, %", {"eval_dead": False}, "Channels whose norm is almost zero.", 100),
        *COST_CHARTS,
    ]


def _findings(run: RunRecord) -> list[str]:
    """Sentences about the numbers."""
    found = []
    for column, name, key in (("eval_knn", "kNN", "knn"), ("eval_ridge", "Ridge", "ridge")):
        values = run.column(column)
        if not values:
            continue
        last = max(values)
        sides = [
            f"{_side(values[last], of[key])} {BASELINES.get(base, base)} ({of[key]:.1f} %)"
            for base, of in run.probe.get("baselines", {}).items()
            if key in of
        ]
        found.append(f"{name} after epoch {last} is {values[last]:.1f} %{': ' if sides else ''}{', '.join(sides)}.")
    held_out = run.column("eval_loss")
    if held_out:
        best, last = min(held_out, key=lambda epoch: held_out[epoch]), max(held_out)
        since = "" if best == last else f", and is {held_out[last]:.4f} after epoch {last}"
        found.append(f"The held-out loss was lowest after epoch {best} ({held_out[best]:.4f}){since}.")
    return found


def _side(value: float, baseline: float) -> str:
    return "above" if value > baseline else "below" if value < baseline else "equal to"


PRETRAINING = Kind(
    "Pretraining",
    "Report of pretraining, FCMAE",
    "encoder",
    "The same images with the same masks: the input of the network, and its prediction of the masked patches. Good "
    "predictions do not prove good features.",
    "Original, masked input, prediction, and prediction with the visible patches, one row per image",
    _COLUMNS,
    _facts,
    _about,
    _numbers,
    _charts,
    _findings,
    next_steps,
)


def _facts_of_transfer(run: RunRecord) -> dict[str, str]:
    """Rows about model, data and training."""
    of = run.settings
    names = [str(name) for name in of["classes"]]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    start = "random weights" if of["from_scratch"] else of["model"]
    kind = "UPerNet" if run.task == "segmentation" else "Faster R-CNN" if of.get("boxes_only") else "Mask R-CNN"
    prepared = ", ".join(f"{name} {value}" for name, value in (of.get("pixels") or {}).items())
    return {
        "Model": f"{kind} on {of['model']}",
        "Backbone started from": f"{start}{', frozen' if of.get('frozen') else ''}",
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
    """The run in one line."""
    facts, of = _facts_of_transfer(run), run.settings
    epochs = len(run.rows) and max(run.rows) + 1
    images = f"{of['num_images']:,} images, {of['num_validation']:,} to validate"
    return f"{facts['Model']}, on {facts['Data']}: {images}; {epochs} epochs"


def _numbers_of(measures: dict[str, str]) -> Callable[[RunRecord], dict[str, str]]:
    """The function for these measures `{name: column of summary.csv}`."""

    def numbers(run: RunRecord) -> dict[str, str]:
        found = {"Loss": last_of(run, "train_loss", "{:.4f}")}
        for name, column in measures.items():
            values = run.column(column)
            found[name] = f"{100 * values[max(values)]:.1f} %" if values else ""
        return {**found, **cost_of(run)}

    return numbers


def _findings_of(names: dict[str, str]) -> Callable[[RunRecord], list[str]]:
    """The function for these measures `{name: column of summary.csv}`."""

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
    """Charts of the loss and of each of its terms."""
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
    "Validation images: ground truth on the left, detections with a score of at least 0.5 on the right.",
    "Ground truth on the left and detections on the right, one row per image",
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
    "Validation images: the image, its mask, and the prediction.",
    "Image, mask and prediction, one row per image",
    {"train_loss": ("loss", "{:.4f}"), **{c: (n, "{:.1%}") for n, c in _PIXELS.items()}, **COST},
    _facts_of_transfer,
    _about_transfer,
    _numbers_of(_PIXELS),
    _segmentation_charts,
    _findings_of({"mIoU": "eval_miou"}),
    next_steps_of_transfer,
)


KINDS = {"pretraining": PRETRAINING, "detection": DETECTION, "segmentation": SEGMENTATION}
