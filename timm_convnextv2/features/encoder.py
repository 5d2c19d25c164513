"""Frozen models by the names that a user gives, and the images that they take."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..checkpoint.loading import load_model, model_pixels
from ..data import Pixels
from ..data.samples.batches import preprocessing
from ..runs.device import check_device

_FOLDERS_OF_A_RUN = ("encoder", "model")  # written by pretraining and by finetuning
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


@dataclass(frozen=True)
class Encoder:
    """A frozen model without classifier, in evaluation mode.

    `config` is timm's data config of its images; `pixels` is how stored values become pixels, as in its training.
    """

    name: str
    network: nn.Module
    config: dict[str, Any]
    pixels: Pixels

    @property
    def in_chans(self) -> int:
        return self.config["input_size"][0]

    @property
    def transform(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Decoded image to float32 `[C, H, W]`."""
        return preprocessing(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        return {key: self.config[key] for key in _PREPROCESSING}

    def with_random_weights(self, seed: int) -> nn.Module:
        """The same architecture with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(self.name, pretrained=False, num_classes=0).eval()

    def digest(self) -> str:
        sha = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            sha.update(key.encode())
            sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return sha.hexdigest()


def model_name(name: str) -> str:
    """The name for timm: `local-dir:FOLDER` for the folder of a run or model; other names are returned unchanged."""
    folder = Path(name)
    if not name or not folder.is_dir():
        return name
    for candidate in (folder, *(folder / part for part in _FOLDERS_OF_A_RUN)):
        if (candidate / "config.json").is_file():
            return f"local-dir:{candidate}"
    raise ValueError(
        f"The folder '{name}' has no model: there is no config.json in it, nor in encoder/ or model/. Give the folder "
        "of a run that has written its encoder, or the folder of a model."
    )


def open_encoder(name: str, img_size: int | None = None, nodata: float | None = None, device: str = "cpu") -> Encoder:
    """Loads a model on its device; 'cuda' means the GPU of this process."""
    name = model_name(name)
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
    own_device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    pixels = model_pixels(name, config["input_size"][0], nodata)
    return Encoder(name, network.to(own_device), config, pixels)
