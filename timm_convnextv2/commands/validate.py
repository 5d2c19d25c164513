"""`timm-convnextv2 validate`: measures a classifier with timm's own validate.py."""

from ..config import build
from ..console import refused, say
from ..finetune.config import PredictConfig
from ..finetune.evaluation import prepare_evaluation, results_files
from ..finetune.images import Kept
from ..finetune.scripts import load_script, run_script
from ..hub_errors import HubError
from ..runs.errors import DataError
from .base import own_options
from .table import COMMANDS

SCRIPTS = {"validate": "validate.py", "predict": "inference.py"}


def main(argv: list[str] | None = None) -> int:
    return evaluate("validate", argv)


def evaluate(command: str, argv: list[str] | None) -> int:
    """Runs one of timm's scripts in this process; its errors pass through.

    `predict` leaves out images that cannot be decoded, and then returns exit status 1.
    """
    kept = None
    try:
        given, rest = own_options(command, argv)
        config = build(COMMANDS[command].config, given)
        script = load_script(SCRIPTS[command], config.timm_train)
        kept = Kept(config.max_bad_images) if isinstance(config, PredictConfig) else None
        words, notes = prepare_evaluation(script, rest, kept=kept, nodata=config.nodata)
        for note in notes:
            say(note)
    except (ValueError, HubError) as e:
        return refused(command, e)
    try:
        run_script(script, words)
    except DataError as e:
        return refused(command, e)
    if kept and (files := results_files(script, words)):
        say(f"Written: {', '.join(map(str, files))}")
    reasons = kept.left_out() if kept else []
    for reason in reasons:
        say(f"skipped: {reason}", error=True)
    if reasons and kept:
        say(f"{len(reasons)} of {len(kept.dataset)} images have no result: they cannot be decoded.", error=True)
    return int(bool(reasons))
