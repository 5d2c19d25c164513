"""Reading files of weights without executing anything that is in them, and only where they are whole."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

__all__ = ["CheckpointError", "load_checkpoint", "weights_in"]

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the moving average first


class CheckpointError(ValueError):
    """A file of weights that is missing, damaged, foreign, asks for code, or holds something else. Names the file."""


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a PyTorch or safetensors file to the CPU; nothing in it is ever executed.

    The checksums of a file of `torch.save` are compared first: a bit that flipped on a disk or in a copy is found.
    Safetensors, and what PyTorch before 1.6 wrote, have no checksums: there only the structure can tell.

    Args:
        path: `*.safetensors`, or a file of `torch.save`, which may hold tensors, plain data and an
            `argparse.Namespace` (as training checkpoints of timm and of the official code do).

    Raises:
        CheckpointError: (a ValueError, and the only error) No such file, a truncated, damaged or foreign file, one
            whose pickle asks for code, or one that does not hold a dictionary. Names the file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"Checkpoint '{path}' {what}.")
    try:
        content = _read(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as e:
        wanted = re.search(r"(?:GLOBAL|global:) (?!GLOBAL)([\w.]+)", str(e))
        if wanted:
            raise CheckpointError(
                f"Checkpoint '{path}' was refused and not executed: besides tensors and plain data it asks for code, "
                f"{wanted[1]}. Save the state dict alone, best as safetensors."
            ) from e
        raise CheckpointError(
            f"Checkpoint '{path}' was not read: it is damaged, or not a file of torch.save. Nothing in it was executed."
        ) from e
    except Exception as e:  # bytes that say anything: whatever the readers make of them, the file is at fault
        raise CheckpointError(
            f"Checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or in another format. "
            f"Copy or download it again. ({type(e).__name__}: {str(e).partition('. ')[0]})"
        ) from e
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Checkpoint '{path}' holds a {type(content).__name__}; a dictionary of weights was expected."
        )
    return content


def weights_in(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by name in what `load_checkpoint` gave, those that timm takes: the moving average where there is one.

    Names are as in the file; prefixes of DDP and torch.compile stay.
    """
    weights = next((content[key] for key in _NESTED if isinstance(content.get(key), dict)), content)
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path, device="cpu")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"Checkpoint '{path}' ({path.stat().st_size} bytes) is damaged: the checksum of its part '{damaged}' "
                "is wrong. Copy or download it again."
            )
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
