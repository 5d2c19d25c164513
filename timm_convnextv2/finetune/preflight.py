"""What is checked before training, each in one message: the model's folder, its weights, the data, the augmentation."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.models import parse_model_name

from ..checkpoint import load_checkpoint
from ..checkpoint.provenance import read_config
from ..console import check_same_classes, closest
from ..models import ConvNeXtV2
from ..registry import filter_weights
from .folders import FolderReader, is_opaque, split_folder

TIMM_FOLDER = "Expected a timm folder: config.json and model.safetensors, as pretraining writes to RUN/encoder."


# -------------------------------------------------------------------------------------------------------------- model


def check_model_folder(folder: Path, need_weights: bool = True) -> str:
    """Architecture that a timm folder names; it need not be a ConvNeXt V2.

    Args:
        folder: Its path.
        need_weights: Whether they are to be loaded.

    Raises:
        ValueError: It is not a timm folder that can be finetuned.
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
            "pretraining wrote to RUN/encoder, or timm_convnextv2.checkpoint.export_encoder makes of it."
        )
    if not timm.is_model(architecture):
        raise ValueError(
            f"{config} names the architecture '{architecture}', which timm {timm.__version__} does not have."
            f"{closest(architecture, timm.list_models('convnextv2_*'))} {TIMM_FOLDER}"
        )
    endings = (".safetensors", ".pth", ".pth.tar", ".bin")
    if need_weights and not any(any(folder.glob(f"*{end}")) for end in endings):
        raise ValueError(f"{folder} has no weights. {TIMM_FOLDER}")
    return architecture


def create_meta_model(
    name: str,
    *,
    need_weights: bool,
    in_chans: int = 3,
    num_classes: int | None = None,
    drop_path: float | None = None,
    global_pool: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """The model that train.py will create, without memory for its weights.

    Args:
        name: As of timm.create_model: a model of timm, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        need_weights: Whether a folder must have weights.
        in_chans, num_classes, drop_path, global_pool, model_kwargs: What train.py hands to timm.create_model.

    Raises:
        ValueError: There is no such model, or its folder is not whole.
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
            return timm.create_model(
                name,
                pretrained=False,
                in_chans=in_chans,
                num_classes=num_classes,
                drop_path_rate=drop_path,
                global_pool=global_pool,
                **(model_kwargs or {}),
            )
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"--model {name} cannot be created: {type(e).__name__}: {reason}") from e


def check_folder_weights(folder: Path, model: torch.nn.Module) -> None:
    """Reads a folder's weights once, before train.py does.

    Args:
        folder: A timm folder.
        model: Made from its config.json; may be without memory.

    Raises:
        ValueError: They are damaged, or do not cover or fit the model; its head may be new.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:  # a name of timm's that is rarer: train.py reads it
        return
    weights = load_checkpoint(files[0])
    if not isinstance(model, ConvNeXtV2):
        if any(".grn." in name for name in weights):
            cfg: Any = model.pretrained_cfg
            raise ValueError(
                f"{files[0]} holds a ConvNeXt V2, and its config.json names the architecture "
                f"'{cfg['architecture']}'. Expected the two files of one export."
            )
        return  # how others rename their weights is timm's affair
    try:
        filter_weights(weights, model)
    except ValueError as e:
        raise ValueError(f"{files[0]} does not fit its config.json: {e}") from e


# --------------------------------------------------------------------------------------------------------------- data


@dataclass
class Split:
    """A folder of images, one sub-folder a class."""

    name: str
    root: Path
    reader: FolderReader

    @property
    def num_images(self) -> int:
        """Images with a class."""
        return len(self.reader)

    @property
    def classes(self) -> list[str]:
        """Names in the order of the class index."""
        return sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.__getitem__)


def check_data(
    data_dir: str | None,
    *,
    dataset: str = "",
    train_split: str = "train",
    val_split: str = "validation",
    class_map: str = "",
    input_key: str | None = None,
) -> list[Split]:
    """Lists the splits of a folder of images: training, and validation unless `val_split` is empty.

    Args:
        data_dir: The folder.
        dataset, train_split, val_split, class_map, input_key: train.py's options.

    Returns:
        The splits; none for other data sets (a tar, `hfds/...`), which are left to train.py.

    Raises:
        ValueError: A split is missing or empty, or the splits differ in their classes.
    """
    if is_opaque(dataset) or data_dir and Path(data_dir).is_file():
        return []
    if not data_dir:
        raise ValueError(
            "--data-dir is needed: a folder with train/ and validation/, in each one sub-folder of images a class."
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"--data-dir {root} does not exist. Expected a folder with train/ and validation/.")
    options: dict[str, Any] = dict(class_map=class_map, input_key=input_key)
    splits = [open_split(root, train_split, "--train-split", **options)]
    if val_split:
        splits.append(open_split(root, val_split, "--val-split", **options))
    train, val = splits[0], splits[-1]
    check_same_classes(
        train.classes,
        val.classes,
        (train.root, val.root),
        ordered=False,
        remedy="Both need a sub-folder with images for every class, of the same name.",
    )
    return splits


def open_split(root: Path, split: str, option: str, **options: Any) -> Split:
    """Lists one split.

    Args:
        root: The data folder.
        split: Name of the split.
        option: That gave it, for messages.
        options: Of `FolderReader`.

    Raises:
        ValueError: There is no folder of that name, or no images or no classes in it.
    """
    expected = f"Expected {root / split} with one sub-folder of images a class, or another {option}."
    folder = split_folder(root, split)
    # without such a folder timm takes the root itself for the split, and `train` for a class
    if folder.resolve() == root.resolve():
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        listed = ", ".join(there[:10]) or "no folders"
        raise ValueError(f"{root} has no {option} '{split}'; it has {listed}. {expected}")
    try:
        reader = FolderReader(folder, **options)
    except ValueError as e:
        raise ValueError(f"{option} {split} of {root}: {e} {expected}") from e
    if "" in reader.class_to_idx:
        raise ValueError(f"{folder} has images that lie in no sub-folder, so that their class is unknown. {expected}")
    return Split(split, folder, reader)


# --------------------------------------------------------------------------------------------- device and augmentation


def check_augmentation(policy: str | None) -> None:
    """Refuses a random augmentation that would stop the run at some image.

    At its full strength timm's Posterize keeps 0 bits, a black image; Pillow 13 raises an error instead.

    Args:
        policy: train.py's --aa.

    Raises:
        ValueError: The policy can ask for that, and the installed Pillow refuses it.
    """
    bounded = re.search(r"-mmax(\d+)", policy or "")
    if not policy or "-inc1" in policy and bounded and int(bounded[1]) < 10:
        return
    try:
        posterize(Image.new("RGB", (1, 1)), 0)
    except ValueError as e:
        policy = f"{policy}-mmax9" if "-inc1" in policy and not bounded else "rand-m9-mstd0.5-inc1-mmax9"
        raise ValueError(
            f"--aa needs another Pillow: timm {timm.__version__} posterizes to 0 bits, which Pillow {PIL.__version__} "
            f"refuses ({e}), so that the run would stop at some image. Install an older one (pip install 'pillow<13'), "
            f"or keep the strength below its maximum, which differs a little from the paper: --aa {policy}"
        ) from e
