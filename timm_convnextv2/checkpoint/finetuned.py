"""Export of a classifier trained by timm's train.py as a timm folder with its settings, metrics and provenance."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import clean_state_dict

from ..config import read_json
from ..console import count
from ..files import load_checkpoint, read_rows
from ..hub_errors import HUB_ERRORS, hub_error
from ..models import ConvNeXtV2
from ..models.weights import check_weights
from .export import KEEP, PAPER, write_folder
from .loading import weights_in
from .provenance import Origin, origin_of_config, origin_of_file, read_config, resolve_license

LABEL_NAMES = "label_names.json"  # in a run's folder: a list of the classes in the order of their index
BEST = ("model_best.pth.tar", "last.pth.tar")


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint to export for `path`, a file or the output folder of timm's train.py; ValueError without one."""
    path = Path(path)
    if not path.is_dir():
        return path
    if best := [path / name for name in BEST if (path / name).is_file()]:
        return best[0]
    if others := sorted(p.name for p in path.glob("*.pth.tar")):
        raise ValueError(f"'{path}' has no {' and no '.join(BEST)}; name one of {', '.join(others)}.")
    what = "is a timm folder already" if (path / "config.json").is_file() else "has no checkpoint"
    raise ValueError(f"'{path}' {what}, expected the output folder of timm's train.py ({', '.join(BEST)}).")


def _args_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of train.py in one of its checkpoints, which are an argparse.Namespace there."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(args, dict) and "mask_ratio" in args:
        raise ValueError(
            f"'{path}' is a checkpoint of a pretraining run, which has no classifier: its encoder is in "
            f"'{path.parent / 'encoder'}', and export_fcmae (`timm-convnextv2 publish --part fcmae`) writes all of it."
        )
    if not isinstance(checkpoint.get("state_dict"), dict) or not isinstance(args, dict) or "model" not in args:
        missing = "weights ('state_dict')" if not isinstance(checkpoint.get("state_dict"), dict) else "options ('args')"
        raise ValueError(f"'{path}' is not a checkpoint of timm's train.py: it has no {missing}.")
    return args


# ---------------------------------------------------------------------------------------------------------- provenance


def _model_name(args: dict[str, Any], folder: Path) -> str:
    """The model's name for timm's factory; the copy of config.json in the run replaces a start folder that moved."""
    name = args["model"]
    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub", "hf_hub"):
        return name
    if (folder / "config.json").is_file():
        return f"local-dir:{folder}"
    if source == "local-dir" and not (Path(place) / "config.json").is_file():
        raise ValueError(
            f"Training started from '{name}', but '{Path(place) / 'config.json'}', which names the architecture and "
            "the licence, is missing. Restore the folder, call this from the folder where the training was started, "
            f"or copy that config.json to '{folder}'."
        )
    return name


def origin_of_run(
    args: dict[str, Any], name: str, cfg: dict[str, Any], folder: Path, followed: tuple[Path, ...] = ()
) -> Origin:
    """The provenance of the weights that a run with the options `args` started from; empty if they were random.

    `name` is the model's present name for timm's factory, `cfg` its `pretrained_cfg`. `folder` is the run's, which is
    searched for files that are missing at the paths in `args`; a file that is in neither place is a `ValueError`.
    `followed` are the checkpoints on the way here.
    """
    # in this order: what train.py loads last replaces earlier weights
    keys = ("resume", "initial_checkpoint", *(("pretrained_path",) if args.get("pretrained") else ()))
    for key in filter(args.get, keys):
        path = Path(args[key])
        if not path.is_file() and (folder / path.name).is_file():  # the run was moved together with its files
            path = folder / path.name
        if path.resolve() in followed or key == "resume" and not path.is_file() and path.resolve().parent == folder:
            continue  # the run resumed itself; train.py has replaced the file since (tmp.pth.tar) or removed an old one
        if not path.is_file():
            raise ValueError(
                f"Training continued from '{path}' (--{key.replace('_', '-')}), which is missing: the licence of the "
                "weights is unknown. Restore the file, or call this from the folder where training was started."
            )
        return _origin_of_file(path, folder, followed)
    if not args.get("pretrained"):
        return Origin()
    if name.startswith("local-dir:"):
        hub_id = args["model"].partition(":")[2] if args["model"].startswith(("hf-hub:", "hf_hub:")) else None
        return origin_of_config(read_config(Path(name.partition(":")[2]) / "config.json"), hub_id)
    return origin_of_config(cfg, cfg.get("hf_hub_id"))


