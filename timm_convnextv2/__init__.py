"""ConvNeXt V2 for timm, with FCMAE pretraining that is really sparse. Importing it registers the models."""

import importlib
from typing import TYPE_CHECKING, Any

from . import registry  # noqa: F401  registers the models
from .models import FCMAE, ConvNeXtV2, FCMAEOutput, random_mask
from .models.explain import explain
from .models.task import FCMAETask
from .version import __version__

if TYPE_CHECKING:
    from . import checkpoint, data, hub
    from .api import collapse, compare, evaluate, open_detector, open_encoder, open_run, open_segmenter, pretrain


__all__ = [
    "FCMAE",
    "ConvNeXtV2",
    "FCMAEOutput",
    "FCMAETask",
    "__version__",
    "checkpoint",
    "collapse",
    "compare",
    "data",
    "evaluate",
    "explain",
    "hub",
    "open_detector",
    "open_encoder",
    "open_run",
    "open_segmenter",
    "pretrain",
    "random_mask",
]


def __getattr__(name: str) -> Any:
    """Imports the rest on first use: models need none of it."""
    if name in ("checkpoint", "data", "hub"):
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
