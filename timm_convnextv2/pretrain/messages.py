"""What a run says in words: what it is, how its weights were made, and the commands that come next."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..console import invocation
from ..data.paths.places import as_list
from ..models import FCMAE
from ..runs import summary
from ..runs.end import VERSIONS
from ..runs.world import World
from .checkpoints import Progress
from .config import Average
from .plan import Plan
from .start import short_name

MOSTLY_START = 0.05  # a larger share of the start in a moving average is warned about


def about_run(name: str, model: FCMAE, plan: Plan, num_images: int, world: World) -> str:
    """Model, data and length, in one line."""
    (height, width), chans = model.img_size, model.in_chans
    h, w = model.grid(height, width)
    return (
        f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f}M of them the encoder; "
        f"{num_images} images of {chans} x {height} x {width} in {h} x {w} patches of {model.stride} px; "
        f"{plan.updates} updates of {plan.images_per_update} images, lr {plan.lr:.2e}, "
        f"on {world.size} x {world.device.type}"
    )


def memory_line(fixed: float, step: float, batch_size: int) -> str:
    """The estimate of `memory.memory_estimate`, both parts in GiB."""
    return (
        f"Memory per process: about {fixed + step:.2f} GiB, {fixed:.2f} for weights, gradients and AdamW, {step:.2f} "
        f"for a step of {batch_size} images; data workers take their own."
    )


def ema_warnings(average: Average, updates: int) -> list[str]:
    """A warning if the moving average is longer than the run."""
    decay = average.model_ema_decay
    start = decay**updates if average.model_ema and not average.model_ema_warmup else 0.0
    if start <= MOSTLY_START:
        return []
    fits = 1 - 0.01 ** (1 / updates)
    return [
        f"{start:.0%} of the moving average, which is what is exported, would be the weights of the start: "
        f"--model-ema-decay {decay} is too slow for {updates} updates without warmup. Add --model-ema-warmup, or "
        f"lower the decay to {1 - float(f'{fits:.2g}'):g}."
    ]


def how_made(settings: dict[str, Any], progress: Progress, plan: Plan) -> dict[str, str]:
    """How the weights were made, for the README of the export."""
    dataset = settings["dataset"]
    data = dataset if dataset != "embedded" else "the embedded data set of timm_convnextv2"
    pixels = "pixels normalised per patch" if settings["norm_pix_loss"] else "plain pixels"
    name, grn = settings["model"], settings["model_kwargs"].get("use_grn", True)
    fewer = settings.get("channel_dropout")
    weights = Path(settings["weights"]).name if settings["weights"] else "the published encoder"
    started = {"Started from": short_name(name) if ":" in name else weights}
    return {
        "Method": f"FCMAE, mask ratio {settings['mask_ratio']}, decoder {settings['decoder_depth']} x "
        f"{settings['decoder_dim']}, {pixels}"
        + ("" if grn else "; blocks without GRN")
        + (f"; channels removed with probability {fewer:g}" if fewer else ""),
        **(started if settings["pretrained"] else {}),
        "Data": f"{data or names_of_places(settings)}, {progress.num_images} images",
        "Epochs": f"{progress.epoch} of {plan.epochs}" + (" and a part of the next" if progress.update else ""),
        "Optimizer": f"{settings['opt']}, lr {plan.lr:.2e} for {plan.images_per_update} images per update, weight "
        f"decay {settings['weight_decay']}, betas {tuple(settings['opt_betas'])}",
        "Weights": f"moving average ({settings['model_ema_decay']})" if settings["model_ema"] else "last",
        "Seed": str(settings["seed"]),
        "Made with": VERSIONS,
    }


def names_of_places(settings: dict[str, Any]) -> str:
    """What the folders or lists of the images are called, without where they are."""
    places = as_list(settings["data_list"]) or as_list(settings["data_dir"])
    return ", ".join(Path(place).resolve().name for place in places)


def how_measured(folder: Path) -> dict[str, str]:
    """What was measured in a run so far, for the README of the export: of summary.csv and probe.json."""
    found, about = summary.latest(folder / "summary.csv"), {}
    if "loss" in found:
        epoch, loss = found["loss"]
        about["Held-out loss"] = f"{loss:.4f} (epoch {epoch})"
    if "knn" in found and (folder / "probe.json").is_file():
        probe = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
        values = {"": {name: found[name][1] for name in ("knn", "ridge")}}
        values |= {"random weights ": probe["baselines"]["random"], "8 x 8 pixels ": probe["baselines"]["pixels"]}
        about["Frozen features"] = (
            "; ".join(f"{who}{probe['k']}-NN {v['knn']:.1f} %, ridge {v['ridge']:.1f} %" for who, v in values.items())
            + f" ({probe['unit']} on {probe['test']} images of {len(probe['classes'])} classes in "
            f"{Path(probe['data_dir']).name}, epoch {found['knn'][0]})"
        )
    return about


def start_command(words: list[str] | None = None) -> str:
    """The command that starts a run as this process does, ready to paste.

    Args:
        words: Its options; those of the process if None.
    """
    return shlex.join([*invocation("pretrain", distributed=True), *(_own_words() if words is None else words)])


def _own_words() -> list[str]:
    """The options of this process."""
    if sys.argv[1:2] == ["pretrain"] and Path(sys.argv[0]).name != "pretrain.py":  # of the console command
        return sys.argv[2:]
    return sys.argv[1:]


def resume_command(experiment: str) -> str:
    """The command that resumes this run."""
    words, skip = [], False
    for word in _own_words():
        if skip or word == "--overwrite":
            skip = False
        elif word in ("--resume", "--experiment"):
            skip = True
        elif not word.startswith(("--resume=", "--experiment=")):
            words.append(word)
    return start_command([*words, "--experiment", experiment, "--resume", "auto"])


def resume_hint(experiment: str) -> str:
    """How a run resumes that an error has ended."""
    return f"The last checkpoint is whole; where the run had saved one, resume with\n  {resume_command(experiment)}"


def not_finite(error: Exception, max_bad_steps: int, record: str) -> str:
    """What to tell of a loss that ended the run.

    Args:
        error: Says what it is.
        max_bad_steps: Updates that were allowed to be skipped.
        record: Where what repeats its forward was written, or why it was not.
    """
    skipped = f" More than --max-bad-steps {max_bad_steps} updates were like that." if max_bad_steps else ""
    again = shlex.join([*invocation("pretrain"), "--replay", record])
    return (
        f"timm-convnextv2 pretrain: {error}{skipped} The update was not made and the last checkpoint is whole. Usual "
        "remedies, then --resume auto: --amp-dtype bfloat16 or no --amp, --clip-grad 1, a lower --lr-base; or skip "
        f"such updates: --max-bad-steps N. To find where it begins:\n  {again}"
    )


def stopped(progress: Progress, plan: Plan, reason: str, max_bad_images: float, experiment: str) -> str:
    """Where and why a run stopped before its end, and how it resumes.

    Args:
        progress: Where it stopped.
        plan: Of the run.
        reason: The signal, or 'images' where too many cannot be decoded.
        max_bad_images: Their largest share.
        experiment: Name of the run.
    """
    where = f"in epoch {progress.epoch + 1} of {plan.epochs}, update {progress.update} of {plan.updates_per_epoch}"
    if not progress.update:
        where = f"after epoch {progress.epoch} of {plan.epochs}"
    resume = resume_command(experiment)
    if reason != "images":
        return f"Stopped by {reason} {where}; everything is saved. Resume with\n  {resume}"
    names = "\n".join(f"  {why}" for why in progress.bad_images.values())
    return (
        f"Stopped {where}, everything saved: {len(progress.bad_images)} of {progress.num_images} images cannot be "
        f"decoded, more than --max-bad-images {max_bad_images:g}:\n{names}\nMend or remove them or raise the limit, "
        f"then resume with\n  {resume}"
    )
