"""Reading files of weights without executing anything that is in them."""

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

__all__ = ["load_checkpoint"]


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a PyTorch or safetensors file to the CPU; nothing in it is ever executed.

    Args:
        path: `*.safetensors`, or a file of `torch.save`, which may hold tensors, plain data and an
            `argparse.Namespace` (as training checkpoints of timm and of the official code do).

    Raises:
        ValueError: No such file, a truncated or foreign file, one whose pickle asks for code, or one that does not
            hold a dictionary. Names the file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"Checkpoint '{path}' {what}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"(?:GLOBAL|global:) (?!GLOBAL)([\w.]+)", str(e))
        if wanted:
            raise ValueError(
                f"Checkpoint '{path}' was refused and not executed: besides tensors and plain data it asks for code, "
                f"{wanted[1]}. Save the state dict alone, best as safetensors."
            ) from e
        raise ValueError(
            f"Checkpoint '{path}' was not read: it is damaged, or not a file of torch.save. Nothing in it was executed."
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError, SafetensorError) as e:
        raise ValueError(
            f"Checkpoint '{path}' ({path.stat().st_size} bytes) cannot be read: it is truncated, or in another format. "
            f"Copy or download it again. ({type(e).__name__}: {str(e).partition('. ')[0]})"
        ) from e
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint '{path}' holds a {type(content).__name__}; a dictionary of weights was expected.")
    return content
