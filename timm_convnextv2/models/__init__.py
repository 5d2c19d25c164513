"""What is computed: ConvNeXt V2, FCMAE, masks and the packed layout; `registry` brings them into timm's factory."""

from .convnextv2 import ConvNeXtV2, ConvNeXtV2Block, ConvNeXtV2Stage
from .fcmae import FCMAE, FCMAEOutput
from .masking import random_mask
from .packing import PackedLayout

__all__ = ["FCMAE", "ConvNeXtV2", "ConvNeXtV2Block", "ConvNeXtV2Stage", "FCMAEOutput", "PackedLayout", "random_mask"]
