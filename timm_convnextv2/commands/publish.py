"""`timm-convnextv2 publish`: weights and a model card on the Hugging Face Hub."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.card import HERE, IMAGES
from ..checkpoint.provenance import WEIGHTS
from ..checkpoint.task_folder import TASKS, find_folder, read_folder_config
from ..console import say
from ..files import claim_folder, remove_leftovers, whole_file
from ..hub.staging import Stated, stage
from ..hub.upload import files_to_push, push_to_hub
from .base import run
from .options import PublishConfig


def open_output(folder: Path, output: str | None) -> Path:
    """The folder for --dry-run: empty, or with the files of an earlier dry run."""
    target = Path(output) if output else folder.resolve().with_name(f"{folder.resolve().name}-publish")
    if target.resolve() == folder.resolve():
        raise ValueError(f"--output {output} is FOLDER itself. Choose another folder.")
    remove_leftovers(target, ["*"])
    card, ours = target / "README.md", {"config.json", WEIGHTS, "README.md", *IMAGES}
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    earlier = "hf-hub:" in text and HERE not in text and {p.name for p in target.iterdir()} <= ours
    claim_folder(target, overwrite=earlier, flag="")
    return target


def check_options(config: PublishConfig) -> Path:
    """Refuses options that cannot work, before any file is read; returns FOLDER."""
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ValueError(f"FOLDER '{folder}' " + ("is not a folder." if folder.exists() else "does not exist."))
    if config.output and not config.dry_run:
        raise ValueError("--output is for --dry-run only.")
    for name, value in (("REPO", config.repo), ("--base-model", config.base_model or config.repo)):
        try:
            validate_repo_id(value)
        except HFValidationError as e:
            raise ValueError(f"{name} '{value}' cannot be the name of a repository, expected USER/NAME: {e}") from e
    return folder


def check_transfer(folder: Path) -> None:
    """Opens FOLDER if it is a detector or segmenter or the run of one: its files must fit together."""
    model = find_folder(folder)
    if not (model / "config.json").is_file() or (folder / "encoder").is_dir():
        return
    task = read_folder_config(model).get("task")
    if task in TASKS:
        from .. import transfer  # it needs torchvision's detectors, which take a second to import

        (transfer.open_detector if task == "detection" else transfer.open_segmenter)(model)


def write_dry_run(staged: Path, what: str, folder: Path, config: PublishConfig) -> None:
    """Writes and lists the files that would be sent."""
    files = files_to_push(staged, config.repo, config.revision)
    target = open_output(folder, config.output)
    # the card first: it marks the folder as ours, also after a kill
    for name, content in sorted(files.items(), key=lambda item: item[0] != "README.md"):
        with whole_file(target / name) as part:
            part.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, part)
    for path in target.iterdir():
        if path.name not in files:  # of an earlier dry run
            path.unlink()
    visibility = " (private)" if config.private else ""
    say(f"Dry run, nothing was sent. {what[0].upper()}{what[1:]} would go to {config.repo}{visibility}:")
    for path in sorted(target.iterdir()):
        say(f"  {path.stat().st_size:>12,} bytes  {path.name}")
    say(f"The files are in {target}, the model card is {target / 'README.md'}")


def publish(config: PublishConfig) -> None:
    """Stages the files, then lists or sends them."""
    folder = check_options(config)
    check_transfer(folder)
    stated = Stated(config.license, config.dataset, config.base_model)
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        staged = Path(temporary) / folder.resolve().name  # removed after an error as well
        staged.mkdir()
        what = stage(folder, staged, config.part, stated)
        if config.dry_run:
            write_dry_run(staged, what, folder, config)
            return
        say(f"Publishing {what} as {config.repo}")
        how: Any = dict(revision=config.revision, commit_message=config.commit_message)
        say(f"Published: {push_to_hub(staged, config.repo, private=config.private or None, **how)}")


def main(argv: Sequence[str] | None = None) -> int:
    return run("publish", publish, argv)
