"""ConvNeXt V2 for timm, with FCMAE pretraining that is really sparse. Importing it registers the models."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import registry  # noqa: F401  registers the models
from .models import FCMAE, ConvNeXtV2, FCMAEOutput, random_mask
from .models.explain import explain
from .models.task import FCMAETask
from .version import __version__

if TYPE_CHECKING:
    from . import checkpoint, data, hub


__all__ = [
    "FCMAE",
    "ConvNeXtV2",
    "FCMAEOutput",
    "FCMAETask",
    "__version__",
    "checkpoint",
    "data",
    "explain",
    "hub",
    "random_mask",
]


def __getattr__(name: str) -> ModuleType:
    """Imports the subpackages `checkpoint`, `data` and `hub` on first use: models need none of them."""
    if name in ("checkpoint", "data", "hub"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
