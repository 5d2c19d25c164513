"""Checks of a model and its weights before timm's script loads them, each with one message."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, parse_model_name

from ..checkpoint.files import model_pixels, weights_in
from ..checkpoint.provenance import read_config
from ..console import closest
from ..data import Pixels
from ..files import load_checkpoint
from ..models import ConvNeXtV2
from ..models.weights import check_weights
from ..registry import filter_weights

TIMM_FOLDER = "Expected a timm folder: config.json and model.safetensors, as pretraining writes to RUN/encoder."
WEIGHT_FILES = ("*.safetensors", "*.pth", "*.pth.tar", "*.bin")


def check_model_folder(folder: Path, need_weights: bool = True) -> None:
    """Checks that a folder is a timm folder that can be finetuned; it need not be a ConvNeXt V2.

    Raises:
        ValueError: The folder is missing, incomplete or in another format.
    """
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
    """The model that timm's script will create, on the meta device: without memory for its weights.

    Args:
        name: As of timm.create_model: a model of timm, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        need_weights: Whether a folder must have weights.
        kwargs: Other arguments of timm.create_model.

    Raises:
        ValueError: There is no such model, or its folder is incomplete.
    """
    try:
        source, path = parse_model_name(name)
    except ValueError as e:
        raise ValueError(f"--model: {e}") from e
    if source == "local-dir":
        check_model_folder(Path(path), need_weights=need_weights)
    elif source is None and not timm.is_model(path.split(".")[0]):
        known = timm.list_models("convnextv2_*")
        raise ValueError(
            f"--model {path} is not a model of timm.{closest(path, known)} ConvNeXt V2: {', '.join(known)}."
        )
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **kwargs)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"--model {name} cannot be created: {type(e).__name__}: {' '.join(str(e).split())}") from e


def check_folder_weights(folder: Path, model: torch.nn.Module) -> None:
    """Reads the weights of a timm folder once, before the script does.

    Args:
        folder: The folder.
        model: The model of its config.json; may be on the meta device.

    Raises:
        ValueError: The weights are corrupt, incomplete or of another model; the classifier may differ.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:  # timm accepts rarer names; the script reads those
        return
    weights = load_checkpoint(files[0])
    if isinstance(model, ConvNeXtV2):
        _check_filtered(weights, model, f"{files[0]} does not fit its config.json")
    elif any(".grn." in name for name in weights):
        cfg: Any = model.pretrained_cfg
        raise ValueError(
            f"{files[0]} holds a ConvNeXt V2, but its config.json names the architecture '{cfg['architecture']}'. "
            "Expected the two files of one export."
        )


def _check_filtered(weights: dict[str, Any], model: ConvNeXtV2, where: str) -> None:
    try:
        filter_weights(weights, model)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def check_weights_file(option: str, path: str, model: torch.nn.Module) -> None:
    """Reads a file of weights once, before timm's script does.

    Args:
        option: '--initial-checkpoint', '--resume' or '--checkpoint', whose weights timm loads without conversion, or
            '--pretrained-path', whose names are converted and whose classifier may differ.
        path: Its value.
        model: The model that gets the weights; may be on the meta device.

    Raises:
        ValueError: The file is missing or corrupt, or its weights do not fit the model.
    """
    if path.lower().endswith((".npz", ".npy")):  # only other architectures take them, by code of their own
        return
    content = load_checkpoint(path)
    resumed = option == "--resume" and isinstance(content.get("state_dict"), dict)
    weights = clean_state_dict(content["state_dict"] if resumed else weights_in(content))
    if option == "--pretrained-path":
        if isinstance(model, ConvNeXtV2):
            _check_filtered(weights, model, f"{option} {path}")
        return
    remedy = {
        "--resume": "Give a checkpoint of this run, such as last.pth.tar; weights to start from are --pretrained "
        f"--pretrained-path {path}.",
        "--initial-checkpoint": f"--pretrained --pretrained-path {path} also takes an encoder without classifier, a "
        "classifier of other classes, and the names of transformers, MMPretrain and the official code.",
    }.get(option, "Give a checkpoint of this model, or its exported folder as --model local-dir:FOLDER.")
    what = (
        f"{option} {path} is loaded without conversion, but is not of this model (first names: {sorted(weights)[:3]})"
    )
    check_weights(weights, model.state_dict(), what, remedy=remedy)


def choose_pixels(
    nodata: float | None, model: str, in_chans: int, record: dict[str, Any] | None = None
) -> tuple[Pixels, list[str]]:
    """How stored values become pixels: as in the images that the model was trained on, unless the user says otherwise.

    Args:
        nodata: Value of --nodata; None keeps the model's.
        model: Name for timm's factory; only a folder or a repository has a record of pixels.
        in_chans: Channels of the images.
        record: Replaces the model's record.

    Returns:
        The pixels, and notes for the user.

    Raises:
        ValueError: The record is for another number of channels.
    """
    inherited = Pixels.from_record(record) if record else model_pixels(model, in_chans)
    pixels = (inherited if nodata is None else inherited._replace(nodata=nodata)).check(in_chans)
    if inherited.plain or record:
        return pixels, []
    remedy = f"; --nodata={nodata:g} replaces that" if nodata is not None else "; --nodata=nan: none"
    remedy = "" if inherited.nodata is None else remedy
    return pixels, [f"Pixels are read as {model} was trained on them: {inherited}{remedy}."]
