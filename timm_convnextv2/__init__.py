"""ConvNeXt V2 for timm, with FCMAE pretraining that is really sparse. Importing it registers the models."""

from .explain import explain
from .models import FCMAE, ConvNeXtV2, FCMAEOutput, random_mask
from .task import FCMAETask

__version__ = "0.2.0"

__all__ = ["FCMAE", "ConvNeXtV2", "FCMAEOutput", "FCMAETask", "__version__", "explain", "random_mask"]