def _origin_of_file(path: Path, folder: Path, followed: tuple[Path, ...]) -> Origin:
    """The provenance of the weights in a file: by the options in a checkpoint of train.py, else by the file itself."""
    content = load_checkpoint(path)
    before = content.get("args")
    if isinstance(before, argparse.Namespace) and hasattr(before, "model") and "state_dict" in content:
        before = vars(before)
        name = _model_name(before, path.parent)
        model: Any = timm.create_model(name, pretrained=False, device="meta")
        origin = origin_of_run(before, name, model.pretrained_cfg, folder, (*followed, path.resolve()))
        stated = before.get("license")  # by `finetune --license`
        return origin if origin.license or not stated else origin._replace(license=stated, unstated=None)
    run = before if isinstance(before, dict) and "mask_ratio" in before else None
    return origin_of_file(path, weights_in(content), run)


# ----------------------------------------------------------------------------------------------------------- the card


def _metrics(summary: Path, checkpoint: dict[str, Any], args: dict[str, Any], ema: bool) -> dict[str, Any] | None:
    """The metrics that train.py measured for exactly these weights; None if it measured others, or nothing."""
    evaluated_ema = "state_dict_ema" in checkpoint and not args.get("model_ema_force_cpu")
    if ema != evaluated_ema or not summary.is_file():
        return None
    rows = [row for row in read_rows(summary)[0] if row["epoch"] == str(checkpoint.get("epoch"))]
    found = {}
    for key in ("top1", "top5", "loss"):
        try:  # the last row of a repeated epoch
            value = float(str(rows[-1].get(f"eval_{key}") or "nan")) if rows else math.nan
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            found[key] = round(value, 4)
    return {**found, "dataset": _dataset(args), "split": args.get("val_split") or None} if found else None


def added_epochs(args: Mapping[str, Any]) -> dict[str, int]:
    """Epochs that train.py adds to --epochs: the warmup, if --warmup-prefix is set, and the cooldown."""
    added = {"warmup": args.get("warmup_epochs") if args.get("warmup_prefix") else 0}
    added["cooldown"] = args.get("cooldown_epochs")
    return {name: n if isinstance(n, int) else 0 for name, n in added.items()}  # a report reads any args.yaml


def all_epochs(args: Mapping[str, Any]) -> int:
    """The epochs of a run of train.py, warmup and cooldown included."""
    return (args.get("epochs") or 0) + sum(added_epochs(args).values())


def _dataset(args: dict[str, Any]) -> str | None:
    folder = args.get("data_dir") or args.get("data")
    return args.get("dataset") or (Path(folder).resolve().name if folder else None)


_AUGMENTATION = {"aa": "policy", "mixup": "mixup", "cutmix": "cutmix", "reprob": "random erasing"}
_AUGMENTATION |= {"smoothing": "label smoothing", "drop_path": "drop path"}


def _describe(args: dict[str, Any], checkpoint: dict[str, Any], ema: bool) -> dict[str, str]:
    """Rows for the table about the training."""
    get, epoch, name = args.get, checkpoint.get("epoch"), args["model"]
    images = (get("batch_size") or 0) * (get("grad_accum_steps") or 1) * (get("world_size") or 1)
    lr = f"{get('lr'):.2e}" if isinstance(get("lr"), float) else str(get("lr"))
    warmup, epochs = get("warmup_epochs") or 0, all_epochs(args)
    optimizer = f"{get('opt')}, lr {lr} for {images} images per update, weight decay {get('weight_decay')}"
    optimizer += f", betas {tuple(args['opt_betas'])}" if get("opt_betas") else ""
    optimizer += f", layer decay {get('layer_decay')}" if get("layer_decay") else ""
    started = any(map(get, ("pretrained", "initial_checkpoint", "resume")))
    start = name.rstrip("/").rpartition("/")[2] if name.startswith("local-dir:") else name
    rows = {
        "Method": "supervised training with timm's train.py",
        "Started from": start if started else "random weights",
        "Recipe": Path(args["config"]).name if get("config") else None,
        "Data": _dataset(args),
        "Epochs": f"{epoch + 1} of {epochs}, {warmup} of them warmup" if isinstance(epoch, int) else None,
        "Optimizer": optimizer,
        "Augmentation": ", ".join(f"{text} {get(key)}" for key, text in _AUGMENTATION.items() if get(key)),
        "Weights": f"moving average ({get('model_ema_decay')})" if ema else "last of their epoch",
        "Seed": get("seed"),
    }
    return {key: str(value) for key, value in rows.items() if value not in (None, "")}


