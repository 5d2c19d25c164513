"""What a run of timm's train.py that did not end left in its folder: which checkpoint is whole, and what is torn."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.files import CheckpointError, load_checkpoint

__all__ = ["check_resume", "newest_whole", "tell"]

TORN = ("tmp.pth.tar", "recovery_tmp.pth.tar")  # timm's names of a file that is being written


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; of links to one file, `last.pth.tar` comes first."""
    found = [path for path in folder.glob("*.pth.tar") if path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, not path.name.startswith("last"), path.name))


def _whole(folder: Path) -> Iterator[tuple[Path, int]]:
    """Each checkpoint that can be read and resumed from, with the number of epochs that are done in it."""
    for path in _newest_first(folder):
        try:
            content = load_checkpoint(path)
        except (CheckpointError, OSError):
            continue
        epoch = content.get("epoch")
        if isinstance(epoch, int) and "state_dict" in content and "optimizer" in content:
            yield path, epoch if path.name.startswith("recovery") else epoch + 1


def newest_whole(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be resumed from, and the number of epochs that are done in it."""
    return next(_whole(folder), None)


def check_resume(path: Path) -> None:
    """Reads the checkpoint that is to be resumed from.

    Raises:
        ValueError: It is missing, damaged or no checkpoint of train.py; names the newest one beside it that is whole.
    """
    try:
        content = load_checkpoint(path)
        if "epoch" in content and "state_dict" in content:
            return
        reason = (
            f"--resume '{path}' is not a checkpoint of train.py: it has no epoch or no weights ('state_dict'). Weights "
            f"to start from are --pretrained --pretrained-path {path}."
        )
    except (CheckpointError, OSError) as e:
        reason = f"--resume: {e}" if path.exists() else f"--resume '{path}' does not exist."
    found = newest_whole(path.parent)
    raise ValueError(f"{reason} {f'Whole beside it: {found[0]}.' if found else 'No checkpoint beside it is whole.'}")


def tell(folder: Path, epochs: int, experiment: str) -> str:
    """What is whole in the folder of a run that failed, and how to resume it; removes what is torn.

    Args:
        folder: The run's.
        epochs: As many as the run was to have.
        experiment: Its name.
    """
    found, lines = newest_whole(folder), []
    for path in (folder / name for name in TORN):
        if path.is_file() and (found is None or path != found[0]):
            size = path.stat().st_size
            path.unlink()
            lines.append(f"{path.name} ({size / 2**20:.1f} MiB), which was being written, is removed.")
    if folder.is_dir() and found and shutil.disk_usage(folder).free < found[0].stat().st_size:
        lines.append(f"The disk of {folder} has no space for another checkpoint.")
    if found is None:
        lines.insert(0, f"No whole checkpoint is in {folder}: the run starts anew with the same command.")
    else:
        path, done = found
        lines.insert(0, f"The last whole checkpoint is {path} (after epoch {done} of {epochs}).")
        lines.append(f"The same command with --experiment {experiment} --resume {path} resumes it.")
    return " ".join(lines)
