"""The model that a run starts from: a variant's name, or a timm folder whose config.json is read here, once."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models import clean_state_dict
from torch import Tensor

from ..checkpoint import convert_official, load_checkpoint
from ..checkpoint.files import weights_in
from ..checkpoint.provenance import WEIGHTS, config_beside, origin_of_file, read_config, resolve_license
from ..models import FCMAE
from ..registry import VARIANTS


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


def open_weights(path: str, model: str, model_kwargs: dict[str, Any], license: str) -> Start:
    """Reads weights in the official format (sparse, or dense with or without a classifier), timm's, or an FCMAE's.

    For their licence see `provenance.origin_of_file`; where that is unstated it must be given.

    Args:
        path: `.pt`, `.pth`, `.pth.tar` or `.safetensors`.
        model: The variant that takes them, `fcmae_convnextv2_*`.
        model_kwargs: More of its options.
        license: As asked for, '' where it was not.

    Raises:
        ValueError: The file cannot be read, has weights of another size, or their licence is not known.
    """
    if ":" in model:
        raise ValueError(f"--weights {path} needs a variant as --model, such as fcmae_convnextv2_tiny; got {model}.")
    content = load_checkpoint(path)
    weights = clean_state_dict(weights_in(content))
    run = _run_of(content)
    origin = origin_of_file(Path(path), weights, run or None)
    official = any(name.removeprefix("encoder.").startswith("downsample_layers.") for name in weights)
    if official:
        try:
            weights = convert_official(weights, model_kwargs.get("conv_mlp", _variant(model).get("conv_mlp", False)))
        except ValueError as e:
            raise ValueError(f"--weights {path}: {e}") from e
    config = _config(Path(path), model, run, weights)
    found = _published(weights) or config["architecture"].removeprefix("fcmae_convnextv2_").removeprefix("convnextv2_")
    if _variant(model) and VARIANTS[found] != _variant(model):
        raise ValueError(f"--weights {path} is of a {found}, not of a {model}: --model fcmae_convnextv2_{found}.")
    resolve_license(license or None, origin.license, origin.unstated)
    if origin.license:
        config["pretrained_cfg"]["license"] = origin.license
    return Start({"state_dict": weights}, config)


def _variant(model: str) -> dict[str, Any]:
    """Depths, widths and form of a published size, by the model's name."""
    return VARIANTS.get(model.partition(".")[0].rpartition("_")[2], {})


def _published(weights: dict[str, Tensor]) -> str | None:
    """The published size that weights under timm's names have, None where they have another."""
    names = [name.removeprefix("encoder.").split(".") for name in weights]
    blocks = {(int(n[1]), int(n[3])) for n in names if n[0] == "stages" and n[2] == "blocks" and n[3].isdigit()}
    depths = tuple(sum(stage == s for s, _ in blocks) for stage in range(4))
    stem = _stem(weights)
    shapes = (depths, None if stem is None else len(stem))
    return next((size for size, v in VARIANTS.items() if (v["depths"], v["dims"][0]) == shapes), None)


def _run_of(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of; empty for other files."""
    settings = content.get("args") if "progress" in content else None
    return settings if isinstance(settings, dict) else {}


def _stem(weights: dict[str, Tensor]) -> Tensor | None:
    return weights.get("encoder.stem.0.weight", weights.get("stem.0.weight"))


def _config(path: Path, model: str, run: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The config.json that belongs to the file, or one with the little that is known, with options that weights show.

    Args:
        path: Of the file.
        model: The variant that takes the weights.
        run: Settings of the run that it is a checkpoint of.
        weights: In it, under timm's names.
    """
    stem = _stem(weights)
    chans, patch = (stem.shape[1], stem.shape[-1]) if stem is not None else (3, 4)
    known = {"input_size": [chans, 224, 224]}
    config: dict[str, Any] = {"architecture": model.partition(".")[0], "pretrained_cfg": known}
    place = path.parent / "encoder" if run else path.parent  # a run keeps its encoder
    config = config_beside({"file": place / WEIGHTS}) or config
    shown = {"in_chans": chans, "patch_size": patch}
    if "mask_token" in weights:
        decoder = {name.split(".")[1] for name in weights if name.startswith("decoder.")}
        shown |= {"decoder_dim": weights["mask_token"].shape[1], "decoder_depth": len(decoder)}
    cfg = {**config.get("pretrained_cfg", {})}
    return {**config, "model_args": {**config.get("model_args", {}), **shown}, "pretrained_cfg": cfg}
