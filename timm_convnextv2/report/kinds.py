"""The texts, tables and charts of a report, per task."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..checkpoint.finetuned import all_epochs
from ..console import count
from .next_steps import Step, near, next_steps, next_steps_of_finetuning, next_steps_of_transfer
from .run import RunRecord

BASELINES = {
    "random": "random weights",
    "pixels": "plain pixels",
    "histogram": "histogram of each channel",
    "border": "border only",
}
PLAIN_LOSS = 1.0  # of a prediction of each patch's mean, whose target is normalised
LITTLE = 0.95  # a loss above it says that little was learned


class Verdict(NamedTuple):
    """What a run has shown, in one or two sentences."""

    text: str
    good: bool | None = None  # False: a reason not to use the model; None: nothing was compared


class Chart(NamedTuple):
    """A chart over epochs."""

    title: str  # text above
    columns: dict[str, bool]  # columns of summary.csv; True for a dashed line
    note: str = ""  # explains the lines
    scale: float = 0  # factor of the values, whose axis then begins at 0; 0 for none
    baseline: str = ""  # measure of the probe whose baselines are drawn
    dashed: str = "held out"  # meaning of dashed lines
    solid: str = ""  # the note if no dashed line was measured
    top: float = 0  # the axis reaches at least from 0 to it; 0 for none
    result: bool = False  # what the run is for; the other charts are diagnostics


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The differences between tasks."""

    title: str  # title of the page, before " of RUN"
    model: str = "model"  # subfolder with the exported model
    predictions: str  # explains the images of predictions
    alt: str  # text alternative of such an image, before ", after epoch N"
    measures: dict[str, tuple[str, str]]  # columns of summary.csv with name and format, in the order of the tables
    facts: Callable[[RunRecord], dict[str, str]]  # rows about model, data and training
    charts: tuple[Chart, ...]  # candidates besides terms of the loss and the cost; those without values are left out
    verdict: Callable[[RunRecord], Verdict]
    findings: Callable[[RunRecord], Iterable[str]] = lambda run: ()  # sentences about the numbers
    next_steps: Callable[[dict[str, Any], Path], list[Step]]  # commands for the exported model


# ------------------------------------------------------------------------------------------------------ of every task

COST = {
    "train_images_per_s": ("Images/s", "{:.1f}"),
    "train_data_wait": ("Waiting for data", "{:.0%}"),
    "train_memory_gib": ("Memory, GiB", "{:.2f}"),
    "lr": ("Learning rate", "{:.2e}"),
}
_COST_CHARTS = [
    Chart("Speed, images/s", {"train_images_per_s": False}, scale=1),
    Chart("Waiting for data, % of the time", {"train_data_wait": False}, "More than a few %: add data workers.", 100),
    Chart("Learning rate", {"lr": False}),
]
_LOSS_CHART = Chart(
    "Loss", {"train_loss": False, "eval_loss": True}, "Solid: training. Dashed: held-out images.",
    solid="On the training images.",
)  # fmt: skip


def verdict(run: RunRecord) -> Verdict:
    """What a run has shown, and the warnings that it began with, in lines."""
    text, good = KINDS[run.task].verdict(run)
    return Verdict("\n".join([text, *(f"warning: {warning}" for warning in run.warnings)]), good)


def charts_of(runs: Sequence[RunRecord], kind: Kind) -> list[Chart]:
    """The candidates for charts: the task's own, the terms of the loss, the cost."""
    terms = dict.fromkeys(c for run in runs for row in run.rows.values() for c in row if c.startswith("train_loss_"))
    named = [Chart(f"Loss: {c.removeprefix('train_loss_').replace('_', ' ')}", {c: False}) for c in terms]
    return [*kind.charts, *named, *_COST_CHARTS]


def as_text(value: float, form: str) -> str:
    """A number with a space before its percent sign."""
    return form.format(value).replace("%", " %")


