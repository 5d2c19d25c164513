"""`timm-convnextv2 pretrain`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..console import refused, say
from ..pretraining.config import PretrainConfig
from ..pretraining.replay import load_weights, replay
from ..pretraining.resolve import configure
from ..pretraining.setup import open_replay, set_up
from ..pretraining.start import Start
from ..runs.end import run_command, start_command
from .base import own_options


def parse_options(argv: Sequence[str]) -> tuple[PretrainConfig, Start | None]:
    """The config of a command line and of the file of its --config; the model to start from."""
    given, _ = own_options("pretrain", argv)
    path = given.pop("config", None)
    return configure(given, read_yaml(PretrainConfig, path) if path else {})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns exit status 0, 1 if the run could not finish, 2 for a mistake in settings or data."""
    words = sys.argv[1:] if argv is None else argv
    try:
        given, _ = own_options("pretrain", words)
        if "replay" in given:
            return replay_bad_step(Path(given["replay"]), given)
        config, start = parse_options(words)
    except (ValueError, RuntimeError) as e:
        return refused("pretrain", e)
    command = start_command("pretrain", [*words])
    return run_command("pretrain", config.compute.device, lambda world: set_up(config, start, world, command))


def replay_bad_step(path: Path, given: dict[str, Any]) -> int:
    """--replay: repeats the forward of an update whose loss was not finite; returns exit status 0."""
    # the data may have moved since, and the device may be another
    own = {name: given[name] for name in ("data_dir", "data_list", "index", "device") if name in given}
    record, model, open_rank, device = open_replay(path, own)
    say(f"Weights: {load_weights(record, path, model)}")
    cause = ""
    for rank, step, loss, found in replay(record, model, open_rank, device):
        cause = cause or found
        say(f"Process {rank}, batch {step + 1}: loss {loss:.4g}; {found or 'everything is finite'}")
    if not cause:
        say(f"The loss was {record['loss']} in the run and is finite here: device, compilation or weights differ.")
    return 0
