#!/usr/bin/env python3
"""Publish weights on the Hugging Face Hub: `timm-convnextv2 publish`, for a clone.

python train_scripts/publish.py runs/mine USER/NAME --license mit --dry-run
"""

import sys

from timm_convnextv2.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
