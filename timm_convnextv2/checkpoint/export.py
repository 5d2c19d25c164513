"""Export to a timm folder: an encoder, a whole FCMAE; how such a folder is written."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..data import Pixels
from ..files import WriteError, new_part, remove_leftovers, sync, system_reason
from ..models import FCMAE
from ..models.weights import check_weights, first_not_finite
from .card import IMAGES, render_card
from .provenance import WEIGHTS, resolve_license

# What of a `pretrained_cfg` is true of weights that were trained on, whatever they started from.
KEEP = ("architecture", "input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "crop_mode")
KEEP += ("mean", "std", "num_classes", "first_conv", "classifier")
PAPER = ("paper_name", "paper_ids")


def write_folder(
    model: nn.Module,
    weights: dict[str, Tensor],
    folder: str | os.PathLike,
    *,
    data: dict[str, Any],
    license: str | None,
    training: dict[str, Any],
    label_names: Sequence[str] | None = None,
) -> Path:
    """Writes a timm folder for `model` with other `weights`; see `export_encoder` for what happens to the folder.

    Args:
        model: What timm's factory made, on any device; gives the architecture, its options and `pretrained_cfg`.
        weights: Checked.
        folder: Where to.
        data: `input_size` and what else timm's `resolve_data_config` takes.
        license: Licence of the weights; replaces the one in `pretrained_cfg`.
        training: The section of that name in `config.json`, see `card`; its table follows rows on the model.
        label_names: Names of the classes in the order of the model's outputs.

    Raises:
        ValueError: A weight is not finite.
        WriteError: (an OSError) The folder cannot be written; what was there stays.
    """
    # safetensors wants contiguous tensors that share no memory, channels_last weights are not contiguous
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    bad = first_not_finite(weights)
    if bad:
        raise ValueError(f"The weights were not written to '{folder}': '{bad}' has values that are not finite.")
    folder = Path(folder).resolve()  # of a link, the target: a file moves only within its file system
    remove_leftovers(folder.parent, [folder.name])  # of an export that was killed: as large as a model
    temporary = new_part(folder)
    try:
        temporary.mkdir(parents=True)
        _write_files(
            model, weights, folder, temporary, data=data, license=license, training=training, label_names=label_names
        )
        sync(folder)
        sync(folder.parent)
    except Exception as e:
        reason = system_reason(e)
        if reason is None:
            raise
        raise WriteError(f"The folder '{folder}' cannot be written: {reason}.") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_files(
    model: nn.Module,
    weights: dict[str, Tensor],
    folder: Path,
    temporary: Path,
    *,
    data: dict[str, Any],
    license: str | None,
    training: dict[str, Any],
    label_names: Sequence[str] | None,
) -> None:
    """Writes the files to `temporary`, and moves them when all are complete."""
    from .. import __version__

    # what timm.models.save_for_hf writes, without a second copy of the model for other weights
    labels = {"label_names": list(label_names)} if label_names else {}
    save_config_for_hf(model, str(temporary / "config.json"), model_config=labels, data_config=data)
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    cfg = config["pretrained_cfg"]
    # said at the top, too: transformers' wrapper would hand it to timm.create_model twice
    config.get("model_args", {}).pop("num_classes", None)
    cfg.pop("license", None)
    if license:
        cfg["license"] = license
    size = cfg["input_size"]
    rows = {
        "Parameters": f"{sum(v.numel() for v in weights.values()) / 1e6:.1f} M",
        "Image size": f"{size[1]} x {size[2]}, {size[0]} channels",
        "Mean, standard deviation": f"{cfg['mean']}, {cfg['std']}",
        **(training.get("table") or {}),
    }
    versions = {"timm_convnextv2": __version__, "timm": timm.__version__, "torch": torch.__version__}
    config["training"] = {**training, "made_with": versions, "table": {k: str(v) for k, v in rows.items()}}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(temporary / "config.json", temporary / WEIGHTS)  # safetensors lets only the owner read
    images = [name for name in IMAGES if (folder / name).is_file()]
    (temporary / "README.md").write_text(render_card(config, images), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    names = (WEIGHTS, "config.json", "README.md")
    for name in names:
        sync(temporary / name)
    for name in names:
        os.replace(temporary / name, folder / name)


def _pretraining_data(
    model: FCMAE, mean: Sequence[float] | None, std: Sequence[float] | None, img_size: tuple[int, int] | None
) -> dict[str, Any]:
    """Image size, mean and standard deviation as timm's data config."""
    data: dict[str, Any] = {"input_size": (model.in_chans, *(img_size or model.img_size))}
    for key, value in (("mean", mean), ("std", std)):
        if value is not None:
            if len(value) not in (1, model.in_chans):
                raise ValueError(f"{key} has {len(value)} values, the model {model.in_chans} channels.")
            data[key] = tuple(float(v) for v in value)
    return data


