"""Old public names, which stay importable in 0.2 with a warning. This file goes in 0.3."""

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["install"]

PACKAGE = __package__
# old module: the modules that have its names now
MODULES = {
    "convnextv2": ("models.convnextv2", "models.registry"),
    "fcmae": ("models.fcmae", "task"),
    "masking": ("models.masking", "models.packing"),
    "reference": ("models.reference",),
    "ops.backends": ("ops.dispatch",),
}
# names that moved out of a module that is still there
NAMES = {
    "ops": ("layers",),
    "report": ("memory",),
}
RENAMED = {"Visible": "PackedLayout"}


def _finder(old: str, homes: tuple[str, ...]) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks a name up where it is now."""

    def find(name: str) -> Any:
        wanted = RENAMED.get(name, name)
        if not name.startswith("_"):
            for home in homes:
                module = importlib.import_module(f"{PACKAGE}.{home}")
                if wanted in module.__all__:
                    text = f"{PACKAGE}.{old}.{name} is now {PACKAGE}.{home}.{wanted}; the old name goes in 0.3."
                    warnings.warn(text, FutureWarning, stacklevel=2)
                    return getattr(module, wanted)
        raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute '{name}'")

    return find


def install() -> None:
    """Puts the old modules beside the new ones, as names only: nothing is imported before it is asked for."""
    for old, homes in MODULES.items():
        module = types.ModuleType(f"{PACKAGE}.{old}", f"Moved to {' and '.join(homes)}.")
        setattr(module, "__getattr__", _finder(old, homes))  # noqa: B010  (PEP 562, by assignment)
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        setattr(sys.modules[parent], child, module)
    for kept, homes in NAMES.items():
        setattr(importlib.import_module(f"{PACKAGE}.{kept}"), "__getattr__", _finder(kept, homes))  # noqa: B010
