"""What a report says of a run of pretraining."""

from collections.abc import Sequence

from .kind import COST, COST_CHARTS, Chart, Kind, batch_of, cost_of, device_of, last_of
from .next_steps import next_steps
from .run import RunRecord

__all__ = ["BASELINES", "PRETRAINING"]

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
    """What was trained on what."""
    of, progress = run.settings, run.progress
    chans, height, width = of["input_size"]
    places = [of["dataset"], of["data_dir"], of.get("data_list")]
    named = [word for place in places if place for word in (place if isinstance(place, list) else [place])]
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
    """The run in a line."""
    facts = _facts(run)
    images = f"{facts['Images']} images" if facts["Images"] else "images"
    size = " x ".join(map(str, run.settings["input_size"]))
    return f"{facts['Model']} on {facts['Data']}, {images} of {size}, {facts['Epochs']} epochs"


def _numbers(run: RunRecord) -> dict[str, str]:
    """How it went, in the last numbers that were measured."""
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
        Chart("Dead channels, %", {"eval_dead": False}, "Channels whose norm is next to nothing.", 100),
        *COST_CHARTS,
    ]


def _findings(run: RunRecord) -> list[str]:
    """What the numbers say, in sentences."""
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
    "The same images with the same masks: what the network saw, and what it predicts of the rest. Good predictions "
    "do not prove good features.",
    "Original, masked input, prediction, and prediction with the visible patches, a row an image",
    _COLUMNS,
    _facts,
    _about,
    _numbers,
    _charts,
    _findings,
    next_steps,
)
