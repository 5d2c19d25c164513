"""Checkpoints of timm's train.py: which can be resumed, and what a run that failed left behind."""

import shutil
from pathlib import Path

from ..files import CheckpointError, load_checkpoint

TORN = ("tmp.pth.tar", "recovery_tmp.pth.tar")  # timm's names of a file that it is writing


def newest_whole(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint of a folder that can be resumed, and the number of finished epochs in it."""
    found = [path for path in folder.glob("*.pth.tar") if path.is_file()]
    # timm links names to one file: then last.pth.tar comes first
    for path in sorted(found, key=lambda p: (-p.stat().st_mtime_ns, not p.name.startswith("last"), p.name)):
        try:
            content = load_checkpoint(path)
        except (CheckpointError, OSError):
            continue
        epoch = content.get("epoch")
        if isinstance(epoch, int) and "state_dict" in content and "optimizer" in content:
            # timm writes recovery files within an epoch
            return path, epoch if path.name.startswith("recovery") else epoch + 1
    return None


def check_resume(path: Path) -> None:
    """Refuses a checkpoint that is missing, corrupt or not of train.py; names the newest whole one beside it."""
    try:
        content = load_checkpoint(path)
        if "epoch" in content and "state_dict" in content:
            return
        reason = (
            f"--resume '{path}' is not a checkpoint of train.py: it has no epoch or no weights ('state_dict'). Weights "
            f"to start from are --pretrained --pretrained-path {path}."
        )
    except (CheckpointError, OSError) as e:
        reason = f"--resume: {e}"
    found = newest_whole(path.parent)
    raise ValueError(f"{reason} {f'Whole beside it: {found[0]}.' if found else 'No checkpoint beside it is whole.'}")


def check_new_folder(folder: Path) -> None:
    """Refuses the folder of another run; names the checkpoint to resume.

    A run that was killed while it wrote its first checkpoint has nothing to resume: train.py writes over what it left.
    """
    found = newest_whole(folder)
    if found or {path.name for path in folder.glob("*.pth.tar")} - {*TORN}:
        resume = f"Resume it: --resume {found[0]}." if found else "All of them are corrupt."
        raise ValueError(
            f"{folder} holds the checkpoints of another run. {resume} Or choose another --experiment or --output."
        )


def after_failure(folder: Path, epochs: int, experiment: str) -> str:
    """Removes a half-written checkpoint of a run that failed; returns a message on what is left and how to resume."""
    found, lines = newest_whole(folder), []
    for path in map(folder.joinpath, TORN):
        if path.is_file() and (found is None or path != found[0]):
            lines.append(f"Removed {path.name} ({path.stat().st_size / 2**20:.1f} MiB), which was half written.")
            path.unlink()
    if found is None:
        return " ".join([f"{folder} has no whole checkpoint; the same command starts the run again.", *lines])
    path, done = found
    if shutil.disk_usage(folder).free < path.stat().st_size:
        lines.append(f"The disk of {folder} has no space for another checkpoint.")
    first = f"The last whole checkpoint is {path} (after epoch {done} of {epochs})."
    return " ".join([first, *lines, f"To resume, repeat the command with --experiment {experiment} --resume {path}."])
