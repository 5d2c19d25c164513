"""Object detection: COCO annotations, detector, metrics."""
