#!/usr/bin/env python3
"""Publish weights on the Hugging Face Hub, as a timm folder with a model card.

    python train_scripts/publish.py runs/mine USER/NAME --license mit --dry-run  # writes what would be sent
    python train_scripts/publish.py runs/mine USER/NAME --license mit --private

FOLDER is a timm folder (encoder/, model/), the folder of a run of pretrain.py, or of timm's train.py or finetune.py.
The access token is the one of `hf auth login` or HF_TOKEN.
"""

import argparse
import csv
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import timm
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import clean_state_dict

import timm_convnextv2  # noqa: F401  registers the models
from timm_convnextv2.checkpoint import export_fcmae, export_finetuned, load_checkpoint, push_to_hub
from timm_convnextv2.checkpoint.card import PICTURES, render_card
from timm_convnextv2.checkpoint.export import find_checkpoint
from timm_convnextv2.checkpoint.hub import check_folder, files_to_push
from timm_convnextv2.provenance import WEIGHTS, origin_of_config, read_config, resolve_license, training_of


def refuse(message: str) -> NoReturn:
    """A mistake in the options, told as any other: once, and without the usage of all options."""
    raise ValueError(message)


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="timm folder, or run folder of pretrain.py, train.py or finetune.py")
    add("repo", metavar="REPO", help="USER/NAME on the Hub; made if needed")
    add("--part", default="encoder", choices=["encoder", "fcmae"],
        help="of a pretraining run: the encoder, or all of the FCMAE to go on from")
    add("--license", metavar="ID", help="licence of the weights, e.g. mit; derived weights keep the one they came with")
    add("--dataset", nargs="+", metavar="NAME", help="data sets on the Hub that the weights were trained on")
    add("--base-model", metavar="ID", help="model on the Hub that training started from, where the files do not say it")
    add("--private", action="store_true", help="a private repository")
    add("--revision", metavar="NAME", help="branch to write to; made if needed")
    add("--commit-message", metavar="TEXT")
    add("--dry-run", action="store_true", help="write what would be sent into a folder, and send nothing")
    add("--output", metavar="DIR", help="folder for --dry-run (default: FOLDER-publish, beside FOLDER)")
    return parser
# fmt: on


def pictures_of(run: Path) -> dict[str, Path]:
    """Pictures of a run, by their name beside the card: its loss curve, and the last reconstructions."""
    pictures = {"loss.png": run / "loss.png"}
    for path in sorted((run / "reconstructions").glob("epoch-*.png")):
        pictures["reconstructions.png"] = path
    return {name: path for name, path in pictures.items() if path.is_file()}


