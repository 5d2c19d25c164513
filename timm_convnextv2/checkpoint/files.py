"""Reading files of weights without executing anything that is in them, and only where they are whole."""

import re
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..console import closest
from ..data import Pixels
from ..models import FCMAE
from .provenance import WEIGHTS, pixels_of_model, read_config

_PLACES = ("local-dir:", "hf-hub:")


_EXPECTED = "a model of timm, local-dir:FOLDER or hf-hub:USER/NAME"


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True, **kwargs)`, which never leaves a weight random without telling.

    Of a folder or a repository, every weight is compared with the file: without `strict`, which timm leaves out where
    it drops a classifier, a missing tensor would stay random. Of timm's own models timm checks what it can.

    Args:
        name: `local-dir:FOLDER` or `hf-hub:USER/NAME`, with weights as safetensors; or a model of timm that has
            pretrained weights, with or without its tag.
        kwargs: More of `timm.create_model`, such as `features_only=True` (a list of the maps of the four stages) or
            `num_classes=0` (pooled features).

    Raises:
        ValueError: The name is not known, the model cannot be had, or some of its weights are not those of the file.
    """
    placed = name.startswith(_PLACES)
    if not placed:
        _check_name(name)
    try:
        if name.startswith("local-dir:"):
            read_config(Path(name.partition(":")[2]) / "config.json", ours=False)
        # without pretrained=True timm builds the architecture and leaves the weights random
        model: Any = timm.create_model(name, pretrained=True, **kwargs)
        stored = _stored(model.pretrained_cfg) if placed else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, HfHubHTTPError) as e:
        raise ValueError(f"The model '{name}' cannot be loaded ({type(e).__name__}: {e}).") from e
    if isinstance(model, FCMAE):
        raise ValueError(f"The model '{name}' is a FCMAE, expected a backbone; give its encoder.")
    if stored is not None:
        _compare(name, model, stored)
    return model


def model_pixels(name: str, in_chans: int, nodata: float | None = None) -> Pixels:
    """How stored values become pixels: as for the images that a model was trained on.

    Args:
        name: As of `load_model`; a folder or a repository has a record, other models read pixels in the usual way.
        in_chans: Channels of the images.
        nodata: Value of pixels without data in the place of the record's; None keeps that.

    Raises:
        ValueError: The record is of another number of channels, or cannot be read.
    """
    pixels = Pixels.from_record(pixels_of_model(name))
    try:
        pixels.check(in_chans)
    except ValueError as e:
        raise ValueError(f"The model '{name}' was trained on pixels of other channels: {e}") from e
    return pixels if nodata is None else pixels._replace(nodata=nodata)


def _check_name(name: str) -> None:
    """The name is one of timm's, with pretrained weights."""
    if "/" in name or ":" in name or not timm.is_model(name):
        near = closest(name, timm.list_models()) if name else ""
        raise ValueError(f"The model is '{name}', expected {_EXPECTED}.{near}")
    if not timm.models.is_model_pretrained(name):
        architecture = name.partition(".")[0]
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        known = f"There are {', '.join(tagged)}." if tagged else f"Give {_EXPECTED} that has them."
        raise ValueError(f"The model '{name}' has no pretrained weights in timm. {known}")


def _stored(cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the file that timm loaded."""
    if cfg.get("file"):
        return load_file(Path(cfg["file"]) / WEIGHTS)
    return timm.models.load_state_dict_from_hf(cfg["hf_hub_id"], WEIGHTS)


def _compare(name: str, model: nn.Module, stored: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        original = re.sub(r"^(stem|stages)_", r"\1.", key)  # features_only makes stem_0 of stem.0
        if original not in stored or not torch.equal(value, stored[original].to(value.dtype)):
            raise ValueError(f"The weights of '{name}' have no {original} for this model, or it was not loaded.")


_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the moving average first


def weights_in(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by name in what `load_checkpoint` gave, those that timm takes: the moving average where there is one.

    Names are as in the file; prefixes of DDP and torch.compile stay.
    """
    weights = next((content[key] for key in _NESTED if isinstance(content.get(key), dict)), content)
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
