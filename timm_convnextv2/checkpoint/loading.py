"""Reads files of weights and builds models from them, without executing code and without partial weights."""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from ..console import closest
from ..data import Pixels
from ..hub_errors import HUB_ERRORS, HubError, hub_error
from ..models import FCMAE
from ..models.variants import VARIANTS
from .provenance import WEIGHTS, config_beside, read_config, training_of

_EXPECTED = "a timm model, local-dir:FOLDER or hf-hub:USER/NAME"
_FOLDERS_OF_A_RUN = ("encoder", "model")  # written by pretraining and by finetuning
WINDOWS = "Windows"  # row of a card: side of the windows that pretraining read
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the EMA first


def model_name(name: str, family: str = "convnextv2") -> str:
    """The name for timm: of a size such as atto (`convnextv2_atto`), and of the folder of a run or model.

    Other names are returned unchanged, but a path that does not exist is a `ValueError`.
    """
    if name in VARIANTS:
        return f"{family}_{name}"
    folder = Path(name)
    if not name or not folder.is_dir():
        if "/" in name and not any(mark in name for mark in ":*?[") and not name.startswith("timm/"):
            if not folder.exists():
                raise ValueError(f"The model '{name}' does not exist. Give a folder that does, or {_EXPECTED}.")
        return name
    for candidate in (folder, *(folder / part for part in _FOLDERS_OF_A_RUN)):
        if (candidate / "config.json").is_file():
            return f"local-dir:{candidate}"
    raise ValueError(
        f"The folder '{name}' has no model: there is no config.json in it, nor in encoder/ or model/. Give the folder "
        "of a run that has written its encoder, or the folder of a model."
    )


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True, **kwargs)`, with an error instead of weights that stay random.

    Args:
        name: `local-dir:FOLDER` or `hf-hub:USER/NAME`, with weights as safetensors; or a timm model with pretrained
            weights.
        kwargs: Such as `features_only=True` (a list of the maps of the four stages) or `num_classes=0` (features).

    Raises:
        ValueError: Unknown name, the model cannot be loaded, or some of its weights are not from the file.
        HubError: (a RuntimeError) The Hub does not deliver.
    """
    stored_apart = name.startswith(("local-dir:", "hf-hub:"))
    if not stored_apart:
        _check_name(name)
    stored: dict[str, Tensor] = {}
    try:
        if name.startswith("local-dir:"):
            read_config(Path(name.partition(":")[2]) / "config.json", ours=False)
        elif stored_apart:
            config_beside({"hf_hub_id": name.partition(":")[2]})  # refuses values of other types
        # without pretrained=True timm builds the architecture and leaves the weights random
        model: Any = timm.create_model(name, pretrained=True, **kwargs)
        cfg = model.pretrained_cfg
        if stored_apart:
            folder = cfg.get("file")
            stored = load_file(Path(folder) / WEIGHTS) if folder else load_state_dict_from_hf(cfg["hf_hub_id"], WEIGHTS)
    except HubError:
        raise
    except (*HUB_ERRORS, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as e:
        if isinstance(e, HUB_ERRORS) and not name.startswith("local-dir:"):
            published = None if stored_apart else timm.get_pretrained_cfg(name)
            hub_id = (published and published.hf_hub_id) or name.removeprefix("hf-hub:")
            raise hub_error(e, hub_id, "weights", "give local-dir:FOLDER") from e
        raise ValueError(f"The model '{name}' cannot be loaded ({type(e).__name__}: {e}).") from e
    if isinstance(model, FCMAE):
        raise ValueError(f"The model '{name}' is an FCMAE, expected a backbone; give its encoder.")
    # timm loads without `strict` when it drops a classifier, so that a missing tensor would stay random
    for key, value in model.state_dict().items() if stored_apart else ():
        original = re.sub(r"^(stem|stages)_", r"\1.", key)  # features_only turns stem.0 into stem_0
        if original not in stored or not torch.equal(value, stored[original].to(value.dtype)):
            raise ValueError(f"The weights of '{name}' have no {original} for this model, or it was not loaded.")
    return model


def _check_name(name: str) -> None:
    """Accepts only timm models that have pretrained weights."""
    if "/" in name or ":" in name or not timm.is_model(name):
        near = closest(name, timm.list_models()) if name else ""
        raise ValueError(f"The model is '{name}', expected a folder that exists, {_EXPECTED}.{near}")
    if not timm.models.is_model_pretrained(name):
        tagged = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        remedy = f"Give one of {', '.join(tagged)}." if tagged else f"Give {_EXPECTED} with pretrained weights."
        raise ValueError(f"The model '{name}' has no pretrained weights in timm. {remedy}")


def model_pixels(name: str, in_chans: int, nodata: float | None = None) -> Pixels:
    """The preparation of stored values that a model was trained with: recorded in folders and repositories.

    `in_chans`, the channels of the images, must fit the record; `nodata` replaces the recorded value of missing pixels.
    """
    pixels = Pixels.from_record(_training(name).get("pixels"))
    try:
        pixels.check(in_chans)
    except ValueError as e:
        raise ValueError(f"The model '{name}' was trained on pixels with other channels: {e}") from e
    return pixels if nodata is None else pixels._replace(nodata=nodata)


def model_window(name: str) -> int | None:
    """The side in pixels of the windows that a model was trained on; None if it was trained on whole images."""
    size = str((_training(name).get("table") or {}).get(WINDOWS, "")).removesuffix(" px")
    return int(size) if size.isdecimal() else None


def shared_inputs(name: str, other: str, random: bool) -> list[str]:
    """Words of `finetune` that give the model `other`, unless it has a record of pixels, the images of model `name`.

    That is channels and record; for `random` weights also image size, mean, std and `standardize`, which do not suit
    weights that were trained with others.
    """
    if _training(other):
        return []
    config = _config(name)
    cfg, record = config.get("pretrained_cfg") or {}, dict(training_of(config).get("pixels") or {})
    channels, *size = cfg.get("input_size") or (3,)
    words = ["--in-chans", str(channels)] if channels != 3 else []
    if random:
        words += ["--img-size", str(size[0])] if len(set(size)) == 1 else []
        words += [word for key in ("mean", "std") if cfg.get(key) for word in (f"--{key}", *map(str, cfg[key]))]
    else:
        record.pop("standardize", None)
    return [*words, "--pixels", json.dumps(record)] if record else words


def _training(name: str) -> dict[str, Any]:
    return training_of(_config(name))


def _config(name: str) -> dict[str, Any]:
    """The config.json of a folder or repository; {} for other models."""
    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub", "hf_hub"):
        return {}
    return config_beside({"file": place} if source == "local-dir" else {"hf_hub_id": place}) or {}


def weights_in(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that timm would take from a loaded checkpoint, the EMA if any, with the names in the file."""
    weights = next((content[key] for key in _NESTED if isinstance(content.get(key), dict)), content)
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}
