"""From which checkpoints a run of pretraining may resume."""

from dataclasses import asdict
from typing import Any

from ..runs.checkpoints import Progress
from ..runs.folder import RunFolder, differences

# A checkpoint fits only a model, and its optimizer's state only an optimizer, with the same of these.
# `pretrained` decides on the licence.
ARCHITECTURE = ("model", "pretrained", "in_chans", "patch_size", "decoder_depth", "decoder_dim", "model_kwargs", "opt")
ARCHITECTURE += ("weights", "holdout")

# A run on a stream that stopped in the middle of an epoch resumes only with the same of these; other runs need the
# same images per update, whichever process takes them.
STREAM_ORDER = ("batch_size", "grad_accum_steps")


def resume_progress(folder: RunFolder, settings: dict[str, Any], world_size: int, num_images: int) -> Progress:
    """The progress that a run begins with: zero, or that of its checkpoint.

    Args:
        folder: Folder of the run.
        settings: Settings of the run that begins.
        world_size: Its processes.
        num_images: Its images.

    Raises:
        ValueError: The checkpoint is of another model, or from the middle of an epoch of other data.
    """
    progress = folder.progress(world_size, num_images)
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
    differs += differences(then, now, ("num_images",))
    if then["stream_workers"] is not None:
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
