"""Memory for what lives within one call of an operation."""

import math
import threading
from typing import Any

import torch

__all__ = ["scratch"]

LARGEST = 64 * 2**20  # bytes of one buffer that is kept

_local = threading.local()


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor. On CPU its memory stays for the next call of this thread that names the same slot.

    There, fresh pages cost as much as a pass over them. What is written must have been read before that call.
    """
    numel = math.prod(shape)
    if device.type != "cpu" or numel * dtype.itemsize > LARGEST:
        return torch.empty(shape, dtype=dtype, device=device)
    held: dict[Any, torch.Tensor] = _local.__dict__
    key = slot, dtype
    buffer = held.get(key)
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # else it could only be used in that mode
            buffer = held[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)