def last_numbers(run: RunRecord, measures: dict[str, tuple[str, str]]) -> dict[str, str]:
    """The latest value of each measure, and the cost of the run."""
    rows, progress = run.rows.values(), run.progress
    seconds = sum(row.get("train_seconds", 0.0) for row in rows)
    speeds, waits, memory = ([*run.column(name).values()] for name in [*COST][:3])
    bad = {"train_bad_images": ("Images that cannot be decoded", "{:.0f}")}
    latest = {
        name: as_text(values[max(values)], form)
        for column, (name, form) in (measures | bad).items()
        if (values := run.column(column))
    }
    minutes = round(seconds / 60)
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
    latest |= {
        "Training time": duration if seconds else "",
        "Speed": f"{median(speeds):.1f} images/s" if speeds else "",
        "Waiting for data": f"{100 * median(waits):.0f} % of the time" if waits else "",
        "Peak memory": f"{max(memory):.2f} GiB" if memory else "",
        "Skipped updates": str(progress["bad_steps"]) if "bad_steps" in progress else "",
    }
    if progress.get("bad_images"):  # of the whole run, not of its last epoch
        latest["Images that cannot be decoded"] = str(len(progress["bad_images"]))
    return latest


def in_one_line(facts: dict[str, str]) -> str:
    """The run in one line."""
    images = f"{facts['Images']}; " if facts["Images"] else ""
    return f"{facts['Model']} on {facts['Data']}: {images}{facts['Epochs']} epochs"


def _facts(run: RunRecord, own: dict[str, str], processes: int) -> dict[str, str]:
    """The rows of one task, and those that all tasks share."""
    of = run.settings
    steps = of.get("grad_accum_steps", 1)
    accum = f" x {steps} steps" if steps > 1 else ""
    return {
        **own,
        "Batch": f"{of['batch_size']}{accum}" + (f" x {processes} processes" if processes > 1 else ""),
        "Device": f"{of.get('device', '')}{', ' + str(of.get('amp_dtype')) if of.get('amp') else ''}",
        "Seed": str(of.get("seed", "")),
        "Versions": run.versions,
        "Folder": str(near(run.path)),
        "Command": run.command,
    }


def _images(settings: dict[str, Any]) -> str:
    """The numbers of images; '' if timm's train.py opened the data itself."""
    numbers = settings.get("num_images"), settings.get("num_validation")
    return "{:,} images, {:,} to validate".format(*numbers) if all(isinstance(n, int) for n in numbers) else ""


def _best(run: RunRecord, name: str, column: str, form: str = "{:.1%}", best: Callable[..., int] = max) -> list[str]:
    """A sentence about the best epoch of a column; nothing if it was not measured."""
    values = run.column(column)
    if not values:
        return []
    at, last = best(values, key=values.__getitem__), max(values)
    since = "" if at == last else f", and is {as_text(values[last], form)} after epoch {last}"
    order = "highest" if best is max else "lowest"
    return [f"{name} was {order} after epoch {at} ({as_text(values[at], form)}){since}."]


# ------------------------------------------------------------------------------------------------------- pretraining


def _facts_of_pretraining(run: RunRecord) -> dict[str, str]:
    of, probe = run.settings, run.probe
    chans, height, width = of["input_size"]
    sources = [of["dataset"], of["data_dir"], of.get("data_list")]
    named = [word for source in sources if source for word in (source if isinstance(source, list) else [source])]
    images = run.progress.get("num_images") or of.get("num_images")
    probed = f"{probe.get('data_dir', '')}: {len(probe.get('classes') or [])} classes, {probe.get('train', '?')} train"
    weights = str(of.get("weights") or "published or given weights") if of["pretrained"] else "random weights"
    decoder = f"decoder {of['decoder_depth']} x {of['decoder_dim']}"
    targets = "targets normalised per patch" if of.get("norm_pix_loss") else "plain pixels"
    own = {
        "Model": of["model"],
        "Started from": weights,
        "Data": "the demo data" if of["dataset"] == "demo" else " ".join(str(near(Path(p))) for p in named),
        "Images": f"{images:,} images" if isinstance(images, int) else "",
        "Input": f"{chans} x {height} x {width}, stem patch {of['patch_size']}",
        "Method": f"FCMAE, mask ratio {of['mask_ratio']:g}, {decoder}, {targets}",
        "Epochs": f"{len(run.rows) and max(run.rows) + 1} of {of['epochs']}",
        "Probe": f"{probed}, {probe.get('test', '?')} test images" if probe else "",
    }
    return _facts(run, own, run.progress.get("world_size", 1))


