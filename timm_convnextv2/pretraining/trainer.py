"""The trainer of FCMAE: its optimizer and schedule, and the channels that are removed from each batch."""

from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from ..models import FCMAE
from ..models.masking import random_channels
from ..models.task import FCMAETask
from ..runs.group import Processes
from ..runs.plan import Plan
from ..runs.trainer import Bad, Learning, Trainer
from ..runs.world import World
from ..seeds import sample_seed
from .config import Optimizer

_STREAM = -1  # in place of a rank, so that no other random numbers are these


def create_trainer(
    model: FCMAE, plan: Plan, world: World, optimizer: Optimizer, learning: Learning, channel_dropout: float = 0.0
) -> Trainer:
    """The trainer of an FCMAE, which moves to the world's device.

    `channel_dropout` is the probability that a channel of an image is removed.
    """
    device = world.device
    task = FCMAETask(model.to(device), device=device, verbose=False)
    fused = optimizer.opt in ("adam", "adamw") and device.type in ("cpu", "cuda")
    options: dict[str, Any] = {"fused": True} if fused else {}
    made: Any = create_optimizer_v2(
        model, opt=optimizer.opt, lr=plan.lr, weight_decay=optimizer.weight_decay, betas=optimizer.opt_betas,
        eps=optimizer.opt_eps, **options,
    )  # fmt: skip
    scheduler = CosineLRScheduler(
        made, t_initial=max(1, plan.updates - plan.warmup_updates), lr_min=optimizer.min_lr,
        warmup_t=plan.warmup_updates, warmup_lr_init=optimizer.warmup_lr, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip

    def prepare(batch: tuple, number: int, step: int) -> tuple[tuple, Bad]:
        images, masks, bad = batch
        place = Place(learning.seed, number, step, learning.grad_accum_steps)
        channels = removed_channels(channel_dropout, len(images), model.in_chans, place, world)
        channels = None if channels is None else channels.to(device, non_blocking=True)
        return (images.to(device, non_blocking=True), masks, channels), bad

    return Trainer(task, made, scheduler, world, learning, prepare)


class Place(NamedTuple):
    """The place of a batch in a run."""

    seed: int  # of the run
    number: int  # updates of the run before that of the batch
    step: int  # batch of the update, from 0
    steps: int  # batches of the update


def removed_channels(p: float, batch_size: int, in_chans: int, place: Place, group: Processes) -> torch.Tensor | None:
    """The channels that are removed from a batch with probability `p`, bool `[batch_size, in_chans]`, True = removed.

    They depend on the seed, the update and each image's place in it: N processes, and any number of steps, remove the
    same from the images of an update as one batch of all would. None if `p` is 0.
    """
    if not p:
        return None
    generator = torch.Generator().manual_seed(sample_seed(place.seed, place.number, _STREAM))
    step = batch_size * group.size  # images that the processes take in turn
    everywhere = random_channels(place.steps * step, in_chans, p, generator)
    return everywhere[place.step * step :][group.rank :: group.size][:batch_size]


def check_compile_backend(name: str | None) -> None:
    """Raises a `ValueError` for a backend that torch.compile does not have."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name and name not in known:
        raise ValueError(f"--torchcompile {name} is no backend of torch.compile; choose from {', '.join(known)}.")