def _label_names(path: Path, given: Sequence[str] | None, num_classes: int) -> list[str] | None:
    """Names of the classes: the given ones, else those in the run's folder, if any."""
    file, names, source = path.parent / LABEL_NAMES, given, "label_names"
    if given is None and file.is_file():
        source = f"'{file}'"
        try:
            names = read_json(file)
        except (OSError, ValueError) as e:
            raise ValueError(f"{source} cannot be read: {e}") from e
    if names is None:
        return None
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source} must be a list of strings, the names of the classes.")
    if len(names) != num_classes:
        raise ValueError(f"{source} has {count(len(names), 'name')}, but the model has {count(num_classes, 'class')}.")
    return list(names)


# ---------------------------------------------------------------------------------------------------------- the export


def _create_model(args: dict[str, Any], name: str, path: Path) -> Any:
    """The `ConvNeXtV2` of a run on the meta device, as train.py creates it, without options for training."""
    chans = args.get("in_chans") or (args["input_size"][0] if args.get("input_size") else 3)
    options = {"num_classes": args.get("num_classes"), "global_pool": args.get("gp")} | (args.get("model_kwargs") or {})
    try:
        model = timm.create_model(name, pretrained=False, in_chans=chans, device="meta", **options)
    except (*HUB_ERRORS, AssertionError, KeyError, TypeError, RuntimeError) as e:
        source, _, place = name.partition(":")
        if source in ("hf-hub", "hf_hub") and isinstance(e, HUB_ERRORS):
            raise hub_error(e, place, "config.json", f"copy its config.json to '{path.parent}'") from e
        raise ValueError(f"The model of '{path}', '{args['model']}', cannot be built: {e}") from e
    if not isinstance(model, ConvNeXtV2):
        raise ValueError(f"'{path}' holds a '{args['model']}', expected a ConvNeXt V2 (convnextv2_*).")
    return model


def export_finetuned(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    ema: bool | None = None,
    license: str | None = None,
    info: dict[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Exports a classifier trained by timm's train.py as a timm folder, which stock timm opens without this package.

    Model and settings come from the options in the checkpoint, metrics from the `summary.csv` beside it. A run that
    started from `local-dir:FOLDER` needs that folder's `config.json`, in its place or copied to the run's folder.

    Args:
        checkpoint: A checkpoint file of train.py, or its output folder (model_best.pth.tar, else last.pth.tar).
        ema: Export the moving average of the weights; by default if there is one, because train.py evaluated it.
        license: Licence by its id on the Hub; by default that of `finetune --license`. An inherited licence stays.
        info: Rows for the table in the README, added to its own or replacing them.
        label_names: Of the classes in the order of their index; by default those in `label_names.json` of the run.

    Raises:
        ValueError: The checkpoint or its start folder is unusable, the model is not a ConvNeXt V2, the weights do not
            fit, the licence is unknown or contradicts the inherited one, or names and classes differ in number.
        RuntimeError: The `config.json` of an `hf-hub:` model cannot be loaded.
    """
    path = find_checkpoint(checkpoint)
    content = load_checkpoint(path)
    args, has_ema = _args_of(content, path), "state_dict_ema" in content
    if ema and not has_ema:
        raise ValueError(f"'{path}' holds no moving average of the weights: train with --model-ema, or pass ema=False.")
    ema = has_ema if ema is None else ema
    weights = clean_state_dict(content["state_dict_ema" if ema else "state_dict"])
    name = _model_name(args, path.parent)
    model = _create_model(args, name, path)
    check_weights(weights, model.state_dict(), f"'{path}' does not hold weights of '{args['model']}'")

    cfg = model.pretrained_cfg
    origin = origin_of_run(args, name, cfg, path.resolve().parent, (path.resolve(),))
    license = resolve_license(license or args.get("license"), origin.license, origin.unstated)
    data = resolve_data_config(args, model=model)
    model.pretrained_cfg = {
        **{k: cfg[k] for k in (*KEEP, *(PAPER if origin.license else ())) if k in cfg},
        **({"origin_url": origin.url} if origin.url else {}),
    }
    source, _, name = (args.get("dataset") or "").partition("/")
    hub_dataset = name if source in ("hfds", "hfids") else None
    metrics = _metrics(path.parent / "summary.csv", content, args, ema)
    training = {
        "table": {**_describe(args, content, ema), **(info or {})},
        "base_model": origin.base_model,
        "datasets": [hub_dataset] if hub_dataset else [],
        "metrics": {**metrics, "dataset_id": hub_dataset} if metrics else None,
        "inherited_license": origin.license,
        **({"pixels": args["pixels"]} if args.get("pixels") else {}),
    }
    names = _label_names(path, label_names, int(model.num_classes))
    return write_folder(model, weights, folder, data=data, license=license, training=training, label_names=names)