def _encoder_cfg(model: FCMAE) -> dict[str, Any]:
    cfg = getattr(model.encoder, "pretrained_cfg", None)
    if cfg is None:
        raise ValueError(
            "A timm folder names an architecture, and this FCMAE was not made under one: use "
            "timm.create_model('fcmae_convnextv2_tiny', depths=..., dims=..., ...) instead of FCMAE(...)."
        )
    return cfg


def _pretraining(
    model: FCMAE, inherited: str | None, info: dict[str, Any] | None, pixels: Pixels | None
) -> dict[str, Any]:
    """The section `training` of config.json, see `card`."""
    training = {"table": info, "base_model": model.base_model, "inherited_license": inherited}
    record = pixels.check(model.in_chans).record() if pixels else {}
    return {**training, "pixels": record} if record else training


def export_encoder(
    model: FCMAE,
    folder: str | os.PathLike,
    *,
    state_dict: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: tuple[int, int] | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
    pixels: Pixels | None = None,
) -> Path:
    """Writes the encoder as a timm folder: `config.json`, `model.safetensors`, `README.md`.

    Stock timm opens it as `timm.create_model("local-dir:FOLDER", pretrained=True, ...)`, with a classifier, headless
    or as `features_only`. The files are written beside the folder and moved into it one by one when all are complete;
    other files in the folder stay. In distributed training call it on one rank.

    Args:
        model: From `timm.create_model("fcmae_convnextv2_*", ...)`.
        folder: Where to; it and its parents are made if needed.
        state_dict: Weights of the whole FCMAE to export instead of the model's own (their EMA, a checkpoint);
            prefixes of DDP and torch.compile are taken off.
        mean: Normalisation of the images, one value or one a channel; that of `model.encoder.pretrained_cfg` if None.
        std: Likewise.
        img_size: Image size (H, W) of the pretraining; `model.img_size` if None.
        license: Licence of the weights, by its id on the Hugging Face Hub. None states none. Weights that started from
            others under a stated licence (the published ones: cc-by-nc-4.0) keep it.
        info: How the weights were made (data, epochs, settings), for a table in the README.
        pixels: How stored values became pixels, where that was not the usual way; all commands then do the same.

    Returns:
        The folder.

    Raises:
        ValueError: A model that timm's factory did not make, weights that do not fit, a licence that contradicts the
            one the weights started from, a mean or std of another length than 1 and the number of channels, or a
            weight that is not finite.
        OSError: The folder cannot be written; what was there stays.
    """
    inherited = _encoder_cfg(model).get("license")
    license = resolve_license(license, inherited)
    own = model.encoder.state_dict()
    weights = own
    if state_dict is not None:
        state_dict = clean_state_dict(state_dict)
        weights = {k[len("encoder.") :]: v for k, v in state_dict.items() if k.startswith("encoder.")}
        check_weights(weights, own, "Not weights of this FCMAE's encoder")
    data = _pretraining_data(model, mean, std, img_size)
    training = _pretraining(model, inherited, info, pixels)
    return write_folder(model.encoder, weights, folder, data=data, license=license, training=training)


def export_fcmae(
    model: FCMAE,
    folder: str | os.PathLike,
    *,
    state_dict: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: tuple[int, int] | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
    pixels: Pixels | None = None,
) -> Path:
    """Writes the whole FCMAE, decoder too, as a timm folder, to continue the pretraining.

    With this package imported, `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model back, options
    included, and so do `hf-hub:user/name` and `pretrained_cfg_overlay=dict(hf_hub_id="user/name")` once it is
    published. Stock timm does not know the architecture: for finetuning, export the encoder.

    Args and errors are those of `export_encoder`.
    """
    cfg = _encoder_cfg(model)
    inherited = cfg.get("license")
    license = resolve_license(license, inherited)
    own = model.state_dict()
    weights = own
    if state_dict is not None:
        weights = clean_state_dict(state_dict)
        check_weights(weights, own, "Not weights of this FCMAE")
    data = _pretraining_data(model, mean, std, img_size)
    described: Any = copy.copy(model)  # shares everything but what is set here
    described.pretrained_cfg = {
        **{k: cfg[k] for k in (*KEEP, *PAPER, "origin_url") if k in cfg},
        "architecture": f"fcmae_{cfg['architecture']}",
        "first_conv": "encoder.stem.0",
        "classifier": None,
    }
    traits: Any = model._traits
    described._traits = {**traits, "img_size": data["input_size"][1:]}
    training = _pretraining(model, inherited, info, pixels)
    return write_folder(described, weights, folder, data=data, license=license, training=training)