_PROBED = {"knn": "kNN", "ridge": "ridge"}


def probe_rows(run: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """The newest probe and its baselines: names, and for each measure the value and the run's difference to it."""
    columns = {key: run.column(f"eval_{key}") for key in _PROBED}
    if not all(columns.values()):
        return []
    last = max(columns["knn"])
    latest = run.probe.get("latest") or {}
    against = latest["against"] if latest.get("epoch") == last else {}  # points and paired 95 % intervals
    rows = [(f"this run, epoch {last}", [(f"{of[max(of)]:.1f} %", "") for of in columns.values()])]
    for base, of in run.probe.get("baselines", {}).items():
        cells = [(f"{of[k]:.1f} %" if k in of else "", str(against.get(base, {}).get(k, ""))) for k in columns]
        rows.append((str(BASELINES.get(base, base)), cells))
    return rows


def _verdict_of_pretraining(run: RunRecord) -> Verdict:
    losses = run.column("train_loss")
    if not losses:
        return Verdict("No epoch has a finite loss: the run has diverged.", False)
    first, last = losses[min(losses)], losses[max(losses)]
    little = ""
    if run.settings.get("norm_pix_loss", True) and last > LITTLE:
        little = (
            f"The loss is still {last:.3f}, where predicting the mean of each patch gives {PLAIN_LOSS:g}: raise "
            "--epochs or --lr."
        )
    rows = probe_rows(run)
    if not rows:
        if little:
            return Verdict(f"The encoder has learned little. {little}", False)
        change = f"went from {first:.3f} to {last:.3f} in {len(losses)} epochs"
        if len(losses) == 1:
            change = f"is {last:.3f} after 1 epoch"
        return Verdict(f"The loss {change}, which does not show how good the features are; --probe-dir measures that.")
    (_, own), *bases = rows
    texts, ahead = [], []
    for i, name in enumerate(_PROBED.values()):
        value = own[i][0]
        behind = [f"{base} {cells[i][0]}" for base, cells in bases if cells[i][0] and not _above(value, *cells[i])]
        texts.append(f"{name} {value}" + (f" (not above {' and '.join(behind)})" if behind else ""))
        ahead.append(not behind)
    shown = " and ".join(texts)
    if all(ahead):
        return Verdict(f"The encoder learned: {shown} are above all baselines. {little}".strip(), not little)
    one = "The encoder is ahead of all baselines in one measure of two"
    start = one if any(ahead) else "It is not shown that the encoder learned"
    return Verdict(f"{start}: {shown}. {little}".strip(), False)


def _above(value: str, base: str, difference: str) -> bool:
    """Whether a measure is above a baseline: by the verdict of its interval, or by the numbers if there is none."""
    if difference:
        return difference.endswith(": above")
    return float(value.removesuffix(" %")) > float(base.removesuffix(" %"))


# -------------------------------------------------------------------------------------------------------- finetuning


def _facts_of_finetuning(run: RunRecord) -> dict[str, str]:
    of, get = run.settings, run.settings.get
    started = any(map(get, ("pretrained", "initial_checkpoint", "resume")))
    place = get("data_dir") or get("data") or ""
    own = {
        "Model": of["model"],
        "Started from": "pretrained or given weights" if started else "random weights",
        "Data": " ".join(str(word) for word in (get("dataset"), place) if word),
        "Images": _images(of),
        "Classes": str(get("num_classes") or ""),
        "Input": str(get("input_size") or get("img_size") or ""),
        "Recipe": Path(str(get("config") or "")).name,
        "Epochs": f"{len(run.rows) and max(run.rows) + 1} of {all_epochs(of)}",
        "Optimizer": f"{of['opt']}, weight decay {get('weight_decay')}, layer decay {get('layer_decay')}",
    }
    return _facts(run, own, get("world_size", 1))


# ------------------------------------------------------------------------------------------ detection, segmentation


def _facts_of_transfer(run: RunRecord) -> dict[str, str]:
    of = run.settings
    names = [str(name) for name in of["classes"]]
    kind = "UPerNet" if run.task == "segmentation" else "Faster R-CNN" if of.get("boxes_only") else "Mask R-CNN"
    start = "random weights" if of["from_scratch"] else of["model"]
    own = {
        "Model": f"{kind} on {of['model']}",
        "Backbone started from": f"{start}{', frozen' if of.get('frozen') else ''}",
        "Data": str(near(Path(of["data_dir"]))),
        "Images": _images(of),
        "Classes": f"{len(names)}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}",
        "Input": f"{count(of['in_chans'], 'channel')}, crops of {of['img_size']} x {of['img_size']}",
        "Stored values": ", ".join(f"{name} {value}" for name, value in (of.get("pixels") or {}).items()),
        "Recipe": str(of.get("recipe") or ""),
        "Epochs": str(len(run.rows) and max(run.rows) + 1),
        "Updates": f"{of['total_updates']:,}",
        "Learning rate": f"{of['lr']:g}, layer decay {of.get('layer_decay', 1):g}",
    }
    return _facts(run, own, of["world_size"])


def _verdict_of_transfer(run: RunRecord) -> Verdict:
    found = _findings_of_transfer(run)
    return Verdict(" ".join(found) if found else "Nothing was measured on validation images.")


def _findings_of_transfer(run: RunRecord) -> list[str]:
    main = {"detection": ("eval_box_ap", "eval_mask_ap"), "segmentation": ("eval_miou",), "finetuning": ("eval_top1",)}
    named = _BOXES | _CLASSES | _TOP
    found = [text for column in main[run.task] for text in _best(run, named[column][0], column, named[column][1])]
    weights = "" if run.task == "finetuning" else ", with the weights that are exported"
    chance = run.settings.get("chance") if run.task == "finetuning" else None
    told = [f"Chance, always the most frequent class, is {chance:.1f} %."] if isinstance(chance, int | float) else []
    return [*found, f"It was measured on the validation images{weights}.", *told] if found else []


_LOSS = {"train_loss": ("Loss", "{:.4f}")}
_BOXES = {
    "eval_box_ap": ("Box AP", "{:.1%}"),
    "eval_box_ap50": ("Box AP50", "{:.1%}"),
    "eval_mask_ap": ("Mask AP", "{:.1%}"),
    "eval_mask_ap50": ("Mask AP50", "{:.1%}"),
}
_CLASSES = {
    "eval_miou": ("mIoU", "{:.1%}"),
    "eval_accuracy": ("Accuracy", "{:.1%}"),
    "eval_mean_accuracy": ("Mean accuracy", "{:.1%}"),
}
_TOP = {"eval_top1": ("Top-1", "{:.1f}%"), "eval_top5": ("Top-5", "{:.1f}%")}
_MASKS = "Solid: boxes. Dashed: masks."

KINDS = {
    "pretraining": Kind(
        title="Pretraining",
        model="encoder",
        predictions="The same images with the same masks: the input of the network, and its prediction of the masked "
        "patches. Good predictions do not prove good features.",
        alt="Original, masked input, prediction, and prediction with the visible patches, one row per image",
        measures=_LOSS
        | {
            "eval_loss": ("Held-out loss", "{:.4f}"),
            "eval_knn": ("kNN", "{:.1f}%"),
            "eval_ridge": ("Ridge", "{:.1f}%"),
            "eval_rank": ("RankMe", "{:.1f}"),
            "eval_distance": ("Distance of channels", "{:.3f}"),
            "eval_dead": ("Dead channels", "{:.2%}"),
        },
        facts=_facts_of_pretraining,
        charts=(
            _LOSS_CHART,
            Chart("kNN accuracy, %", {"eval_knn": False}, "Dotted: baselines that need no training.", baseline="knn",
                  result=True),
            Chart("Ridge accuracy, %", {"eval_ridge": False}, "A linear classifier in closed form.", baseline="ridge",
                  result=True),
            Chart("RankMe", {"eval_rank": False}, "Compares runs of one method only.", baseline="rank"),
            Chart("Mean distance of channels", {"eval_distance": False}, "0: collapsed. About 0.5: independent.",
                  top=0.5),
            Chart("Dead channels, %", {"eval_dead": False}, "Channels whose norm is almost zero.", 100),
        ),
        verdict=_verdict_of_pretraining,
        findings=lambda run: _best(run, "The held-out loss", "eval_loss", "{:.4f}", min),
        next_steps=next_steps,
    ),
    "finetuning": Kind(
        title="Finetuning",
        predictions="Validation images of the exported model, with their class and the probability of the prediction.",
        alt="The surest mistakes above, the surest hits below",
        measures=_LOSS | {"eval_loss": ("Validation loss", "{:.4f}")} | _TOP,
        facts=_facts_of_finetuning,
        charts=(
            Chart("Accuracy, %", {"eval_top1": False, "eval_top5": True}, "Solid: top-1. Dashed: top-5.", 1,
                  dashed="top-5", solid="Top-1.", result=True),
            Chart("Loss", {"train_loss": False, "eval_loss": True}, "Solid: training. Dashed: validation images.",
                  dashed="validation", solid="On the training images."),
        ),
        verdict=_verdict_of_transfer,
        next_steps=next_steps_of_finetuning,
    ),
    "detection": Kind(
        title="Detection",
        predictions="Validation images: ground truth on the left, detections with a score of at least 0.5 on the "
        "right.",
        alt="Ground truth on the left and detections on the right, one row per image",
        measures=_LOSS | _BOXES,
        facts=_facts_of_transfer,
        charts=(
            Chart("AP, %", {"eval_box_ap": False, "eval_mask_ap": True}, f"{_MASKS} IoU 0.5 to 0.95.", 100,
                  dashed="masks", solid="Of boxes. IoU 0.5 to 0.95.", result=True),
            Chart("AP at IoU 0.5, %", {"eval_box_ap50": False, "eval_mask_ap50": True}, _MASKS, 100, dashed="masks",
                  solid="Of boxes.", result=True),
            _LOSS_CHART,
        ),
        verdict=_verdict_of_transfer,
        next_steps=next_steps_of_transfer,
    ),
    "segmentation": Kind(
        title="Segmentation",
        predictions="Validation images: the image, its mask, and the prediction.",
        alt="Image, mask and prediction, one row per image",
        measures=_LOSS | _CLASSES,
        facts=_facts_of_transfer,
        charts=(
            Chart("mIoU, %", {"eval_miou": False}, "Mean over the classes that occur.", 100, result=True),
            Chart("Accuracy, %", {"eval_accuracy": False, "eval_mean_accuracy": True},
                  "Solid: of pixels. Dashed: mean over the classes.", 100, dashed="mean over classes",
                  result=True),
            _LOSS_CHART,
        ),
        verdict=_verdict_of_transfer,
        next_steps=next_steps_of_transfer,
    ),
}  # fmt: skip
