"""Export of an encoder or a whole FCMAE to a timm folder, and the writer of such folders."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..config import read_json
from ..console import count
from ..data import Pixels
from ..files import new_part, remove_leftovers, sync, write_errors
from ..models import FCMAE
from ..models.weights import check_weights, first_not_finite
from ..version import __version__
from .card import images_in, render_card
from .provenance import WEIGHTS, resolve_license

# The entries of a `pretrained_cfg` that still hold after training, whatever the weights started from.
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
    """Writes a timm folder for `model`, made by timm's factory, with other `weights`; see `place_folder`.

    Args:
        data: `input_size` and the other keys of timm's `resolve_data_config`.
        license: Replaces the licence in `pretrained_cfg`.
        training: The section of that name in `config.json`, see `card`; rows about the model precede its table.
    """
    labels = {"label_names": list(label_names)} if label_names else {}
    # timm.models.save_for_hf would need a second copy of the model for other weights
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.json"
        save_config_for_hf(model, str(path), model_config=labels, data_config=data)
        config = read_json(path)
    cfg = config["pretrained_cfg"]
    # also at the top level; transformers' wrapper would pass it to timm.create_model twice
    config.get("model_args", {}).pop("num_classes", None)
    cfg.pop("license", None)
    if license:
        cfg["license"] = license
    chans, height, width = cfg["input_size"]
    rows = {
        "Image size": f"{height} x {width}, {count(chans, 'channel')}",
        "Mean, standard deviation": f"{cfg['mean']}, {cfg['std']}",
        **(training.get("table") or {}),
    }
    config["training"] = {**training, **how_made(weights, rows)}
    return place_folder(folder, weights, config, render_card)


def how_made(weights: dict[str, Tensor], rows: dict[str, Any]) -> dict[str, Any]:
    """The keys `made_with` and `table` of the section `training`."""
    size = {"Parameters": f"{sum(v.numel() for v in weights.values()) / 1e6:.1f} M"}
    versions = {"timm_convnextv2": __version__, "timm": timm.__version__, "torch": torch.__version__}
    return {"made_with": versions, "table": {k: str(v) for k, v in (size | rows).items()}}


def place_folder(
    folder: str | os.PathLike,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    render: Callable[[dict[str, Any], list[str]], str],
) -> Path:
    """Writes weights, config.json and README.md beside `folder` and moves them into it; its other files stay.

    `render` makes the README.md from the config and the names of the images in the folder. A weight that is not finite
    is a `ValueError`, a folder that cannot be written a `WriteError`.
    """
    # safetensors needs contiguous tensors that share no memory; channels_last weights are not contiguous
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    if bad := first_not_finite(weights):
        raise ValueError(f"The weights were not written to '{folder}': '{bad}' has values that are not finite.")
    folder = Path(folder).resolve()  # a file moves only within its file system, so write beside the target of a link
    remove_leftovers(folder.parent, [folder.name])  # a killed export leaves files as large as the model
    temporary, names = new_part(folder), (WEIGHTS, "config.json", "README.md")
    try:
        with write_errors(f"The folder '{folder}'"):
            temporary.mkdir(parents=True)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(temporary / "config.json", temporary / WEIGHTS)  # safetensors lets only the owner read
            (temporary / "README.md").write_text(render(config, images_in(folder)), encoding="utf-8")
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                sync(temporary / name)
            # weights first: a config.json marks a complete folder, also after a crash between two moves; that of
            # another model goes before them, because it would describe the new weights until the next move
            if _describes_another(folder / "config.json", config):
                (folder / "config.json").unlink(missing_ok=True)
            for name in names:
                os.replace(temporary / name, folder / name)
            sync(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _describes_another(path: Path, config: dict[str, Any]) -> bool:
    """False if a `config.json` differs from the new one in the rows of the card's table only, as within a run."""
    try:
        old = read_json(path)
        old["training"]["table"] = config["training"]["table"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return old != json.loads(json.dumps(config))


def _description(
    model: FCMAE,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
    pixels: Pixels | None = None,
) -> dict[str, Any]:
    """`data`, `license` and `training` for `write_folder`."""
    cfg = getattr(model.encoder, "pretrained_cfg", None)
    if cfg is None:
        raise ValueError(
            "A timm folder names an architecture, but this FCMAE was built without one: use "
            "timm.create_model('fcmae_convnextv2_tiny', depths=..., dims=..., ...) instead of FCMAE(...)."
        )
    inherited = cfg.get("license")
    data: dict[str, Any] = {"input_size": (model.in_chans, *model.img_size)}
    for key, value in (("mean", mean), ("std", std)):
        if value is not None:
            if len(value) not in (1, model.in_chans):
                raise ValueError(
                    f"{key} has {count(len(value), 'value')}, but the model has {count(model.in_chans, 'channel')}."
                )
            data[key] = tuple(float(v) for v in value)
    training = {"table": info, "base_model": model.base_model, "inherited_license": inherited}
    if record := pixels.check(model.in_chans).record() if pixels else {}:
        training["pixels"] = record
    return {"data": data, "license": resolve_license(license, inherited), "training": training}


def export_encoder(
    model: FCMAE,
    folder: str | os.PathLike,
    *,
    state_dict: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
    pixels: Pixels | None = None,
) -> Path:
    """Writes the encoder as a timm folder: `config.json`, `model.safetensors`, `README.md`.

    Stock timm opens it as `timm.create_model("local-dir:FOLDER", pretrained=True, ...)`. The files are written beside
    the folder and moved into it once all are complete; its other files stay. In distributed training, call this on one
    rank.

    Args:
        model: From `timm.create_model("fcmae_convnextv2_*", ...)`.
        folder: Created if needed.
        state_dict: Weights of the whole FCMAE to export instead of the model's own, such as its EMA.
        mean, std: Normalisation, one value or one per channel; by default that of the encoder's `pretrained_cfg`.
        license: Licence by its id on the Hub; None states none. Weights that started from others under a stated licence
            (the published ones: cc-by-nc-4.0) keep that licence.
        info: Rows for the table in the README (data, epochs, settings).
        pixels: How stored values became pixels, if not in the default way; all commands then do the same.

    Raises:
        ValueError: The model was not made by timm's factory, the weights do not fit or are not finite, the licence
            contradicts the inherited one, or mean or std have the wrong length.
        WriteError: (an OSError) The folder cannot be written.
    """
    weights = model.encoder.state_dict()
    description = _description(model, mean, std, license, info, pixels)
    if state_dict is not None:
        own, prefix = weights, "encoder."
        weights = {k[len(prefix) :]: v for k, v in clean_state_dict(state_dict).items() if k.startswith(prefix)}
        check_weights(weights, own, "Not weights of this FCMAE's encoder")
    return write_folder(model.encoder, weights, folder, **description)


def export_fcmae(
    model: FCMAE, folder: str | os.PathLike, *, state_dict: dict[str, Tensor] | None = None, **options: Any
) -> Path:
    """Writes the whole FCMAE, decoder included, as a timm folder from which pretraining can continue.

    With this package imported, `timm.create_model("local-dir:FOLDER", pretrained=True)` returns the model with its
    options. Stock timm does not have the architecture. `options` and errors are those of `export_encoder`.
    """
    weights = model.state_dict()
    description = _description(model, **options)
    if state_dict is not None:
        own, weights = weights, clean_state_dict(state_dict)
        check_weights(weights, own, "Not weights of this FCMAE")
    cfg: Any = model.encoder.pretrained_cfg
    described: Any = copy.copy(model)  # shallow: the weights stay shared
    described.pretrained_cfg = {
        **{k: cfg[k] for k in (*KEEP, *PAPER, "origin_url") if k in cfg},
        "architecture": f"fcmae_{cfg['architecture']}",
        "first_conv": "encoder.stem.0",
        "classifier": None,
    }
    described._traits = {**described._traits, "img_size": tuple(model.img_size)}
    return write_folder(described, weights, folder, **description)
