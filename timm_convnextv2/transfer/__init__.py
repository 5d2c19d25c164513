"""Detection and segmentation on any backbone of timm, with the paper's settings and real metrics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports the room on first use: commands read their options, in `config`, without torch."""
    return getattr(importlib.import_module(".exports", __name__), name)
