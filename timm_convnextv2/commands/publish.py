"""Publish weights on the Hugging Face Hub, as a timm folder with a model card.

    timm-convnextv2 publish runs/mine USER/NAME --license mit --dry-run  # writes what would be sent
    timm-convnextv2 publish runs/mine USER/NAME --license mit --private

FOLDER is a timm folder (encoder/, model/), or the folder of a run of `pretrain`, of timm's train.py, of `finetune`,
of `detect train` or of `segment train`.
The access token is the one of `hf auth login` or HF_TOKEN.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import timm_convnextv2  # noqa: F401  registers the models

from ..checkpoint.card import IMAGES
from ..checkpoint.provenance import WEIGHTS
from ..checkpoint.transfer import TASKS, find_folder, read_folder_config
from ..console import PROGRAM, CommandParser, refused
from ..hub.staging import Stated, stage
from ..hub.upload import files_to_push, push_to_hub


# fmt: off
def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog=f"{PROGRAM} publish", description="Publish a timm folder with a model card.")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="timm folder, or that of a run: pretrain, train.py, finetune, detect, segment")
    add("repo", metavar="REPO", help="USER/NAME on the Hub; made if needed")
    add("--part", default="encoder", choices=["encoder", "fcmae"],
        help="of a pretraining run: the encoder, or all of the FCMAE, from which pretraining can continue")
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


def open_output(folder: Path, output: str | None) -> Path:
    """The folder for --dry-run, empty: what an earlier one wrote there goes, and nothing else."""
    target = Path(output) if output else folder.resolve().with_name(f"{folder.resolve().name}-publish")
    ours = {"config.json", WEIGHTS, "README.md", *IMAGES}
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


def check_options(args: argparse.Namespace) -> Path:
    """Mistakes that can be told before any work; returns FOLDER."""
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
    return folder


def check_transfer(folder: Path) -> None:
    """Opens a detector or segmenter, if FOLDER is one or the run of one.

    Raises:
        ValueError: Its files do not fit each other.
    """
    place = find_folder(folder)
    if not (place / "config.json").is_file() or (folder / "encoder").is_dir():
        return
    task = read_folder_config(place).get("task")
    if task in TASKS:
        from .. import transfer  # it needs torchvision's detectors, which take a second to import

        (transfer.open_detector if task == "detection" else transfer.open_segmenter)(place)


def write_dry_run(staged: Path, what: str, folder: Path, args: argparse.Namespace) -> None:
    """Writes and lists what would be sent."""
    files = files_to_push(staged, args.repo, args.revision)
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


def publish(args: argparse.Namespace) -> None:
    """Stages what is to be sent, then shows or sends it."""
    folder = check_options(args)
    check_transfer(folder)
    stated = Stated(args.license, tuple(args.dataset or ()), args.base_model)
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        staged = Path(temporary) / folder.resolve().name  # gone again where something is wrong
        staged.mkdir()
        what = stage(folder, staged, part=args.part, stated=stated)
        if args.dry_run:
            write_dry_run(staged, what, folder, args)
            return
        print(f"Publishing {what} as {args.repo}", flush=True)
        url = push_to_hub(
            staged,
            args.repo,
            private=args.private or None,
            revision=args.revision,
            commit_message=args.commit_message,
        )
        print(f"Published: {url}")


def main(argv: list[str] | None = None) -> int:
    """The command; whatever is wrong is one message and exit status 2."""
    try:
        publish(build_parser().parse_args(argv))
    except (ValueError, RuntimeError, OSError) as e:
        return refused("publish", e)
    return 0
