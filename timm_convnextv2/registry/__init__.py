"""timm's factory: importing this package registers `convnextv2_*` and `fcmae_convnextv2_*`.

timm files an entrypoint under the last part of its module's name, so each family has its own module.
"""

from ..models.variants import VARIANTS
from . import convnextv2, fcmae
from .convnextv2 import filter_weights

__all__ = ["VARIANTS", "convnextv2", "fcmae", "filter_weights"]
