"""The published sizes, and the registration of their entrypoints with timm."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

# depths, dims, and whether the token MLP has 1x1 Conv2d weights (timm: atto to nano)
VARIANTS: dict[str, dict[str, Any]] = {
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384), conv_mlp=True),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), conv_mlp=True),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), conv_mlp=True),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "huge": dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}

# The published recipes of these sizes decay the learning rate by groups of three blocks, the others by single blocks.
GROUPED_LAYER_DECAY = ("base", "large", "huge")


def layer_decay_type(variant: str) -> str:
    """'group' or 'single' as in the published recipe; `variant` ends in the size."""
    return "group" if variant.endswith(GROUPED_LAYER_DECAY) else "single"


def variant_options(size: str) -> dict[str, Any]:
    """The options that the entrypoint of a size passes."""
    return {**VARIANTS[size], "use_grn": True, "ls_init_value": None}


def register_variants(module_name: str, prefix: str, create: Callable[..., nn.Module]) -> None:
    """Registers an entrypoint `prefix + size` per size in a module with timm's `default_cfgs`."""
    module = sys.modules[module_name]
    for size, size_args in VARIANTS.items():
        name = f"{prefix}{size}"

        def entrypoint(pretrained: bool = False, _name=name, _size=size, **kwargs) -> nn.Module:
            return create(_name, pretrained, **{**variant_options(_size), **kwargs})

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = module_name
        entrypoint.__doc__ = f"{name}: depths {size_args['depths']}, dims {size_args['dims']}."
        setattr(module, name, entrypoint)
        with warnings.catch_warnings():
            # replacing timm's own entries is intended
            warnings.filterwarnings("ignore", message="Overwriting .* in registry", category=UserWarning)
            register_model(entrypoint)
