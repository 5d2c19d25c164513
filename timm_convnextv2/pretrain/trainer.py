"""`Trainer`: one update of FCMAE, and all that has state in it: optimizer, schedule, scaler, moving average, DDP."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model

from ..data import sample_seed
from ..models import FCMAE
from ..models.masking import random_channels
from ..models.task import FCMAETask
from ..runs.end import NotFiniteError
from ..runs.world import World
from .batches import Bad
from .plan import Plan

_STREAM = -1  # in the place of a process, so that no other random numbers are these


def removed_channels(
    p: float, in_chans: int, seed: int, number: int, step: int, steps: int, batch_size: int, rank: int, size: int
) -> torch.Tensor | None:
    """The channels that are removed from a batch: a function of the seed, the update and the place of each image in it.

    N processes, and any number of steps, remove the same from the images of an update as one batch of all would.

    Args:
        p: Probability of each channel.
        in_chans: Channels `C`.
        seed: Of the run.
        number: Updates of the run before this one.
        step: Batch of the update, from 0.
        steps: Batches of the update.
        batch_size: Images `B` of the batch.
        rank: Of this process.
        size: Number of processes, which take the images of a step in turn.

    Returns:
        Bool `[B, C]`, True = removed; None where `p` is 0.
    """
    if not p:
        return None
    generator = torch.Generator().manual_seed(sample_seed(seed, number, _STREAM))
    everywhere = random_channels(steps * batch_size * size, in_chans, p, generator)
    return everywhere[step * batch_size * size :][rank::size][:batch_size]


def check_compile_backend(name: str | None) -> None:
    """Raises a `ValueError` for a backend that torch.compile does not have."""
    known = torch.compiler.list_backends(exclude_tags=())
    if name and name not in known:
        raise ValueError(f"--torchcompile {name} is no backend of torch.compile; there are: {', '.join(known)}.")


class Trainer:
    """Trains an FCMAE, an update at a time.

    Args:
        model: On any device; it moves to the world's.
        plan: Of the run.
        world: The processes that train together.
        seed: Of what is random in an update, beside its data: drop path.
        grad_accum_steps: Batches per update.
        opt: An optimizer of timm, with `betas`, `eps` and `weight_decay` (none on vectors).
        betas: See there.
        eps: See there.
        weight_decay: See there.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start.
        clip_grad: Largest norm of the gradient; None clips nothing.
        amp_dtype: Type of mixed precision, None for float32.
        ema_decay: Of a moving average of the weights; None keeps none.
        ema_warmup: Start with a shorter average.
        channel_dropout: Probability that a channel of an image is removed.
        skip_bad: Leave out an update whose loss is not finite, in place of raising an error; each one is waited for.

    Attributes:
        model: The FCMAE, whatever wraps it.
        loss: The last update's, over all processes, on the device: reading it waits for the device.
        loss_sum: Sum over the updates of this epoch that were not skipped, likewise, in float64.
        skipped: Number of updates of this epoch that were skipped.
        bad_step: Of the last update, where it was skipped; else None.
        mean_loss: Mean of the last complete epoch.
    """

    def __init__(
        self,
        model: FCMAE,
        plan: Plan,
        world: World,
        *,
        seed: int = 0,
        grad_accum_steps: int = 1,
        opt: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        clip_grad: float | None = None,
        amp_dtype: torch.dtype | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        channel_dropout: float = 0.0,
        skip_bad: bool = False,
    ) -> None:
        self.world, self.device, self.seed = world, world.device, seed
        self.grad_accum_steps, self.clip_grad, self.amp_dtype = grad_accum_steps, clip_grad, amp_dtype
        self.channel_dropout, self.in_chans = channel_dropout, model.in_chans
        self.task = FCMAETask(model.to(self.device), device=self.device, verbose=False)
        fused: Any = {"fused": True} if opt in ("adam", "adamw") and self.device.type in ("cpu", "cuda") else {}
        self.optimizer: Any = create_optimizer_v2(
            model, opt=opt, lr=plan.lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps,
            **fused,
        )  # fmt: skip
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=max(1, plan.updates - plan.warmup_updates), lr_min=min_lr,
            warmup_t=plan.warmup_updates, warmup_lr_init=warmup_lr, warmup_prefix=True, t_in_epochs=False,
        )  # fmt: skip
        self.scaler = NativeScaler(self.device.type) if amp_dtype == torch.float16 else None
        if ema_decay is not None:
            self.task.setup_ema(decay=ema_decay, use_warmup=ema_warmup)
        # A fused optimizer on a GPU leaves the weights alone by itself where the loss is not finite, as GradScaler
        # makes it do: then the host need not wait for the loss.
        groups = self.optimizer.param_groups
        fused = self.device.type == "cuda" and self.scaler is None and all(g.get("fused") for g in groups)
        self.late, self.skip_bad = fused and not skip_bad, skip_bad
        place = self.device if self.device.type == "cuda" else "cpu"  # other devices may have no float64
        self.loss = torch.zeros((), dtype=torch.float64, device=place)
        self.loss_sum = torch.zeros_like(self.loss)
        self.mean_loss = float("nan")
        self.skipped, self.bad_step = 0, None
        self._unread: list[tuple[int, torch.Tensor]] = []  # number and loss of updates that the host has not looked at

    def wrap(self, compile_backend: str | None = None) -> None:
        """Compiles the model and wraps it in DDP, after its weights were loaded."""
        if compile_backend:
            self.task.compile(backend=compile_backend)
        if self.world.distributed:
            self.task.prepare_distributed(device_ids=[self.device] if self.device.type == "cuda" else None)
        self.task.train()

    @property
    def model(self) -> FCMAE:
        """The FCMAE, whatever wraps it."""
        return unwrap_model(self.task.trainable_module)

    @property
    def exported(self) -> FCMAE:
        """The FCMAE whose encoder an export writes: the moving average where there is one."""
        average: Any = self.task.get_trainable_module(ema=True)
        return self.model if average is None else average.module

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, batches: Iterator, number: int) -> tuple[Bad, float]:
        """One optimizer update: forward and backward of `grad_accum_steps` batches, then the step.

        Args:
            batches: Yields `(images, masks, bad)`.
            number: Updates of the run before this one: learning rate, drop path and moving average follow from it.

        Returns:
            Images of this process that could not be decoded; seconds spent waiting for data.

        Raises:
            NotFiniteError: The loss is not finite, on some process; the weights are those of before.
        """
        self.scheduler.step_update(number)
        torch.manual_seed(sample_seed(self.seed, number, self.world.rank))
        self.optimizer.zero_grad()
        self.bad_step = None
        total, bad, waited = torch.zeros_like(self.loss), [], 0.0
        for step in range(self.grad_accum_steps):
            start = time.perf_counter()
            images, masks, failed = next(batches)
            waited += time.perf_counter() - start
            bad += failed
            last = step + 1 == self.grad_accum_steps
            with contextlib.nullcontext() if last else self.task.no_sync():
                seat = (self.world.rank, self.world.size)
                removed = removed_channels(
                    self.channel_dropout,
                    self.in_chans,
                    self.seed,
                    number,
                    step,
                    self.grad_accum_steps,
                    len(images),
                    *seat,
                )
                loss = self._forward(images, masks, removed)
                total = total + loss.detach().to(total.device, torch.float64)
                if last and not self._note(total, number):
                    return bad, waited
                self._backward(loss, last)
        self.task.update_ema(step=number)
        return bad, waited

    def _forward(self, images: torch.Tensor, masks: torch.Tensor, channels: torch.Tensor | None) -> torch.Tensor:
        images = images.to(self.device, non_blocking=True)
        channels = None if channels is None else channels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.task(images, masks, channels)["loss"] / self.grad_accum_steps

    def _note(self, total: torch.Tensor, number: int) -> bool:
        """Keeps the loss; whether the update is made.

        This is the one place where a loss that is not finite stops an update, on all processes.
        """
        self.loss = self.world.mean(total)
        if self.skip_bad and not torch.isfinite(self.loss):
            self.skipped, self.bad_step = self.skipped + 1, NotFiniteError(number, float(self.loss))
            return False
        self.loss_sum = self.loss_sum + self.loss
        self._unread.append((number, self.loss))
        if not self.late:
            self.check_finite()
            return True
        # what GradScaler sets; here it stays: nothing is learnt between a loss and the host's reading it
        failed = (~torch.isfinite(self.loss)).float()
        self.optimizer.found_inf = torch.maximum(failed, getattr(self.optimizer, "found_inf", failed))
        return True

    def check_finite(self) -> None:
        """Raises `NotFiniteError` for the first loss since the last call that is not finite; waits for the device."""
        unread, self._unread = self._unread, []
        if torch.isfinite(self.loss_sum):
            return
        for number, loss in unread:
            if not torch.isfinite(loss):
                raise NotFiniteError(number, float(loss))
        raise NotFiniteError(unread[-1][0] if unread else 0, float(self.loss_sum))

    def end_epoch(self, updates: int) -> float:
        """The mean loss of an epoch of so many updates, without the skipped ones; the next epoch begins.

        Waits for the device. NaN where all were skipped.
        """
        self.check_finite()
        made = updates - self.skipped
        self.mean_loss = float(self.loss_sum) / made if made else float("nan")
        self.loss_sum, self.skipped = torch.zeros_like(self.loss_sum), 0
        return self.mean_loss

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        """The backward of a batch, after the last one the step."""
        if self.scaler is not None:
            parameters = self.task.get_clip_parameters()
            self.scaler(loss, self.optimizer, self.clip_grad, "norm", parameters, need_update=last)
            return
        loss.backward()
        if last:
            if self.clip_grad is not None:
                dispatch_clip_grad(self.task.get_clip_parameters(), self.clip_grad)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Weights, moving average, optimizer and scaler, under timm's names."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
        }
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], loss_sum: float, skipped: int = 0) -> None:
        """Takes what `state_dict` gave, but the settings of the optimizer (--weight-decay and others) stay.

        Args:
            state: A checkpoint.
            loss_sum: Over the updates of its epoch.
            skipped: Those that were skipped.
        """
        self.task.load_checkpoint_state(state["state_dict"])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.scaler is not None and self.scaler.state_dict_key in state:
            self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        self.loss_sum.fill_(loss_sum)
        self.skipped = skipped
