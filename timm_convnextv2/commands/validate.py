"""Measure a classifier on labelled images, with timm's own validate.py.

    timm-convnextv2 validate runs/mine/model --data-dir DATA --device cpu
    timm-convnextv2 validate --model local-dir:FOLDER --data-dir DATA --split test --results-file results.csv

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. Classes are matched by folder name if the model has
the names of its classes. Options that are not listed below go to validate.py.
"""

import timm_convnextv2  # noqa: F401  registers the models

from ..console import refused, say
from ..data import ImageError
from ..finetune.config import EvaluationConfig
from ..finetune.evaluation import prepare_evaluation
from ..finetune.scripts import load_script, run_script
from ..runs.errors import original_message
from .base import own_options


def main(argv: list[str] | None = None) -> int:
    return evaluate("validate", "validate.py", __doc__, argv, labelled=True)


def evaluate(command: str, script_name: str, text: str | None, argv: list[str] | None, *, labelled: bool) -> int:
    """Runs one of timm's scripts in this process; its errors pass through. For `labelled` see `prepare_evaluation`."""
    try:
        config, rest = own_options(command, text, EvaluationConfig, argv)
        script = load_script(script_name, config.timm_train)
        words, notes = prepare_evaluation(script, rest, labelled=labelled, nodata=config.nodata)
        for note in notes:
            say(note)
    except ValueError as e:
        return refused(command, e)
    try:
        run_script(script, words)
    except ImageError as e:
        return refused(command, ValueError(original_message(e)))
    return 0
