"""Gathers the files to publish from a timm folder or a run, and settles their licence."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import ModelCard
from timm.models import clean_state_dict

from ..checkpoint.card import images_in, render_card
from ..checkpoint.export import export_fcmae
from ..checkpoint.finetuned import BEST, export_finetuned
from ..checkpoint.provenance import WEIGHTS, origin_of_config, read_config, resolve_license, training_of
from ..checkpoint.task_folder import TASKS, is_task, read_folder_config, render_folder_card
from ..console import say
from ..data import Pixels
from ..files import load_checkpoint, read_rows
from .upload import check_folder


class Stated(NamedTuple):
    """Statements of the user about weights, which their files may lack."""

    license: str | None = None  # licence by its id on the Hub
    datasets: Sequence[str] = ()  # Hub ids of the data sets that the weights were trained on
    base_model: str | None = None  # Hub id of the model that training started from


def stage(source: Path, target: Path, part: str, stated: Stated) -> str:
    """Fills the empty `target` with the files to publish; returns a description of their source, for messages.

    `source` is a timm folder, the folder of a detector or segmenter, or that of any training run; `part` of a
    pretraining run is 'encoder' or 'fcmae', with the decoder. What cannot be published is a `ValueError`.
    """
    if (source / "config.json").is_file() and not (source / "args.yaml").is_file():
        run = source.parent if source.name in ("encoder", "model") and (source.parent / "args.yaml").is_file() else None
        config = read_folder_config(source)
        if part == "fcmae" and not config.get("architecture", "").startswith("fcmae_"):
            raise ValueError(f"--part fcmae: '{source}' has no decoder. Name the folder of the pretraining run.")
        _stage_folder(source, target, run, stated)
        return f"the {TASKS[config['task']] if is_task(config) else 'timm folder'} {source}"
    has_encoder, has_model = ((source / name / "config.json").is_file() for name in ("encoder", "model"))
    if has_encoder and part == "fcmae":
        _stage_fcmae(source, target, stated)
        return f"encoder and decoder of the pretraining run {source}"
    if has_encoder or part == "encoder" and has_model and is_task(read_folder_config(source / "model")):
        _stage_folder(source / ("encoder" if has_encoder else "model"), target, source, stated)
        return f"the {'encoder' if has_encoder else 'model'} of the run {source}"
    return _stage_finetuned(source, target, part, stated)


def _images_of(run: Path) -> dict[str, Path]:
    """Images of a run by their name beside the card: the loss curve and the latest predictions."""
    images = {"loss.png": run / "loss.png"}
    for folder in ("reconstructions", "predictions"):
        for path in sorted((run / folder).glob("epoch-*.png")):
            images[f"{folder}.png"] = path
    return {name: path for name, path in images.items() if path.is_file()}


def _with_loss(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """The config with the last training loss of a pretraining run in the card's table."""
    training, rows = training_of(config), read_rows(run / "summary.csv")[0]
    try:
        epoch, loss = int(str(rows[-1]["epoch"])) + 1, float(str(rows[-1]["train_loss"]))
    except (IndexError, KeyError, ValueError):
        return config
    if not math.isfinite(loss) or not training.get("table"):
        return config
    table = training["table"] | {"Last training loss": f"{loss:.4f} in epoch {epoch}"}
    return {**config, "training": {**training, "table": table}}


def _write_description(folder: Path, config: dict[str, Any], card: str) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _describe(folder: Path, config: dict[str, Any], stated: Stated) -> dict[str, Any]:
    """Adds the user's statements about licence, data and origin to a config."""
    training = dict(training_of(config))
    cfg = dict(config.get("pretrained_cfg", {}))
    # in a folder that this package did not write, the stated licence came with the weights
    binding = training.get("inherited_license") if training else origin_of_config(config).license
    if not binding and stated.base_model:  # published weights, named as the origin
        binding = origin_of_config({}, stated.base_model).license
    license = resolve_license(stated.license, binding) or cfg.get("license")
    if license is None:
        raise ValueError(
            f"Nothing states the licence of the weights in {folder}. Name it with --license, by its id on the Hub "
            "(mit, apache-2.0, cc-by-4.0, ...; cc-by-nc-4.0 for training from the published weights)."
        )
    known = {"inherited_license": binding, "datasets": list(stated.datasets), "base_model": stated.base_model}
    training |= {key: value for key, value in known.items() if value}
    return {**config, "pretrained_cfg": {**cfg, "license": license}, "training": training}


