"""The rows that a model gives."""

import hashlib

import numpy as np
import torch
from torch import nn

__all__ = ["digest", "features"]


@torch.inference_mode()
def features(network: nn.Module, images: list[torch.Tensor], amp: bool) -> np.ndarray:
    """Rows float32 `[B, num_features]` of images `[C, H, W]`; computed in bfloat16 with `amp`."""
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        rows = network(torch.stack(images).to(device))
    if rows.ndim != 2:
        raise ValueError(f"The model gives {list(rows.shape)} for a batch, expected one row of features per image.")
    return rows.float().cpu().numpy()


def digest(network: nn.Module) -> str:
    """A hash of all weights."""
    sha = hashlib.sha256()
    for key, value in network.state_dict().items():
        sha.update(key.encode())
        sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
