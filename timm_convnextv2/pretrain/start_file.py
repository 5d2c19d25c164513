"""`--weights FILE`: a local file of weights as a `Start`, whoever wrote it."""

from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor

from ..checkpoint import convert_official, load_checkpoint
from ..checkpoint.files import weights_in
from ..models.registry import VARIANTS
from ..provenance import WEIGHTS, config_beside, origin_of_file, resolve_license
from .start import Start

__all__ = ["open_weights"]


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
