"""Frozen features: images to rows, and measures of rows.

rows = extract_features(model, batches)                       one row per image
measure_features(rows, labels, test_rows, test_labels, ...)   kNN, ridge, linear probe and rank
collapse(model, images)                                       mean cosine distance of the channels of each block
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports the room on first use: commands read their options, in `config`, without torch."""
    return getattr(importlib.import_module(".exports", __name__), name)
