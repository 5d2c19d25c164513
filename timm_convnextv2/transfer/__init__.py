"""Detection and segmentation on any backbone of timm, with the paper's settings and real metrics."""

from .backbone import Backbone, create_backbone
from .groups import parameter_groups

__all__ = ["Backbone", "create_backbone", "parameter_groups"]
