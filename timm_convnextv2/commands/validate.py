"""Measure a classifier on labelled images, with timm's own validate.py.

    timm-convnextv2 validate runs/mine/model --data-dir DATA --device cpu
    timm-convnextv2 validate --model local-dir:FOLDER --data-dir DATA --split test --results-file results.csv

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. Classes are matched by folder name if the model has
the names of its classes. Options that are not listed below go to validate.py.
"""

import timm_convnextv2  # noqa: F401  registers the models

from ..console import refused, say
from ..finetune.config import EvaluationConfig, PredictConfig
from ..finetune.evaluation import prepare_evaluation
from ..finetune.images import Kept
from ..finetune.scripts import load_script, run_script
from ..runs.errors import DataError
from .base import own_options

SCRIPTS = {"validate": "validate.py", "predict": "inference.py"}


def main(argv: list[str] | None = None) -> int:
    return evaluate("validate", __doc__, EvaluationConfig, argv)


def evaluate(command: str, text: str | None, cls: type[EvaluationConfig], argv: list[str] | None) -> int:
    """Runs one of timm's scripts in this process; its errors pass through.

    `predict` leaves out images that cannot be decoded, and then returns exit status 1.
    """
    kept = None
    try:
        config, rest = own_options(command, text, cls, argv)
        script = load_script(SCRIPTS[command], config.timm_train)
        kept = Kept(config.max_bad_images) if isinstance(config, PredictConfig) else None
        words, notes = prepare_evaluation(script, rest, kept=kept, nodata=config.nodata)
        for note in notes:
            say(note)
    except ValueError as e:
        return refused(command, e)
    try:
        run_script(script, words)
    except DataError as e:
        return refused(command, e)
    reasons = kept.left_out() if kept else []
    for reason in reasons:
        say(f"skipped: {reason}", error=True)
    if reasons and kept:
        say(f"{len(reasons)} of {len(kept.dataset)} images have no result: they cannot be decoded.", error=True)
    return int(bool(reasons))
