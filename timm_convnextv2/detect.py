"""Detect objects: train Mask R-CNN or Faster R-CNN on a backbone, measure it, and find objects in images.

timm-convnextv2 detect train --model local-dir:runs/mine/encoder --data-dir DATA --recipe small-data
timm-convnextv2 detect eval --model output/RUN/model --data-dir DATA
timm-convnextv2 detect predict --model output/RUN/model --images FOLDER --output found.json
"""

import sys

import timm_convnextv2  # noqa: F401  registers the models

from .transfer.detect_command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
