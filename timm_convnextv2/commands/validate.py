"""Measure a classifier on labelled images, with timm's own validate.py.

    timm-convnextv2 validate runs/mine/model --data-dir DATA --device cpu
    timm-convnextv2 validate --model local-dir:FOLDER --data-dir DATA --split test --results-file results.csv

MODEL is the `model` folder of a finetuning, local-dir:FOLDER, hf-hub:USER/NAME or a name of timm. Images are read as
in pretraining and finetuning: 16 bits, many channels, TIFF, .npy. Classes are matched by folder name if the model has
the names of its classes. Options that are not listed below go to validate.py.
"""

import argparse
import sys

import timm_convnextv2  # noqa: F401  registers the models

from ..config import add_options, build
from ..console import PROGRAM, CommandParser, refused, say
from ..data import ImageError
from ..finetune.config import EvaluationConfig
from ..finetune.evaluation import prepare_evaluation
from ..finetune.scripts import load_script, run_script


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return evaluate("validate", "validate.py", __doc__ or "", argv, labelled=True)


def evaluate(command: str, script_name: str, description: str, argv: list[str] | None, *, labelled: bool) -> int:
    """Runs one of timm's scripts in this process, and returns its exit status; errors of the script pass through.

    Args:
        command: Our command, for messages.
        script_name: 'validate.py' or 'inference.py'.
        description: Text of the help.
        argv: Our options and the script's; None for the process's own.
        labelled: See `prepare_evaluation`.
    """
    parser = CommandParser(
        prog=f"{PROGRAM} {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, EvaluationConfig)
    try:
        own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        config = build(EvaluationConfig, vars(own))
        script = load_script(script_name, config.timm_train)
        words, notes = prepare_evaluation(script, rest, labelled=labelled, nodata=config.nodata)
        for note in notes:
            say(note)
    except ValueError as e:
        return refused(command, e)
    try:
        run_script(script, words)
    except ImageError as e:  # a data worker puts its traceback before the message
        return refused(command, ValueError(str(e).strip().splitlines()[-1].rpartition("ImageError: ")[2]))
    return 0
