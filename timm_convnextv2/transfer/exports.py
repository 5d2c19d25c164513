"""What `transfer` exports, imported on first use."""

from .backbone import Backbone, create_backbone, parameter_groups
from .detection.detector import build_detector, export_detector, open_detector
from .segmentation.metrics import find_classes
from .segmentation.segmenter import build_segmenter, export_segmenter, open_segmenter

__all__ = [
    "Backbone", "build_detector", "build_segmenter", "create_backbone", "export_detector", "export_segmenter",
    "find_classes", "open_detector", "open_segmenter", "parameter_groups"
]  # fmt: skip
