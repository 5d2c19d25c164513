"""The trainer of FCMAE: its optimizer and schedule, and the channels that are removed from each batch."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from ..models import FCMAE
from ..models.masking import random_channels
from ..models.task import FCMAETask
from ..runs.plan import Plan
from ..runs.trainer import Bad, Learning, Trainer
from ..runs.world import World
from ..seeds import sample_seed
from .config import Optimizer

_STREAM = -1  # in place of a rank, so that no other random numbers are these


def create_trainer(
    model: FCMAE,
    plan: Plan,
    world: World,
    optimizer: Optimizer,
    learning: Learning,
    channel_dropout: float = 0.0,
) -> Trainer:
    """The trainer of an FCMAE.

    Args:
        model: On any device; it moves to the world's.
        plan: Length and learning rate of the run.
        world: The processes that train together.
        optimizer: The optimizer and its schedule.
        learning: How updates are made.
        channel_dropout: Probability that a channel of an image is removed.
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
        channels = removed_channels(
            channel_dropout, len(images), model.in_chans, Place(learning.seed, number, step, learning.grad_accum_steps),
            world.rank, world.size,
        )  # fmt: skip
        channels = None if channels is None else channels.to(device, non_blocking=True)
        return (images.to(device, non_blocking=True), masks, channels), bad

    return Trainer(task, made, scheduler, world, learning, prepare)


@dataclass(frozen=True)
class Place:
    """The place of a batch in a run.

    Attributes:
        seed: Seed of the run.
        number: Updates of the run before that of the batch.
        step: Batch of the update, from 0.
        steps: Batches of the update.
    """

    seed: int
    number: int
    step: int
    steps: int


def removed_channels(
    p: float, batch_size: int, in_chans: int, place: Place, rank: int, size: int
) -> torch.Tensor | None:
    """The channels that are removed from a batch; they depend on the seed, the update and each image's place in it.

    N processes, and any number of steps, remove the same from the images of an update as one batch of all would.

    Args:
        p: Probability of each channel.
        batch_size: Images `B` of the batch.
        in_chans: Channels `C`.
        place: Where the batch is in the run.
        rank: Rank of this process.
        size: Number of processes, which take the images of a step in turn.

    Returns:
        Bool `[B, C]`, True = removed; None if `p` is 0.
    """
    if not p:
        return None
    generator = torch.Generator().manual_seed(sample_seed(place.seed, place.number, _STREAM))
    everywhere = random_channels(place.steps * batch_size * size, in_chans, p, generator)
    return everywhere[place.step * batch_size * size :][rank::size][:batch_size]


def check_compile_backend(name: str | None) -> None:
    """Raises a `ValueError` for a backend that torch.compile does not have."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name and name not in known:
        raise ValueError(f"--torchcompile {name} is no backend of torch.compile; choose from {', '.join(known)}.")
