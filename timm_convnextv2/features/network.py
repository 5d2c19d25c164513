"""Models by the names that a user gives, with the images that they take."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..checkpoint.files import load_model


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


_OF_A_RUN = ("encoder", "model")  # of pretraining and of finetuning


def name_of_model(name: str) -> str:
    """What `load_network` takes: of the folder of a run, the model in it; of a timm folder, `local-dir:FOLDER`.

    Raises:
        ValueError: A folder without a model.
    """
    folder = Path(name)
    if not name or not folder.is_dir():
        return name
    for place in (folder, *(folder / part for part in _OF_A_RUN)):
        if (place / "config.json").is_file():
            return f"local-dir:{place}"
    raise ValueError(
        f"The folder '{name}' has no model: there is no config.json in it, nor in encoder/ or model/. Give the folder "
        "of a run that has written its encoder, or the folder of a model."
    )


def random_network(name: str, seed: int) -> nn.Module:
    """The architecture of `name`, as `load_network` takes it, with random weights of `seed`; without classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=False, num_classes=0).eval()


def load_network(name: str, img_size: int | None, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model without classifier on its device, and timm's data config of the images that it takes.

    Raises:
        ValueError: The model, the size or the device cannot be used.
    """
    network = load_model(name, num_classes=0).eval()
    cfg: Any = network.pretrained_cfg
    config = resolve_model_data_config(network, args={"in_chans": cfg["input_size"][0], "img_size": img_size})
    (height, width), size = cfg["input_size"][1:], tuple(config["input_size"][1:])
    if cfg.get("fixed_input_size") and size != (height, width):
        raise ValueError(f"--img-size {img_size}: '{name}' takes images of {height} x {width} only. Leave it out.")
    info: Any = getattr(network, "feature_info", None)
    stride = info[-1]["reduction"] if info else 1
    if min(size) < stride:
        raise ValueError(f"--img-size {img_size} is smaller than the model's stride, {stride} pixels.")
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        return network.to(place), config
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f"--device {device} cannot be used: {e}") from e
