"""Texts about a run: what it is, and how its weights were made and measured."""

import os
from pathlib import Path
from typing import Any

from ..checkpoint.loading import WINDOWS
from ..config import read_json, usable_cores
from ..console import count, duration
from ..data.config import as_list
from ..data.formats.files import printable
from ..models import FCMAE
from ..models.memory import memory_estimate
from ..report.kinds import BASELINES
from ..runs import summary
from ..runs.checkpoints import Progress
from ..runs.folder import VERSIONS
from ..runs.plan import FEW_UPDATES, Plan
from ..runs.world import World
from .config import Average, Schedule
from .plan import MIN_UPDATES, scaled_rate, usual_epochs
from .start import short_name

LOW_RATE = 1e-5  # 192 updates of 16 drawn images: loss 0.77 at 9.4e-6, 0.38 at 1e-4, 0.35 at 1e-3
FEW_IMAGES = 1000
MOSTLY_START = 0.05  # a larger share of the start in a moving average is warned about


def about_run(name: str, model: FCMAE, plan: Plan, num_images: int, world: World) -> str:
    """Model, data and length, in one line."""
    (height, width), chans = model.img_size, model.in_chans
    h, w = model.grid(height, width)
    whole, encoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder))
    return (
        f"{name}: {whole:.1f}M parameters, {encoder:.1f}M of them the encoder; "
        f"{count(num_images, 'image')} of {chans} x {height} x {width} in {h} x {w} patches of {model.stride} px; "
        f"{count(plan.updates, 'update')} of {count(plan.images_per_update, 'image')}, lr {plan.lr:.2e}, "
        f"on {world.size} x {world.device.type}"
    )


def memory_line(model: FCMAE, batch_size: int, **options: Any) -> str:
    """The memory of a step in GiB; `options` are those of `memory_estimate`."""
    fixed, step = memory_estimate(model, batch_size, **options)
    return (
        f"Memory per process: about {fixed + step:.2f} GiB, {fixed:.2f} for weights, gradients and AdamW, {step:.2f} "
        f"for a step of {count(batch_size, 'image')}; data workers take their own."
    )


def time_line(seconds: float, updates: int) -> str:
    """How long so many updates take, at `seconds` each."""
    return (
        f"Time: about {duration(seconds * updates)} for {updates:,} updates ({seconds:.3g} s each, measured), if the "
        "data keep up; probes and pictures take their own."
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


def learning_warnings(plan: Plan, started: bool) -> list[str]:
    """Warnings about a run that cannot learn, with values to paste; none if it continues from weights (`started`)."""
    found, images = [], plan.images_per_update
    if started:
        return found
    if plan.updates < FEW_UPDATES:
        epochs = usual_epochs(plan.updates_per_epoch)
        found.append(
            f"{count(plan.updates, 'update')} {'is' if plan.updates == 1 else 'are'} too few to learn features: a run "
            f"of {MIN_UPDATES:,} is --epochs {epochs}."
            + (" A smaller --batch-size makes more updates of an epoch." if images > 16 else "")
        )
    if plan.lr < LOW_RATE:
        usual = scaled_rate(Schedule(), images)
        found.append(
            f"a peak learning rate of {plan.lr:.1e} hardly moves the weights; the usual one for {images} images per "
            f"update is --lr {usual:.1e}."
        )
    return found


def few_images(images: int, probed: bool, started: bool) -> str:
    """A line about a small set of images that starts from random weights and that no probe measures, or ''."""
    if images >= FEW_IMAGES or probed or started:
        return ""
    return (
        f"{count(images, 'image')} {'is' if images == 1 else 'are'} few: --probe-dir LABELLED shows whether the "
        "features beat those of random weights, and --pretrained starts from published weights"
    )


def worker_warnings(workers: int, world_size: int) -> list[str]:
    """A warning if data workers and training share too few cores; `workers` are those of each process."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    cores = usable_cores()
    if workers * here <= cores:
        return []
    return [
        f"{workers * here} data workers share {cores} core{'s' * (cores > 1)} with the training, which slows both: "
        f"--workers {max(0, cores // here - 1)}."
    ]


def how_made(settings: dict[str, Any], progress: Progress, plan: Plan) -> dict[str, str]:
    """How the weights were made, for the README of the export."""
    places = as_list(settings["data_list"]) or as_list(settings["data_dir"])
    names = ", ".join(printable(Path(place).resolve().name) for place in places)  # without the folders above
    data = "the demo data of timm_convnextv2" if settings["dataset"] == "demo" else settings["dataset"] or names
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
        "Data": f"{data}, {progress.num_images} images",
        **({WINDOWS: f"{settings['window_size']} px"} if settings.get("window_size") else {}),
        "Epochs": f"{progress.epoch} of {plan.epochs}" + (" and a part of the next" if progress.update else ""),
        "Optimizer": f"{settings['opt']}, lr {plan.lr:.2e} for {plan.images_per_update} images per update, weight "
        f"decay {settings['weight_decay']}, betas {tuple(settings['opt_betas'])}",
        "Weights": f"moving average ({settings['model_ema_decay']})" if settings["model_ema"] else "last",
        "Seed": str(settings["seed"]),
        "Made with": VERSIONS,
    }


def outcome(folder: Path) -> str:
    """The last kNN beside every baseline of probe.json, in one line; '' without a probe."""
    found = summary.latest(folder / "summary.csv").get("knn")
    if found is None or not (folder / "probe.json").is_file():
        return ""
    probe = read_json(folder / "probe.json")
    others = {BASELINES.get(name, name): of["knn"] for name, of in probe["baselines"].items() if "knn" in of}
    sides = ", ".join(f"{name} {value:.3g} %" for name, value in {**others, "chance": probe["chance"]}.items())
    unit = "" if probe["unit"] == "accuracy" else f", {probe['unit']}"
    return f"kNN of frozen features{unit}: {found[1]:.3g} % ({sides})"


def how_measured(folder: Path) -> dict[str, str]:
    """What was measured in a run so far, for the README of the export: of summary.csv and probe.json."""
    found, about = summary.latest(folder / "summary.csv"), {}
    if "loss" in found:
        epoch, loss = found["loss"]
        about["Held-out loss"] = f"{loss:.4f} (epoch {epoch})"
    if "knn" in found and (folder / "probe.json").is_file():
        probe = read_json(folder / "probe.json")
        values = {"": {name: found[name][1] for name in ("knn", "ridge")}}
        values |= {f"{'random weights' if base == 'random' else base} ": of for base, of in probe["baselines"].items()}
        about["Frozen features"] = (
            "; ".join(f"{who}{probe['k']}-NN {v['knn']:.1f} %, ridge {v['ridge']:.1f} %" for who, v in values.items())
            + f" ({probe['unit']} on {probe['test']} images of {len(probe['classes'])} classes in "
            f"{Path(probe['data_dir']).name}, epoch {found['knn'][0]})"
        )
    return about
