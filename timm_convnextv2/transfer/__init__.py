"""Detection and segmentation on any backbone of timm, with the paper's settings and real metrics."""

from .backbone import Backbone, create_backbone
from .detection import build_detector, export_detector, open_detector
from .groups import parameter_groups

__all__ = [
    "Backbone",
    "build_detector",
    "create_backbone",
    "export_detector",
    "open_detector",
    "parameter_groups",
]