def pretraining_loss(summary: Path) -> str | None:
    """The last training loss in a `summary.csv`."""
    if not summary.is_file():
        return None
    with open(summary, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        epoch, loss = int(rows[-1]["epoch"]) + 1, float(rows[-1]["train_loss"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return f"{loss:.4f} in epoch {epoch}" if math.isfinite(loss) else None


def with_loss(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """The config with the last training loss of a pretraining run in the card's table."""
    training, loss = training_of(config), pretraining_loss(run / "summary.csv")
    if loss is None or not training.get("table"):
        return config
    return {**config, "training": {**training, "table": {**training["table"], "Last training loss": loss}}}


def write_again(stage: Path, config: dict[str, Any]) -> None:
    """Replaces config and card of a folder that was just exported."""
    (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = render_card(config, [name for name in PICTURES if (stage / name).is_file()])
    (stage / "README.md").write_text(card, encoding="utf-8")


def describe_again(folder: Path, config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A timm folder's config with what the options say about licence, data and origin."""
    training = dict(training_of(config))
    cfg = dict(config.get("pretrained_cfg", {}))
    # of a folder that this package did not write, a licence that is stated came with the weights
    binding = training.get("inherited_license") if training else origin_of_config(config).license
    if not binding and args.base_model:  # published weights, named as the origin
        binding = origin_of_config({}, args.base_model).license
    license = resolve_license(args.license, binding) or cfg.get("license")
    if license is None:
        raise ValueError(
            f"Nothing states the licence of the weights in {folder}. Name it with --license, by its id on the Hub "
            "(mit, apache-2.0, cc-by-4.0, ...; cc-by-nc-4.0 for what started from the published weights)."
        )
    if binding and not training.get("inherited_license"):
        training["inherited_license"] = binding
    if args.dataset:
        training["datasets"] = args.dataset
    if args.base_model:
        training["base_model"] = args.base_model
    return {**config, "pretrained_cfg": {**cfg, "license": license}, "training": training}


def link_or_copy(source: Path, target: Path) -> None:
    """Weights are large: a link to the file, where the system can."""
    try:
        os.symlink(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def stage_folder(folder: Path, run: Path | None, stage: Path, args: argparse.Namespace) -> None:
    """Puts a timm folder into `stage`, with pictures and last loss of its pretraining run."""
    files = check_folder(folder)
    before = read_config(folder / "config.json")
    config = describe_again(folder, before, args)
    pictures = {name: folder / name for name in PICTURES if (folder / name).is_file()}
    if run is not None:
        pictures = {**pictures_of(run), **pictures}
        config = with_loss(config, run) if folder.name == "encoder" else config
    readme = files["README.md"]
    text = readme.decode() if isinstance(readme, bytes) else readme.read_text(encoding="utf-8")
    if text == render_card(before, [name for name in PICTURES if (folder / name).is_file()]):
        text = render_card(config, list(pictures))
    else:  # edited by hand: the text stays, its metadata follow the options
        print(f"{folder / 'README.md'} was edited by hand: its text stays as it is.")
        card = ModelCard(text, ignore_metadata_errors=True)
        card.data.license = config["pretrained_cfg"]["license"]
        for name, value in (("datasets", args.dataset), ("base_model", args.base_model)):
            if value:
                setattr(card.data, name, value)
        text = str(card)
    link_or_copy(folder / WEIGHTS, stage / WEIGHTS)
    for name, path in pictures.items():
        shutil.copyfile(path, stage / name)
    (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (stage / "README.md").write_text(text, encoding="utf-8")


def stage_fcmae(run: Path, stage: Path, args: argparse.Namespace) -> None:
    """Exports the whole FCMAE of a pretraining run into `stage`."""
    checkpoint = load_checkpoint(run / "last.pth.tar")
    settings = checkpoint.get("args")
    if not isinstance(settings, dict) or "mask_ratio" not in settings:
        raise ValueError(f"'{run / 'last.pth.tar'}' is not a checkpoint of pretrain.py.")
    # written with the checkpoint: the architecture, and what came with the weights that training started from
    encoder = describe_again(run, read_config(run / "encoder" / "config.json"), args)
    training, cfg = encoder["training"], encoder["pretrained_cfg"]
    options = {k: v for k, v in encoder.get("model_args", {}).items() if k not in ("num_classes", "global_pool")}
    names = ("in_chans", "patch_size", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
    options |= {name: settings[name] for name in names} | settings["model_kwargs"]
    model = timm.create_model(
        f"fcmae_{encoder['architecture']}", img_size=tuple(settings["input_size"][1:]), device="meta", **options
    )
    model.base_model = training.get("base_model")
    if training.get("inherited_license"):
        model.encoder.pretrained_cfg["license"] = training["inherited_license"]
    if cfg.get("origin_url"):
        model.encoder.pretrained_cfg["origin_url"] = cfg["origin_url"]
    made = {k: v for k, v in (training.get("table") or {}).items() if k != "Parameters"}
    for name, path in pictures_of(run).items():
        shutil.copyfile(path, stage / name)
    export_fcmae(
        model,
        stage,
        state_dict=clean_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"]),
        mean=settings["mean"],
        std=settings["std"],
        license=cfg["license"],
        info=made,
    )
    write_again(stage, with_loss(describe_again(run, read_config(stage / "config.json"), args), run))


def stage_run(run: Path, stage: Path, args: argparse.Namespace) -> str:
    """Puts what FOLDER has to publish into `stage`; returns what that was."""
    if (run / "config.json").is_file() and not (run / "args.yaml").is_file():
        parent = run.parent if run.name in ("encoder", "model") and (run.parent / "args.yaml").is_file() else None
        if args.part == "fcmae" and not read_config(run / "config.json")["architecture"].startswith("fcmae_"):
            raise ValueError(f"--part fcmae: '{run}' has no decoder. Name the folder of the pretraining run.")
        stage_folder(run, parent, stage, args)
        return f"the timm folder {run}"
    checkpoints = [name for name in ("model_best.pth.tar", "last.pth.tar") if (run / name).is_file()]
    if (run / "encoder" / "config.json").is_file():
        if args.part == "encoder":
            stage_folder(run / "encoder", run, stage, args)
            return f"the encoder of the pretraining run {run}"
        stage_fcmae(run, stage, args)
        return f"encoder and decoder of the pretraining run {run}"
    if not checkpoints and not (run / "model" / "config.json").is_file():
        raise ValueError(
            f"'{run}' has nothing to publish: it is no timm folder (config.json, {WEIGHTS}), no folder of a "
            "pretraining run (encoder/), and no folder of a run of timm's train.py (model_best.pth.tar, last.pth.tar)."
        )
    if args.part == "fcmae":
        raise ValueError(f"--part fcmae: '{run}' is not the folder of a pretraining run of pretrain.py.")
    model = run / "model"
    newest = find_checkpoint(run).stat().st_mtime if checkpoints else 0.0
    if (model / "config.json").is_file() and (model / "config.json").stat().st_mtime >= newest:
        stage_folder(model, run, stage, args)
        return f"the timm folder {model}"
    for name, path in pictures_of(run).items():
        shutil.copyfile(path, stage / name)
    export_finetuned(run, stage, license=args.license)
    write_again(stage, describe_again(run, read_config(stage / "config.json"), args))
    return f"the model in {find_checkpoint(run)}"


def open_output(folder: Path, output: str | None) -> Path:
    """The folder for --dry-run, empty: what an earlier one wrote there goes, and nothing else."""
    target = Path(output) if output else folder.resolve().with_name(f"{folder.resolve().name}-publish")
    ours = {"config.json", WEIGHTS, "README.md", *PICTURES}
    if target.exists() and (not target.is_dir() or {p.name for p in target.iterdir()} - ours):
        raise ValueError(f"'{target}' exists and holds other files. Choose another folder with --output.")
    card = target / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if target.exists() and any(target.iterdir()) and ("hf-hub:" not in text or "local-dir:path/to" in text):
        raise ValueError(f"'{target}' exists and was not written by --dry-run. Choose another folder with --output.")
    if target.resolve() == folder.resolve():
        raise ValueError(f"--output {output} is FOLDER itself. Choose another folder.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in target.iterdir():
            path.unlink()
    except OSError as e:
        raise ValueError(f"'{target}' cannot be written ({e}). Choose another folder with --output.") from e
    return target


def main(args: argparse.Namespace) -> None:
    """Stages what is to be sent, then shows or sends it."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"FOLDER '{folder}' " + ("is not a folder." if folder.exists() else "does not exist."))
    if args.output and not args.dry_run:
        raise ValueError("--output is for --dry-run only.")
    for option, value in (("REPO", args.repo), ("--base-model", args.base_model)):
        try:
            validate_repo_id(value or args.repo)
        except HFValidationError as e:
            raise ValueError(f"{option} '{value}' cannot be a repository's name, USER/NAME was expected: {e}") from e
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        stage = Path(temporary) / folder.resolve().name  # gone again where something is wrong
        stage.mkdir()
        what = stage_run(folder, stage, args)
        if not args.dry_run:
            print(f"Publishing {what} as {args.repo}", flush=True)
            url = push_to_hub(
                stage,
                args.repo,
                private=args.private or None,
                revision=args.revision,
                commit_message=args.commit_message,
            )
            print(f"Published: {url}")
            return
        files = files_to_push(stage, args.repo, args.revision)
        target = open_output(folder, args.output)
        for name, content in files.items():
            if isinstance(content, bytes):
                (target / name).write_bytes(content)
            else:
                shutil.copyfile(content, target / name)
    visibility = " (private)" if args.private else ""
    print(f"Dry run, nothing was sent. {what[0].upper()}{what[1:]} would go to {args.repo}{visibility}:")
    for path in sorted(target.iterdir()):
        print(f"  {path.stat().st_size:>12,} bytes  {path.name}")
    print(f"The files are in {target}, the model card is {target / 'README.md'}")


def cli(argv: list[str] | None = None) -> int:
    """Runs `main`; whatever is wrong is one message and exit status 2."""
    try:
        main(build_parser().parse_args(argv))
    except (ValueError, RuntimeError, OSError) as e:
        print(f"publish.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
