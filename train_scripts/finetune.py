#!/usr/bin/env python3
"""Finetuning with timm's own train.py and a recipe, from a clone: the same as `timm-convnextv2 finetune`.

python train_scripts/finetune.py --recipe smoke --model local-dir:runs/mine/encoder --data-dir DATA
torchrun --nproc-per-node 8 train_scripts/finetune.py --recipe finetune-1k-tiny --model ... --data-dir ...
python train_scripts/finetune.py --list-recipes
"""

import sys

from timm_convnextv2.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
