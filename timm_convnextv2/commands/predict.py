"""Classify images, labelled or not, with timm's own inference.py.

    timm-convnextv2 predict runs/mine/model --data-dir IMAGES --device cpu --label-type name --results-file predictions
    timm-convnextv2 predict --model local-dir:FOLDER --data-dir IMAGES --topk 5 --include-index

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy; one that cannot be decoded is an error that names it.
Options that are not listed below go to inference.py, which needs pandas.
"""

from .validate import evaluate


def main(argv: list[str] | None = None) -> int:
    return evaluate("predict", "inference.py", __doc__, argv, labelled=False)
