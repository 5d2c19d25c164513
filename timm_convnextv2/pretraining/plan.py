"""Length and learning rate of a run, and from which checkpoints it may resume."""

import math
from dataclasses import asdict, replace
from typing import Any

from ..console import count
from ..runs.checkpoints import Progress
from ..runs.folder import RunFolder, differences
from ..runs.plan import Plan
from .batches import Batches
from .config import Schedule

# A checkpoint fits only a model, and its optimizer's state only an optimizer, with the same of these.
# `pretrained` decides on the licence.
ARCHITECTURE = ("model", "pretrained", "in_chans", "patch_size", "decoder_depth", "decoder_dim", "model_kwargs", "opt")
ARCHITECTURE += ("weights", "holdout")

# A run on a stream that stopped in the middle of an epoch resumes only with the same of these; other runs need the
# same images per update, whichever process takes them.
STREAM_ORDER = ("batch_size", "grad_accum_steps")

PAPER_EPOCHS, PAPER_UPDATES = 800, 250_000  # ImageNet-1K, 4096 images per update
MIN_UPDATES = 7_500


def make_plan(schedule: Schedule, batches_per_epoch: int, num_images: int, world_size: int) -> Plan:
    """Counts updates and scales the learning rate with the images of an update.

    Refuses a data set that is too small for one update. `batches_per_epoch` counts those of one process.
    """
    assert schedule.epochs is not None
    batch, steps = schedule.batch_size, schedule.grad_accum_steps
    images, updates = batch * steps * world_size, batches_per_epoch // steps
    if not updates:
        raise ValueError(
            f"An update takes {count(images, 'image')} ({batch} x {count(steps, 'step')} x "
            f"{count(world_size, 'process')}), but the data set has {num_images}. Lower --grad-accum-steps or "
            "--batch-size."
        )
    lr = schedule.lr if schedule.lr is not None else scaled_rate(schedule, images)
    return Plan(schedule.epochs * updates, updates, images, lr, round((schedule.warmup_epochs or 0) * updates))


def scaled_rate(schedule: Schedule, images: int) -> float:
    """The learning rate for `images` per update, which --lr-base is scaled to."""
    ratio = images / schedule.lr_base_size
    return schedule.lr_base * (math.sqrt(ratio) if schedule.lr_base_scale == "sqrt" else ratio)  # as timm's train.py


def usual_epochs(updates_per_epoch: int) -> int:
    """The paper's 800 epochs; more if these are few updates, fewer if they are more than the paper's 250,000."""
    updates = max(1, updates_per_epoch)
    return max(math.ceil(MIN_UPDATES / updates), min(PAPER_EPOCHS, PAPER_UPDATES // updates))


def split_batch(global_batch_size: int, most: int, world_size: int) -> tuple[int, int]:
    """Splits the images of an update into the fewest equal steps with at most `most` images per process.

    Refuses steps of less than half of `most`. Returns the images per process and step, and the steps per update.
    """
    each, rest = divmod(global_batch_size, world_size)
    steps = next((n for n in range(-(-each // most), each + 1) if n and not each % n), 0) if not rest else 0
    if not steps or each // steps < min(each, (most + 1) // 2):
        step = most * world_size
        near = sorted({max(1, global_batch_size // step) * step, -(-global_batch_size // step) * step})
        raise ValueError(
            f"--global-batch-size {global_batch_size} cannot be split between {world_size} "
            f"process{'es' * (world_size != 1)} in equal batches of about --batch-size {most}. Choose "
            f"{' or '.join(map(str, near))}, another --batch-size, or another number of processes."
        )
    return each // steps, steps


def resume_progress(folder: RunFolder, settings: dict[str, Any], batches: Batches, world_size: int) -> Progress:
    """The progress that a run of these settings begins with: zero, or that of its checkpoint.

    Refuses a checkpoint of another model, or from the middle of an epoch of other data.
    """
    progress = folder.progress(world_size, batches.num_images)
    progress = replace(progress, stream_workers=batches.stream_workers)
    if folder.checkpoint is None:
        return progress
    before, then, now = folder.checkpoint.settings, asdict(folder.checkpoint.progress), asdict(progress)
    differs = differences(before, settings, ARCHITECTURE)
    if settings["holdout"]:  # else images that were trained on would be held out
        differs += differences(before, settings, ("seed",)) + differences(then, now, ("num_images",))
    if differs:
        folder.refuse(differs)
    path = folder.checkpoint.path
    if settings["model_ema"] and folder.checkpoint.state.state_dict_ema is None:
        raise ValueError(f"Cannot resume from {path} with --model-ema: that run kept no moving average.")
    differs = differences(before, settings, ("seed", "source_weights"))
    differs += differences(then, now, ("num_images", "stream_workers"))
    if batches.stream_workers is not None:
        differs += differences(before, settings, STREAM_ORDER) + differences(then, now, ("world_size",))
    there, here = (
        s["batch_size"] * s["grad_accum_steps"] * p["world_size"] for s, p in ((before, then), (settings, now))
    )
    if there != here:
        differs.append(f"images per update: {there} there, {here} here")
    if differs and then["update"]:
        raise ValueError(
            f"Cannot resume from {path}: it was saved in the middle of an epoch, and the order of the images differs "
            f"in {'; '.join(differs)}. Resume with the same settings, or from a milestone checkpoint."
        )
    return progress
