"""ConvNeXt V2 for timm, with FCMAE pretraining that is really sparse. Importing it registers the models."""

from .convnextv2 import ConvNeXtV2
from .fcmae import FCMAE, FCMAEOutput, FCMAETask
from .masking import random_mask

__version__ = "0.1.0"

__all__ = ["FCMAE", "ConvNeXtV2", "FCMAEOutput", "FCMAETask", "__version__", "random_mask"]