def _stage_folder(folder: Path, target: Path, run: Path | None, stated: Stated) -> None:
    """Stages a timm folder, with images and last loss of its pretraining run."""
    _, text = check_folder(folder)
    before = read_folder_config(folder)
    config = _describe(folder, before, stated)
    images = {name: folder / name for name in images_in(folder)}
    edited = text != render_folder_card(before, list(images))
    if run is not None:
        images = {**_images_of(run), **images}
        config = _with_loss(config, run) if folder.name == "encoder" else config
    card = render_folder_card(config, list(images))
    if edited:  # keep the text, update the metadata
        say(f"{folder / 'README.md'} was edited by hand: its text is kept.")
        kept, license = ModelCard(text, ignore_metadata_errors=True), config["pretrained_cfg"]["license"]
        new = {"license": license, "datasets": list(stated.datasets), "base_model": stated.base_model}
        for name in filter(new.get, new):
            setattr(kept.data, name, new[name])
        card = str(kept)
    try:
        os.symlink((folder / WEIGHTS).resolve(), target / WEIGHTS)  # they are large
    except OSError:  # the system has no links
        shutil.copyfile(folder / WEIGHTS, target / WEIGHTS)
    for name, path in images.items():
        shutil.copyfile(path, target / name)
    _write_description(target, config, card)


def _stage_fcmae(run: Path, target: Path, stated: Stated) -> None:
    """Exports the whole FCMAE of a pretraining run."""
    checkpoint = load_checkpoint(run / "last.pth.tar")
    settings = checkpoint.get("args")
    if not isinstance(settings, dict) or "mask_ratio" not in settings:
        raise ValueError(f"'{run / 'last.pth.tar'}' is not a checkpoint of a pretraining run.")
    # written with the checkpoint; it names the architecture and the origin of the start weights
    encoder = _describe(run, read_config(run / "encoder" / "config.json"), stated)
    training, cfg = encoder["training"], encoder["pretrained_cfg"]
    options = {k: v for k, v in encoder.get("model_args", {}).items() if k not in ("num_classes", "global_pool")}
    names = ("in_chans", "patch_size", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
    options |= {name: settings[name] for name in names} | settings["model_kwargs"]
    model: Any = timm.create_model(
        f"fcmae_{encoder['architecture']}", img_size=tuple(settings["input_size"][1:]), device="meta", **options
    )
    model.base_model = training.get("base_model")
    inherited = {"license": training.get("inherited_license"), "origin_url": cfg.get("origin_url")}
    model.encoder.pretrained_cfg |= {key: value for key, value in inherited.items() if value}
    export_fcmae(
        model,
        target,
        state_dict=clean_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"]),
        mean=settings["mean"],
        std=settings["std"],
        license=cfg["license"],
        info={k: v for k, v in (training.get("table") or {}).items() if k != "Parameters"},
        pixels=Pixels.from_record(settings),
    )
    _finish(run, target, stated, with_loss=True)


def _finish(run: Path, target: Path, stated: Stated, with_loss: bool = False) -> None:
    """Completes config.json and card of an export in `target`."""
    for name, path in _images_of(run).items():
        shutil.copyfile(path, target / name)
    config = _describe(run, read_config(target / "config.json"), stated)
    config = _with_loss(config, run) if with_loss else config
    _write_description(target, config, render_card(config, images_in(target)))


def _stage_finetuned(run: Path, target: Path, part: str, stated: Stated) -> str:
    """Stages `model/` of a run of timm's train.py, or exports its best checkpoint if that is newer."""
    checkpoints = [run / name for name in BEST if (run / name).is_file()]
    model, exported = run / "model", run / "model" / "config.json"
    if not checkpoints and not exported.is_file():
        raise ValueError(
            f"'{run}' has nothing to publish: expected a timm folder (config.json, {WEIGHTS}), or the folder of a run "
            f"of pretraining (encoder/) or of timm's train.py ({', '.join(BEST)})."
        )
    if part == "fcmae":
        raise ValueError(f"--part fcmae: '{run}' is not the folder of a pretraining run.")
    newest = checkpoints[0].stat().st_mtime if checkpoints else 0.0
    if exported.is_file() and exported.stat().st_mtime >= newest:
        _stage_folder(model, target, run, stated)
        return f"the timm folder {model}"
    export_finetuned(run, target, license=stated.license)
    _finish(run, target, stated)
    return f"the model in {checkpoints[0]}"
