"""Memory of a training step: an estimate before it, and the measured peak."""

import copy
import resource
import sys

import torch
from torch import Tensor

from ..ops.dispatch import backend, use_backend
from .fcmae import FCMAE
from .masking import num_visible
from .packing import PackedLayout


def memory_estimate(
    model: FCMAE, batch_size: int, ema: bool = False, amp: bool = False, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Memory of training in GiB: weights, gradients and AdamW's state; activations that a step saves for its backward.

    Activations are those of the backend of `device` (by default the model's), counted for one image on the meta device;
    with 'eager' the count is that of a GPU, and a CPU saves up to a third less. `ema` adds a moving average of the
    weights; `amp` halves the activations.
    """
    device = next(model.parameters()).device if device is None else device
    twin = copy.deepcopy(model).to("meta")
    grid = twin.grid(*twin.img_size)
    mask = torch.empty(1, *grid, dtype=torch.bool, device="meta")
    layout = PackedLayout(mask, num_visible(grid, twin.mask_ratio))
    images = torch.empty(1, twin.in_chans, *twin.img_size, device="meta")
    weights = {p.untyped_storage()._cdata for p in twin.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, because the address of a freed one may be reused

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    with use_backend(backend(device)), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        twin(images, layout, return_pred=False)
    per_image = sum(x.untyped_storage().nbytes() for x in kept.values())
    params = sum(p.numel() for p in model.parameters())
    return params * 4 * (5 if ema else 4) / 2**30, per_image * batch_size * (0.5 if amp else 1.0) / 2**30


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB of the GPU, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
