#!/usr/bin/env python3
"""FCMAE pretraining of ConvNeXt V2 on unlabelled images, from a clone: `timm-convnextv2 pretrain` by its path.

    python train_scripts/pretrain.py                                            # the small demo data
    python train_scripts/pretrain.py --data-dir IMAGES --model fcmae_convnextv2_tiny --output runs
    torchrun --nproc-per-node 8 train_scripts/pretrain.py --data-dir IMAGES ...  # a process per GPU

The loop to read and to change is timm_convnextv2/pretraining/loop.py.
"""

import sys

from timm_convnextv2.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
