"""ConvNeXt V2 for timm, with FCMAE pretraining that is really sparse. Importing it registers the models."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import checkpoint, data, hub
    from .api import collapse, compare, evaluate, open_detector, open_encoder, open_run, open_segmenter, pretrain
    from .models import FCMAE, ConvNeXtV2, FCMAEOutput, random_mask
    from .models.explain import explain
    from .models.task import FCMAETask

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
_MODELS = {
    "FCMAE": "models", "ConvNeXtV2": "models", "FCMAEOutput": "models", "random_mask": "models",
    "explain": "models.explain", "FCMAETask": "models.task",
}  # fmt: skip


def _is_command() -> bool:
    """Whether this process is `timm-convnextv2`, `python -m timm_convnextv2` or a script of train_scripts/."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # Python's own options stand before it, the module's words behind it
        words = sys.orig_argv
        return words[words.index("-m") + 1 :][:1] == [__name__] if "-m" in words else f"-m{__name__}" in words
    folder, name = os.path.split(os.path.realpath(program))
    scripts = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "train_scripts")
    return name == "timm-convnextv2" or folder == scripts  # a user's own train_scripts/ imports the package


# Importing the package registers its models with timm, and so takes the seconds that torch and timm take. A command
# reads its options first, so that help and mistakes come at once, and then registers the models: `commands.main`.
if not _is_command():
    from . import registry  # noqa: F401


def __getattr__(name: str) -> Any:
    """Imports the rest on first use."""
    if name in ("checkpoint", "data", "hub"):
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(importlib.import_module(f".{_MODELS.get(name, 'api')}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
