"""The model that a run starts from: a variant's name, or a timm folder whose config.json is read here, once."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError

from ..models import FCMAE
from ..provenance import WEIGHTS, config_beside, read_config

__all__ = ["Start", "create_fcmae", "open_start", "short_name"]


class Start(NamedTuple):
    """A timm folder, or a file, to start from.

    Attributes:
        overlay: Its weights or where they are, for timm's `pretrained_cfg_overlay`.
        config: Its config.json.
    """

    overlay: dict[str, Any]
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        """Name of the FCMAE that takes the weights."""
        return f"fcmae_{self.config['architecture'].removeprefix('fcmae_')}"

    def defaults(self, sized: bool) -> dict[str, Any]:
        """Defaults of options that follow from it: the model's options and its image size.

        Args:
            sized: Whether an image size was given.
        """
        options, cfg = self.config.get("model_args", {}), self.config.get("pretrained_cfg", {})
        names = ("in_chans", "patch_size", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
        defaults = {name: options[name] for name in names if name in options}
        defaults.setdefault("patch_size", 4)
        chans, height, width = cfg.get("input_size", (3, 224, 224))
        defaults.setdefault("in_chans", chans)
        if height == width:
            defaults["img_size"] = height
        elif not sized:
            defaults["input_size"] = [chans, height, width]
        return defaults

    def normalization(self, in_chans: int) -> dict[str, list[float]]:
        """Its `mean` and `std`, as far as they fit the number of channels."""
        cfg, found = self.config.get("pretrained_cfg", {}), {}
        for name in ("mean", "std"):
            values = cfg.get(name) or []
            if len(values) in (1, in_chans):
                found[name] = list(values) * (in_chans // len(values))
        return found


def open_start(name: str) -> Start | None:
    """Reads the config.json of a `local-dir:` or `hf-hub:` model; None for the name of a variant.

    Raises:
        ValueError: There is no such folder or repository, or it is not of a ConvNeXt V2 or FCMAE.
    """
    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub"):
        return None
    if source == "local-dir":
        config = read_config(Path(place) / "config.json")
        if not (Path(place) / WEIGHTS).is_file():
            raise ValueError(f"--model {name}: the folder has no {WEIGHTS}.")
        return Start({"file": str(Path(place) / WEIGHTS)}, config)
    try:
        config = config_beside({"hf_hub_id": place})
    except (OSError, HfHubHTTPError) as e:
        raise ValueError(
            f"--model {name}: the Hugging Face Hub or its local cache does not give its config.json "
            f"({type(e).__name__}: {str(e).partition(chr(10))[0]}). Check name, network and token."
        ) from e
    if config is None:
        raise ValueError(
            f"--model {name}: the repository has no config.json of a ConvNeXt V2 or FCMAE in timm's format."
        )
    return Start({"hf_hub_id": place}, config)


def short_name(model: str) -> str:
    """The model's name without the folders that lead to it."""
    return model.rstrip("/").rpartition("/")[2]


def create_fcmae(
    name: str,
    start: Start | None,
    *,
    seed: int,
    pretrained: bool,
    model_kwargs: dict[str, Any],
    grad_checkpointing: bool,
    **options: Any,
) -> FCMAE:
    """The model that `--model` names, from the seed.

    Args:
        name: As given, for messages.
        start: What `open_start` made of it.
        seed: Of the random weights.
        pretrained: Load weights: those of `start`, or the published encoder.
        model_kwargs: More of `timm.create_model`'s, as given.
        grad_checkpointing: Recompute in the backward what takes most memory.
        options: Those of `FCMAE`.

    Raises:
        ValueError: No such model, or options that do not suit it.
    """
    known = timm.list_models("fcmae_*")
    model_name = start.architecture if start else name
    if model_name.split(".")[0] not in known:
        near = f"fcmae_{name}" if f"fcmae_{name.split('.')[0]}" in known else ""
        near = near or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.3)), known[0])
        raise ValueError(f"--model {name} is not an FCMAE model; did you mean {near}? There are: {', '.join(known)}.")
    if start:
        options |= {"pretrained_cfg_overlay": start.overlay, "start_config": start.config}
    torch.manual_seed(seed)
    try:
        model: Any = timm.create_model(model_name, pretrained=pretrained, **options, **model_kwargs)
    except (AssertionError, KeyError, TypeError) as e:
        raise ValueError(f"--model-kwargs {model_kwargs} does not suit {name}: {e!r}") from e
    for holder in (model.pretrained_cfg, start.overlay if start else {}):
        holder.pop("state_dict", None)  # frees the memory of a file's weights
    model.set_grad_checkpointing(grad_checkpointing)
    return model
