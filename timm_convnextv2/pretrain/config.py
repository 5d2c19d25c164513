"""The options of pretraining: command line over config file over defaults, resolved and checked."""

import argparse
from typing import Any

# Not settings of the run but of the call: args.yaml and checkpoints leave them out.
CALL_ONLY = ("config", "resume", "overwrite", "dry_run", "replay")


AUTO = "auto"  # mean or std that is to be measured


def inherit(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> argparse.Namespace:
    """Sets what was not given and a resumed run keeps: its default may have been another when that run began.

    Args:
        args: Of `parse_options`; changed.
        checkpoint: Of the run that is resumed, None for a new one.
    """
    before = (checkpoint or {}).get("args")
    if args.model_ema_warmup is None:
        args.model_ema_warmup = bool(before.get("model_ema_warmup", True)) if isinstance(before, dict) else True
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the run, for args.yaml and checkpoints."""
    return {k: v for k, v in vars(args).items() if k not in CALL_ONLY}
