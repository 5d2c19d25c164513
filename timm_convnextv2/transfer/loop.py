"""The training loop of detection and segmentation, to read from top to bottom.

A model that is trained here gives in train mode a dict of losses, `model(images, targets)`; their sum is minimised.
What is measured and drawn between epochs is the caller's: a function that the loop calls.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..data import EpochBatchSampler, sample_seed
from ..models.memory import peak_memory
from ..report.html import report_when_due
from ..runs import summary
from ..runs.end import NotFiniteError, leave_signals_to_parent
from ..runs.folder import TransferFolder
from ..runs.progress import ProgressBar, Stopwatch
from ..runs.world import World
from .errors import UnreadableError


class Schedule(NamedTuple):
    """The learning rate of each update.

    Attributes:
        lr: After the warmup.
        updates: Of the whole run.
        kind: 'cosine', 'poly' (power 1: linear) or 'step'.
        warmup: Updates of linear warmup, which belong to the schedule (it has moved on when they end).
        warmup_share: Of the rate, at the first update.
        min_lr: At the end, of 'cosine' and 'poly'.
        steps: Shares of the updates, in 0..1, at which 'step' divides the rate by 10.
    """

    lr: float
    updates: int
    kind: str = "cosine"
    warmup: int = 0
    warmup_share: float = 0.001
    min_lr: float = 0.0
    steps: tuple[float, ...] = (0.75, 0.917)

    def at(self, update: int) -> float:
        """The rate of an update, from 0."""
        done = min(1.0, update / max(1, self.updates))
        if self.kind == "cosine":
            rate = self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
        elif self.kind == "poly":
            rate = self.min_lr + (self.lr - self.min_lr) * (1 - done)
        elif self.kind == "step":
            rate = self.lr * 0.1 ** sum(update >= round(step * self.updates) for step in self.steps)
        else:
            raise ValueError(f"The schedule is {self.kind!r}, expected 'cosine', 'poly' or 'step'.")
        if update < self.warmup:
            rate *= self.warmup_share + (1 - self.warmup_share) * update / self.warmup
        return rate


class Training:
    """A model in training, and all that has state in it: optimizer, scaler, moving average, DDP.

    Args:
        model: On any device; it moves to the world's.
        groups: From `groups.parameter_groups`.
        schedule: Of the learning rate.
        world: The processes that train together.
        seed: Of what is random in an update beside its data: drop path, the sampling of regions.
        grad_accum_steps: Batches per update.
        clip_grad: Largest norm of the gradient; None clips nothing.
        amp_dtype: Type of mixed precision, None for float32.
        ema_decay: Of a moving average of the weights, which grows from the start; None keeps none.
        opt: An optimizer of timm.
        betas: Of it.

    Attributes:
        model: The model itself, whatever wraps it.
        update_number: Updates that were made.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        schedule: Schedule,
        world: World,
        *,
        seed: int = 0,
        grad_accum_steps: int = 1,
        clip_grad: float | None = None,
        amp_dtype: torch.dtype | None = None,
        ema_decay: float | None = None,
        opt: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        schedule.at(0)  # complains here
        self.model, self.schedule, self.world, self.seed = model.to(world.device), schedule, world, seed
        self.grad_accum_steps, self.clip_grad, self.amp_dtype = grad_accum_steps, clip_grad, amp_dtype
        groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        self.optimizer: Any = create_optimizer_v2(groups, opt=opt, lr=schedule.lr, weight_decay=0.0, betas=betas)
        self.scaler = NativeScaler(world.device.type) if amp_dtype == torch.float16 else None
        self.ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay, use_warmup=True)
        self.update_number = 0
        self._wrapped: nn.Module | None = None

    @property
    def best_model(self) -> nn.Module:
        """What to evaluate and export: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the last update, of pyramid and heads."""
        return self.schedule.at(max(0, self.update_number - 1))

    def _module(self) -> nn.Module:
        """What runs: DDP where there are several processes, made after the weights are in place."""
        if self._wrapped is None:
            device = self.world.device
            ids: Any = [device] if device.type == "cuda" else None
            self._wrapped = (
                DistributedDataParallel(self.model, device_ids=ids) if self.world.distributed else self.model
            )
        return self._wrapped

    def update(self, batches: Iterator) -> tuple[dict[str, float], float]:
        """One update of the weights.

        Args:
            batches: Yields `(images, targets)`, which the model takes.

        Returns:
            The losses by name, means over batches and processes, with their sum as `loss`; seconds spent waiting for
            data.

        Raises:
            NotFiniteError: The loss is not finite, on some process; the weights are those of before.
        """
        number, module = self.update_number, self._module()
        torch.manual_seed(sample_seed(self.seed, number, self.world.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(number) * group["lr_scale"]
        self.optimizer.zero_grad()
        module.train()
        sums: dict[str, Tensor] = {}
        waited = 0.0
        for step in range(self.grad_accum_steps):
            start = time.perf_counter()
            images, targets = (_to(part, self.world.device) for part in next(batches))
            waited += time.perf_counter() - start
            last = step + 1 == self.grad_accum_steps
            wait = contextlib.nullcontext()
            if not last and isinstance(module, DistributedDataParallel):
                wait = module.no_sync()
            with wait:
                with torch.autocast(self.world.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    losses = module(images, targets)
                    loss = sum(losses.values()) / self.grad_accum_steps
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / self.grad_accum_steps
                if last:
                    means = self._means(sums)
                self._backward(loss, last)
        if self.ema is not None:
            self.ema.update(self.model, step=number)
        self.update_number += 1
        return means, waited

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        everywhere = self.world.mean(torch.stack([*sums.values()])).tolist()
        total = math.fsum(everywhere)
        if not math.isfinite(total):
            raise NotFiniteError(self.update_number, total)
        return {"loss": total, **dict(zip(sums, everywhere, strict=True))}

    def _backward(self, loss: Any, last: bool) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, self.clip_grad, "norm", parameters, need_update=last)
            return
        loss.backward()
        if last:
            if self.clip_grad is not None:
                dispatch_clip_grad(parameters, self.clip_grad)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Weights, moving average, optimizer, scaler, and how many updates were made."""
        state = {
            "update": self.update_number,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave.

        Raises:
            ValueError: It is of another model, or has no moving average and one is asked for.
        """
        try:
            self.model.load_state_dict(state["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler is not None and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as e:
            raise ValueError(f"The checkpoint does not fit this run ({type(e).__name__}: {e}).") from e
        self.update_number = state["update"]


def _to(part: Any, device: torch.device) -> Any:
    """Tensors anywhere in lists and dicts, on the device."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, dict):
        return {key: _to(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_to(value, device) for value in part]
    return part


def create_loader(
    dataset: Dataset,
    collate: Callable[[list], tuple[Any, Any]],
    world: World,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
) -> DataLoader:
    """Batches `(images, targets)` in an order that depends on `(seed, epoch)` only, shared among the processes.

    Args:
        dataset: `dataset[epoch, index]` is a sample of which everything random depends on (seed, epoch, index).
        collate: Joins samples to `(images, targets)`.
        world: The processes.
        batch_size: Of a process.
        workers: Processes that read.
        seed: Of the order.

    Raises:
        ValueError: The data set has less than one batch.
    """
    size: Any = dataset
    sampler = EpochBatchSampler(len(size), batch_size, seed, world.rank, world.size)
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda", generator=torch.Generator(), worker_init_fn=leave_signals_to_parent,
    )  # fmt: skip


# `(epochs that are complete, model in eval mode, whether it is the end) -> numbers by column`; called on all processes
EpochHook = Callable[[int, nn.Module, bool], dict[str, float]]


@dataclass
class Run:
    """What `train` needs.

    Attributes:
        training: What trains.
        loader: From `create_loader`.
        folder: Claimed; on the first process only.
        settings: Plain values, saved with the checkpoint.
        evaluate: Called after the epochs that `eval_interval` names and after the last one, on all processes; the
            first one's numbers become the columns `eval_*` of summary.csv.
        eval_interval: Epochs between two evaluations.
        checkpoint_interval: Epochs between two checkpoints.
        log_interval: Updates between two lines.
        logs: From `runs.logs.open_logs`.
        stop: Name of the signal at which it ended, else ''.
        measured: The last evaluation.

    Raises:
        ValueError: An epoch has less than one update.
    """

    training: Training
    loader: DataLoader
    folder: TransferFolder
    settings: dict[str, Any]
    evaluate: EpochHook
    eval_interval: int = 1
    checkpoint_interval: int = 1
    log_interval: int = 20
    logs: list[Callable[[int, dict], None]] = field(default_factory=list)
    stop: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of this epoch
    saved: int = 0  # updates in the last checkpoint
    report_due: float = 0.0  # when the report may be written again

    def __post_init__(self) -> None:
        if not self.updates_per_epoch:
            raise ValueError(
                f"An update takes {self.training.grad_accum_steps} batches, but an epoch has {len(self.loader)}. Lower "
                "--grad-accum-steps or --batch-size."
            )

    @property
    def updates_per_epoch(self) -> int:
        """Of a whole epoch."""
        return len(self.loader) // self.training.grad_accum_steps

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continues from a checkpoint of the same run."""
        self.training.load(checkpoint)
        self.sums = dict(checkpoint["sums"])
        self.saved = self.training.update_number

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            NotSavedError: It cannot be written.
        """
        self.folder.save({**self.training.state_dict(), "sums": self.sums, "settings": self.settings})
        self.saved = self.training.update_number


def train(run: Run, world: World) -> None:
    """Trains until the last update or a signal; `run.stop` says which.

    Raises:
        NotFiniteError: A loss is not finite.
        NotSavedError: The checkpoint cannot be written.
        UnreadableError: A file can no longer be read.
    """
    training, schedule, size = run.training, run.training.schedule, run.updates_per_epoch
    epochs = math.ceil(schedule.updates / size)
    bar = ProgressBar(schedule.updates, training.update_number, epochs, run.log_interval, world.primary)
    sampler: Any = run.loader.batch_sampler
    images = sampler.batch_size * world.size * training.grad_accum_steps
    world.watch_signals()
    while training.update_number < schedule.updates and not run.stop:
        epoch, begun = divmod(training.update_number, size)
        sampler.set_epoch(epoch, begun * training.grad_accum_steps)
        batches, clock = iter(run.loader), Stopwatch(images)
        end = min((epoch + 1) * size, schedule.updates)
        while training.update_number < end and not run.stop:
            try:
                losses, waited = training.update(batches)
            except UnreadableError:  # before the weights of this update: what was made until here is kept
                if training.grad_accum_steps == 1 and not world.distributed:
                    run.save()
                raise
            run.sums = {name: run.sums.get(name, 0.0) + value for name, value in losses.items()}
            clock.count(waited)
            if bar.step():
                bar.show(epoch, losses["loss"], training.lr, *clock.lap())
            run.stop = (world.stop or "a signal") if world.any(bool(world.stop))[0] else ""
        del batches
        if training.update_number == end:
            finish_epoch(run, world, bar, epoch, end - epoch * size, clock)
        done = training.update_number == schedule.updates
        if run.stop or done or (epoch + 1) % run.checkpoint_interval == 0:
            if world.primary:
                with world.writing:
                    run.save()
                    run.report_due = report_when_due(run.folder.path, run.report_due, bool(run.stop) or done, bar.note)
            run.saved = training.update_number
    bar.close()


def finish_epoch(run: Run, world: World, bar: ProgressBar, epoch: int, updates: int, clock: Stopwatch) -> None:
    """Evaluates and logs an epoch that is complete."""
    training, done = run.training, run.training.update_number == run.training.schedule.updates
    metrics = {name: value / updates for name, value in run.sums.items()}
    metrics |= {**clock.totals(), "memory_gib": round(peak_memory(world.device), 2)}
    run.sums = {}
    measured: dict[str, float] = {}
    if done or (epoch + 1) % run.eval_interval == 0:
        with torch.no_grad():
            measured = run.measured = run.evaluate(epoch + 1, training.best_model.eval(), done)
    if world.primary:
        summary.add_row(run.folder.summary, epoch, metrics, {**measured}, training.lr)
        for log in run.logs:
            log(epoch, {**metrics, **{f"eval_{name}": value for name, value in measured.items()}, "lr": training.lr})
    found = "".join(f"  {name} {value:.3f}" for name, value in list(measured.items())[:2])
    bar.note(f"epoch {epoch + 1}  loss {metrics['loss']:.4f}{found}  {metrics['seconds']:.0f} s")
