"""Classify every pixel: train UPerNet on a backbone, measure it, and write masks of images.

timm-convnextv2 segment train --model local-dir:runs/mine/encoder --data-dir DATA --recipe small-data
timm-convnextv2 segment eval --model output/RUN/model --data-dir DATA
timm-convnextv2 segment predict --model output/RUN/model --images FOLDER --output MASKS
"""

import sys

import timm_convnextv2  # noqa: F401  registers the models

from .transfer.segment_command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
