"""Checks of a model and its weights before timm's script loads them, each with one message."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, parse_model_name

from ..checkpoint.loading import model_pixels, weights_in
from ..checkpoint.provenance import read_config
from ..console import closest
from ..data import Pixels
from ..files import load_checkpoint
from ..hub_errors import HUB_ERRORS, hub_error
from ..models import ConvNeXtV2
from ..models.weights import check_weights
from ..registry import filter_weights
from .options import ScriptOptions, fit_channels

TIMM_FOLDER = "Expected a timm folder: config.json and model.safetensors, as pretraining writes to RUN/encoder."
WEIGHT_FILES = ("*.safetensors", "*.pth", "*.pth.tar", "*.bin")


def check_model_folder(folder: Path, need_weights: bool = True) -> None:
    """Refuses a folder that is not a timm folder that can be finetuned; it need not be a ConvNeXt V2."""
    if not folder.is_dir():
        raise ValueError(f"--model local-dir:{folder}: there is no such folder. {TIMM_FOLDER}")
    config = folder / "config.json"
    if not config.is_file():
        inner = [name for name in ("encoder", "model") if (folder / name / "config.json").is_file()]
        hint = f" Did you mean local-dir:{folder / inner[0]}?" if inner else ""
        raise ValueError(f"--model local-dir:{folder}: it has no config.json.{hint} {TIMM_FOLDER}")
    architecture = read_config(config, ours=False)["architecture"]
    if architecture.startswith("fcmae_"):
        raise ValueError(
            f"{folder} holds a whole FCMAE ({architecture}), decoder included. Finetune its encoder: the folder that "
            "pretraining wrote to RUN/encoder, or that timm_convnextv2.checkpoint.export_encoder writes."
        )
    if not timm.is_model(architecture):
        raise ValueError(
            f"{config} names the architecture '{architecture}', which timm {timm.__version__} does not have."
            f"{closest(architecture, timm.list_models('convnextv2_*'))} {TIMM_FOLDER}"
        )
    if need_weights and not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise ValueError(f"{folder} has no weights. {TIMM_FOLDER}")


def create_meta_model(name: str, *, need_weights: bool, **kwargs: Any) -> torch.nn.Module:
    """The model that timm's script will create, on the meta device; with `need_weights` a folder must have weights."""
    try:
        source, path = parse_model_name(name)
    except ValueError as e:
        raise ValueError(f"--model: {e}") from e
    if source == "local-dir":
        check_model_folder(Path(path), need_weights=need_weights)
    elif source is None and not timm.is_model(path.split(".")[0]):
        known = timm.list_models("convnextv2_*")
        raise ValueError(f"--model {path} is no model of timm.{closest(path, known)} ConvNeXt V2: {', '.join(known)}.")
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **kwargs)
    except (*HUB_ERRORS, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as e:
        if source == "hf-hub" and isinstance(e, HUB_ERRORS):
            raise hub_error(e, path, "config.json", "give local-dir:FOLDER") from e
        raise ValueError(f"--model {name} cannot be created: {type(e).__name__}: {' '.join(str(e).split())}") from e


def create_fitted_model(
    options: ScriptOptions, *, need_weights: bool, check_weights: bool, **kwargs: Any
) -> tuple[ScriptOptions, torch.nn.Module, list[str]]:
    """The script's model on the meta device; channels, size, mean and std that only the model's config has are set.

    `check_weights` reads the weights, because the script will load them. Returns the options, the model, and notes.
    """
    kwargs |= {"num_classes": options.num_classes, "need_weights": need_weights, **(options.model_kwargs or {})}
    model = create_meta_model(options.model, in_chans=options.channels, **kwargs)
    if not options.in_chans and not options.input_size:
        cfg: Any = model.pretrained_cfg
        in_chans = (cfg.get("input_size") or (3,))[0]
        if in_chans != 3:  # the script would build 3 channels
            options = options.evolve(in_chans=in_chans)
            model = create_meta_model(options.model, in_chans=in_chans, **kwargs)
    source, folder = parse_model_name(options.model)
    if source == "local-dir" and check_weights:
        check_folder_weights(Path(folder), model)
    options, notes = fit_channels(options, model)
    return options, model, notes


def check_folder_weights(folder: Path, model: torch.nn.Module) -> None:
    """Refuses a timm folder whose weights are corrupt or do not fit its config; the classifier may differ."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:  # timm accepts rarer names; the script reads those
        return
    weights = load_checkpoint(files[0])
    _check_filtered(weights, model, f"{files[0]} does not fit its config.json")
    if not isinstance(model, ConvNeXtV2) and any(".grn." in name for name in weights):
        cfg: Any = model.pretrained_cfg
        raise ValueError(
            f"{files[0]} holds a ConvNeXt V2, but its config.json names the architecture '{cfg['architecture']}'. "
            "Expected the two files of one export."
        )


def _check_filtered(weights: dict[str, Any], model: torch.nn.Module, where: str) -> None:
    try:
        if isinstance(model, ConvNeXtV2):
            filter_weights(weights, model)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def check_weights_file(option: str, path: str, model: torch.nn.Module) -> None:
    """Refuses a file of weights that is missing, corrupt or not of this model.

    timm converts the names of --pretrained-path, whose classifier may differ; it loads the others as they are.
    """
    if path.lower().endswith((".npz", ".npy")):  # only other architectures take them, by code of their own
        return
    content = load_checkpoint(path)
    resumed = option == "--resume" and isinstance(content.get("state_dict"), dict)
    weights = clean_state_dict(content["state_dict"] if resumed else weights_in(content))
    if option == "--pretrained-path":
        return _check_filtered(weights, model, f"{option} {path}")
    remedy = {
        "--resume": "Give a checkpoint of this run, such as last.pth.tar; weights to start from are --pretrained "
        f"--pretrained-path {path}.",
        "--initial-checkpoint": f"--pretrained --pretrained-path {path} also takes an encoder without classifier, a "
        "classifier of other classes, and the names of transformers, MMPretrain and the official code.",
    }.get(option, "Give a checkpoint of this model, or its exported folder as --model local-dir:FOLDER.")
    what = f"{option} {path} is loaded without conversion, but is not of this model"
    check_weights(weights, model.state_dict(), f"{what} (first names: {sorted(weights)[:3]})", remedy=remedy)


def choose_pixels(
    nodata: float | None, model: str, in_chans: int, record: dict[str, Any] | None = None
) -> tuple[Pixels, list[str]]:
    """How stored values become pixels: by `record`, else as in the images that the model was trained on; and notes.

    A `nodata` that is not None replaces that of the record.
    """
    inherited = Pixels.from_record(record) if record else model_pixels(model, in_chans)
    pixels = (inherited if nodata is None else inherited._replace(nodata=nodata)).check(in_chans)
    if inherited.plain or record:
        return pixels, []
    remedy = f"; --nodata={nodata:g} replaces that" if nodata is not None else "; --nodata=nan: none"
    remedy = "" if inherited.nodata is None else remedy
    return pixels, [f"Pixels are read as {model} was trained on them: {inherited}{remedy}."]
