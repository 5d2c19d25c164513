"""Measure a classifier on labelled images, with timm's own validate.py.

    timm-convnextv2 validate runs/mine/model --data-dir DATA --device cpu
    timm-convnextv2 validate --model local-dir:FOLDER --data-dir DATA --split test --results-file results.csv

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. Classes are matched by the names of the folders
where the model tells its own. Options that are not listed below go to validate.py.
"""

import sys

import timm_convnextv2  # noqa: F401  registers the models

from .classify import run_script


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one message and exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    return run_script("validate", "validate.py", __doc__ or "", words, labelled=True)
