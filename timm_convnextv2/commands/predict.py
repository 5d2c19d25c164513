"""Classify images, labelled or not, with timm's own inference.py.

    timm-convnextv2 predict runs/mine/model --data-dir IMAGES --device cpu --label-type name --results-file predictions
    timm-convnextv2 predict --model local-dir:FOLDER --data-dir IMAGES --topk 5 --include-index

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. One that cannot be decoded is skipped and named, and
the exit status is 1. Results have paths relative to IMAGES. Options that are not listed below go to inference.py, which
needs pandas.
"""

from ..finetune.config import PredictConfig
from .validate import evaluate


def main(argv: list[str] | None = None) -> int:
    return evaluate("predict", __doc__, PredictConfig, argv)
