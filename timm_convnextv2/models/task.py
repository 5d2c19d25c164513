"""`FCMAETask`: FCMAE as a task of timm."""

from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from .fcmae import FCMAE


class FCMAETask(TrainingTask):
    """timm `TrainingTask` for FCMAE: DDP, compile, EMA and checkpoint state are timm's."""

    def __init__(
        self, model: FCMAE, device: torch.device | None = None, dtype: torch.dtype | None = None, verbose: bool = True
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        model.encoder.head.requires_grad_(False)  # DDP would wait for its gradients
        self.trainable_module = model
        self._layout = model.visible  # the unwrapped model's method: DDP and compile wrappers hide it

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> "FCMAETask":
        """Wraps the model in DistributedDataParallel."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs) -> nn.Module:
        """Compiles the model, before DDP wrapping."""
        compiled: Any = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = compiled
        return compiled

    def forward(self, input: Tensor, target: Tensor | None = None, channels: Tensor | None = None) -> dict[str, Tensor]:
        """'loss' (scalar) and 'mask' of images `[B, C, H, W]`.

        `target` are masks, bool `[B, h, w]`, True = removed; random if None, and checked without waiting for the GPU if
        they are on the CPU. `channels` is bool `[B, C]`, True = removed.
        """
        output = self.trainable_module(input, self._layout(input, target), return_pred=False, channels=channels)
        return {"loss": output.loss, "mask": output.mask}
