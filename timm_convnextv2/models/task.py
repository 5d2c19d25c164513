"""`FCMAETask`: FCMAE as a task of timm."""

from typing import Any

import torch
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor

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

    prepare_distributed: Any = ClassificationTask.prepare_distributed
    compile: Any = ClassificationTask.compile

    def forward(self, input: Tensor, target: Tensor | None = None, channels: Tensor | None = None) -> dict[str, Tensor]:
        """'loss' (scalar) and 'mask' of images `[B, C, H, W]`.

        `target` are masks, bool `[B, h, w]`, True = removed; random if None, and checked without waiting for the GPU if
        they are on the CPU. `channels` is bool `[B, C]`, True = removed.
        """
        output = self.trainable_module(input, self._layout(input, target), return_pred=False, channels=channels)
        return {"loss": output.loss, "mask": output.mask}
