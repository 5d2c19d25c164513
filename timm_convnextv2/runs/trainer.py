"""`Trainer`: updates of any timm `TrainingTask`, with everything that has state: optimizer, scaler, EMA, DDP."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn

from ..seeds import sample_seed
from .checkpoints import TrainerState
from .errors import NotFiniteError
from .world import World

Bad = list[tuple[int, str]]  # index of an image that could not be decoded, and the reason
Prepare = Callable[[Any, int, int], tuple[tuple, Bad]]


@dataclass(frozen=True)
class Learning:
    """How updates are made."""

    seed: int = 0  # of the random numbers of an update other than its data, such as drop path
    grad_accum_steps: int = 1
    clip_grad: float | None = None  # largest norm of the gradient; None does not clip
    amp_dtype: torch.dtype | None = None  # None: float32
    ema_decay: float | None = None  # None: no moving average
    ema_warmup: bool = False  # start with a shorter average
    skip_bad: bool = False  # skip updates whose loss is not finite; the host then waits for each loss


def to_device(value: Any, device: torch.device) -> Any:
    """Moves the tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value


class Trainer:
    """Trains a timm `TrainingTask`, one update at a time.

    The task is on the world's device; its forward returns 'loss', and may return more scalars to log. `prepare(batch,
    number, step)` returns the task's arguments and the undecodable images of a batch; `number` counts the updates of
    the run before this one, `step` the batches of the update. By default it moves the batch to the device.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        world: World,
        learning: Learning,
        prepare: Prepare | None = None,
    ) -> None:
        self.task, self.scheduler, self.world, self.learning = task, scheduler, world, learning
        self.optimizer: Any = optimizer
        self.prepare = prepare or (lambda batch, number, step: (to_device(tuple(batch), world.device), []))
        self.scaler = NativeScaler(world.device.type) if learning.amp_dtype == torch.float16 else None
        if learning.ema_decay is not None:
            task.setup_ema(decay=learning.ema_decay, use_warmup=learning.ema_warmup)
        # A fused optimizer on a GPU leaves the weights unchanged by itself if the loss is not finite, because
        # GradScaler's `found_inf` is set: then the host need not wait for the loss.
        fused = world.device.type == "cuda" and self.scaler is None
        fused = fused and all(group.get("fused") for group in optimizer.param_groups)
        self.late = fused and not learning.skip_bad
        # other devices may have no float64
        self._place = world.device if world.device.type == "cuda" else torch.device("cpu")
        self.sums: dict[str, Tensor] = {}  # over this epoch's updates that were made, by name, in float64
        self.loss = self._zero()  # of the last update over all processes, on the device: reading it waits
        self.mean_loss = float("nan")  # of the last complete epoch
        self.skipped, self.bad_step = 0, None  # updates of this epoch; the error of the last update if it was skipped
        self._unread: list[tuple[int, Tensor]] = []  # number and loss of updates that the host has not read

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._place)

    def wrap(self, compile_backend: str | None = None) -> None:
        """Compiles the model and wraps it in DDP, once the weights are loaded."""
        if compile_backend:
            self.task.compile(backend=compile_backend)
        if self.world.distributed:
            device = self.world.device
            self.task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
        self.task.train()

    @property
    def model(self) -> Any:
        """The model without wrappers."""
        return unwrap_model(self.task.get_trainable_module())

    @property
    def averaged(self) -> Any:
        """The model to evaluate and export: the moving average if there is one."""
        average: Any = self.task.get_trainable_module(ema=True)
        return self.model if average is None else average.module

    @property
    def lr(self) -> float:
        """Learning rate of the last update, before layer decay."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def update(self, batches: Iterator, number: int) -> tuple[Bad, float]:
        """Makes one update: forward and backward of `grad_accum_steps` batches, then the optimizer's step.

        `number` counts the updates of the run before this one; learning rate, drop path and moving average depend on
        it. Returns the images of this process that could not be decoded, and the seconds spent waiting for data. A
        `NotFiniteError` says that the loss is not finite on some process; the weights are unchanged.
        """
        steps, amp = self.learning.grad_accum_steps, self.learning.amp_dtype
        self.scheduler.step_update(number)
        torch.manual_seed(sample_seed(self.learning.seed, number, self.world.rank))
        self.optimizer.zero_grad()
        self.bad_step = None
        total, bad, waited = self._zero(), [], 0.0
        names: list[str] = []
        for step in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            inputs, failed = self.prepare(batch, number, step)
            bad += failed
            last = step + 1 == steps
            with nullcontext() if last else self.task.no_sync():
                with torch.autocast(self.world.device.type, amp, enabled=amp is not None):
                    found = {name: x / steps for name, x in self.task(*inputs).items() if x.ndim == 0}
                names = [*found]
                total = total + torch.stack([x.detach().to(self._place, torch.float64) for x in found.values()])
                if last and not self._note(total, names, number):
                    return bad, waited
                self._backward(found["loss"], last)
        self.task.update_ema(step=number)
        return bad, waited

    def _note(self, total: Tensor, names: list[str], number: int) -> bool:
        """Records the losses; returns whether the update is made. Only here can a loss stop an update."""
        means = dict(zip(names, self.world.mean(total).unbind(), strict=True))
        self.loss = means["loss"]
        if self.learning.skip_bad and not torch.isfinite(self.loss):
            self.skipped, self.bad_step = self.skipped + 1, NotFiniteError(number, float(self.loss))
            return False
        self.sums = {name: self.sums.get(name, self._zero()) + value for name, value in means.items()}
        self._unread.append((number, self.loss))
        if not self.late:
            self.check_finite()
            return True
        # what GradScaler sets; it is never reset here: nothing is learned until the host has read the loss
        failed = (~torch.isfinite(self.loss)).float()
        self.optimizer.found_inf = torch.maximum(failed, getattr(self.optimizer, "found_inf", failed))
        return True

    def check_finite(self) -> None:
        """Raises `NotFiniteError` for the first loss since the last call that is not finite; waits for the device."""
        unread, self._unread = self._unread, []
        loss_sum = self.sums.get("loss", self._zero())
        if torch.isfinite(loss_sum):
            return
        for number, loss in unread:
            if not torch.isfinite(loss):
                raise NotFiniteError(number, float(loss))
        raise NotFiniteError(unread[-1][0] if unread else 0, float(loss_sum))

    def read_sums(self) -> dict[str, float]:
        """The sums of this epoch as numbers; waits for the device and raises `NotFiniteError` like `check_finite`."""
        self.check_finite()
        return {name: float(value) for name, value in self.sums.items()}

    def end_epoch(self, updates: int) -> dict[str, float]:
        """The mean losses of an epoch of so many updates, NaN if all were skipped; then the next epoch begins."""
        made = updates - self.skipped
        means = {name: value / made for name, value in self.read_sums().items()} if made else {"loss": float("nan")}
        self.mean_loss = means["loss"]
        self.sums, self.skipped = {}, 0
        return means

    def _backward(self, loss: Tensor, last: bool) -> None:
        """The backward of a batch, and the step after the last one."""
        clip = self.learning.clip_grad
        if self.scaler is not None:
            parameters = self.task.get_clip_parameters()
            self.scaler(loss, self.optimizer, clip, "norm", parameters, need_update=last)
            return
        loss.backward()
        if last:
            if clip is not None:
                dispatch_clip_grad(self.task.get_clip_parameters(), clip)
            self.optimizer.step()

    def state(self) -> TrainerState:
        """What a checkpoint holds of the trainer."""
        average: dict[str, Any] = self.task.get_checkpoint_state(ema=True)
        return TrainerState(
            state_dict=self.task.get_checkpoint_state()["state_dict"],
            optimizer=self.optimizer.state_dict(),
            state_dict_ema=average.get("state_dict_ema"),
            amp_scaler=None if self.scaler is None else self.scaler.state_dict(),
        )

    def load(self, state: TrainerState, sums: Mapping[str, float], skipped: int = 0) -> None:
        """Loads a checkpoint that fits. The optimizer's settings, such as --weight-decay, stay those of this run."""
        self.task.load_checkpoint_state(state.state_dict)
        if self.task.has_ema():
            assert state.state_dict_ema is not None
            self.task.load_checkpoint_state(state.state_dict_ema, ema=True)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state.optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.scaler is not None and state.amp_scaler is not None:
            self.scaler.load_state_dict(state.amp_scaler)
        self.sums = {name: self._zero() + value for name, value in sums.items()}
        self.skipped = skipped


def seconds_per_update(trainer: Trainer, batches: Iterator, tries: Iterable[int], enough: float = 20.0) -> float:
    """Makes a few updates, numbered `tries`, for about `enough` seconds; the median time without waiting for data.

    The first one, which may compile, counts only if it is the only one.
    """
    times: list[float] = []
    for number in tries:
        start = time.perf_counter()
        _, waited = trainer.update(batches, number)
        float(trainer.loss)  # waits for the device
        times.append(time.perf_counter() - start - waited)
        if trainer.world.share(sum(times)) > enough:
            break
    return statistics.median(times[1:] or times)


class LossesTask(TrainingTask):
    """The task of a model that returns a dict of losses in train mode, `model(images, targets)`, on `device`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> "LossesTask":
        """Wraps the model in DistributedDataParallel."""
        ddp: Any = nn.parallel.DistributedDataParallel
        self.trainable_module = ddp(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sum of the losses and each of them."""
        losses: dict[str, Any] = self.trainable_module(input, target)
        return {"loss": sum(losses.values()), **losses}  # pyright: ignore[reportReturnType]
