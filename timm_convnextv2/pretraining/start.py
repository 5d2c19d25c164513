"""The model that a run starts from: a variant with random weights, a timm folder or repository, or a local file."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor

from ..checkpoint import convert_official, load_checkpoint
from ..checkpoint.loading import weights_in
from ..checkpoint.provenance import WEIGHTS, config_beside, origin_of_file, read_config, resolve_license, training_of
from ..console import closest
from ..data import Pixels
from ..models import FCMAE
from ..registry import VARIANTS
from .config import Crops, Network

OPTIONS = ("patch_size", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")  # of `Network` and FCMAE


class Start(NamedTuple):
    """Weights to start from."""

    overlay: dict[str, Any]  # the weights or their location, for timm's `pretrained_cfg_overlay`
    config: dict[str, Any]  # their config.json

    @property
    def architecture(self) -> str:
        """Name of the FCMAE that takes the weights."""
        return f"fcmae_{self.config['architecture'].removeprefix('fcmae_')}"

    @property
    def pixels(self) -> Pixels:
        """How stored values became pixels in its training."""
        return Pixels.from_record(training_of(self.config).get("pixels"))

    def defaults(self, sized: bool) -> dict[str, Any]:
        """Defaults of options: the model's arguments, and its image size unless --img-size is given (`sized`)."""
        options, cfg = self.config.get("model_args", {}), self.config.get("pretrained_cfg", {})
        names = ("in_chans", *OPTIONS)
        chans, height, width = cfg.get("input_size", (3, 224, 224))
        defaults = {"patch_size": 4, "in_chans": chans} | {name: options[name] for name in names if name in options}
        if height == width:
            defaults["img_size"] = height
        elif not sized:
            defaults["input_size"] = (chans, height, width)
        return defaults

    def normalization(self, in_chans: int) -> dict[str, tuple[float, ...]]:
        """Its `mean` and `std`, unless they are for another number of channels."""
        cfg, found = self.config.get("pretrained_cfg", {}), {}
        for name in ("mean", "std"):
            values = tuple(cfg.get(name) or ())
            if len(values) in (1, in_chans):
                found[name] = values * (in_chans // len(values))
        return found


def open_start(name: str) -> Start | None:
    """Reads the config.json of a `local-dir:` or `hf-hub:` model; None for the name of a variant."""
    kind, _, location = name.partition(":")
    if kind == "local-dir":
        config = read_config(Path(location) / "config.json")
        if not (Path(location) / WEIGHTS).is_file():
            raise ValueError(f"--model {name}: the folder has no {WEIGHTS}.")
        return Start({"file": str(Path(location) / WEIGHTS)}, config)
    if kind != "hf-hub":
        return None
    config = config_beside({"hf_hub_id": location})
    if config is None:
        raise ValueError(f"--model {name}: the repository has no config.json of a ConvNeXt V2 or FCMAE for timm.")
    return Start({"hf_hub_id": location}, config)


def short_name(model: str) -> str:
    """The model's name without the folders that lead to it."""
    return model.rstrip("/").rpartition("/")[2]


def create_model(
    network: Network, crops: Crops, *, seed: int = 0, start: Start | None = None, license: str = ""
) -> FCMAE:
    """The FCMAE of `--model`, with random weights from `seed` or those of `start`.

    Checks the `license` of the exported weights now, rather than at the first export; '' takes the inherited one.
    """
    name, known = network.model, timm.list_models("fcmae_*")
    model_name = start.architecture if start else name
    if model_name.split(".")[0] not in known:
        backbone = f"fcmae_{name.partition('.')[0]}" in known
        near = f" Did you mean 'fcmae_{name}'?" if backbone else closest(name, [*known, *VARIANTS])
        raise ValueError(f"--model {name} is not an FCMAE model.{near} There are: {', '.join(known)}.")
    options: dict[str, Any] = {name: getattr(network, name) for name in OPTIONS}
    options |= {"img_size": crops.size, "in_chans": crops.in_chans}
    if start:
        options |= {"pretrained_cfg_overlay": start.overlay, "start_config": start.config}
    torch.manual_seed(seed)
    try:
        model: Any = timm.create_model(model_name, pretrained=network.pretrained, **options, **network.model_kwargs)
    except (AssertionError, KeyError, TypeError) as e:
        raise ValueError(f"--model-kwargs {network.model_kwargs} does not fit {name}: {e!r}") from e
    for holder in (model.pretrained_cfg, start.overlay if start else {}):
        holder.pop("state_dict", None)  # frees the memory of a file's weights
    model.set_grad_checkpointing(network.grad_checkpointing)
    resolve_license(license or None, model.encoder.pretrained_cfg.get("license"))
    return model


def open_weights(path: str, model: str, model_kwargs: dict[str, Any], license: str) -> Start:
    """Reads weights in the official format (sparse, or dense with or without a classifier), timm's, or an FCMAE's.

    `model` is the variant that takes them, `model_kwargs` more of its arguments, `license` the licence that the user
    states; it is required if the file's is unknown.
    """
    if ":" in model:
        raise ValueError(f"--weights {path} needs a variant as --model, such as fcmae_convnextv2_tiny; got {model}.")
    content = load_checkpoint(path)
    weights = clean_state_dict(weights_in(content))
    run = content.get("args") if "progress" in content else None  # settings, if it is a checkpoint of pretraining
    run = run if isinstance(run, dict) else {}
    origin = origin_of_file(Path(path), weights, run or None)
    variant = VARIANTS.get(model.partition(".")[0].rpartition("_")[2], {})
    if any(name.removeprefix("encoder.").startswith("downsample_layers.") for name in weights):  # the official format
        try:
            weights = convert_official(weights, model_kwargs.get("conv_mlp", variant.get("conv_mlp", False)))
        except ValueError as e:
            raise ValueError(f"--weights {path}: {e}") from e
    config = _config(Path(path), model, bool(run), weights)
    found = _variant_of(weights) or config["architecture"].removeprefix("fcmae_").removeprefix("convnextv2_")
    if variant and VARIANTS[found] != variant:
        raise ValueError(f"--weights {path} is of a {found}, not of a {model}: --model fcmae_convnextv2_{found}.")
    resolve_license(license or None, origin.license, origin.unstated)
    if origin.license:
        config["pretrained_cfg"]["license"] = origin.license
    return Start({"state_dict": weights}, config)


def _stem(weights: dict[str, Tensor]) -> Tensor | None:
    return weights.get("encoder.stem.0.weight", weights.get("stem.0.weight"))


def _variant_of(weights: dict[str, Tensor]) -> str | None:
    """The published variant with the depths and width of weights under timm's names; None for other sizes."""
    names = [name.removeprefix("encoder.").split(".") for name in weights]
    blocks = {(int(n[1]), int(n[3])) for n in names if n[0] == "stages" and n[2] == "blocks" and n[3].isdigit()}
    depths = tuple(sum(stage == s for s, _ in blocks) for stage in range(4))
    stem = _stem(weights)
    size = (depths, None if stem is None else len(stem))
    return next((name for name, v in VARIANTS.items() if (v["depths"], v["dims"][0]) == size), None)


def _config(path: Path, model: str, of_run: bool, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The config.json beside a file, or a minimal one, with the arguments that the weights show.

    A checkpoint of a run (`of_run`) has that of the run's encoder.
    """
    stem = _stem(weights)
    chans, patch = (stem.shape[1], stem.shape[-1]) if stem is not None else (3, 4)
    minimal = {"architecture": model.partition(".")[0], "pretrained_cfg": {"input_size": [chans, 224, 224]}}
    config = config_beside({"file": (path.parent / "encoder" if of_run else path.parent) / WEIGHTS}) or minimal
    shown = {"in_chans": chans, "patch_size": patch}
    if "mask_token" in weights:
        decoder = {name.split(".")[1] for name in weights if name.startswith("decoder.")}
        shown |= {"decoder_dim": weights["mask_token"].shape[1], "decoder_depth": len(decoder)}
    cfg = {**config.get("pretrained_cfg", {})}
    return {**config, "model_args": {**config.get("model_args", {}), **shown}, "pretrained_cfg": cfg}
