"""`timm-convnextv2 pretrain`."""

import contextlib
import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config import add_options, read_yaml, words_given
from ..console import PROGRAM, CommandParser, refused, say
from ..pretrain.batches import DataError, worker_died
from ..pretrain.checkpoints import NotSavedError
from ..pretrain.config import PretrainConfig
from ..pretrain.loop import Run, keep_bad_step, train
from ..pretrain.messages import not_finite, resume_hint, start_command, stopped
from ..pretrain.replay import load_weights, replay
from ..pretrain.resolve import configure
from ..pretrain.setup import open_replay, set_up
from ..pretrain.start import Start
from ..report.next_steps import next_commands
from ..runs.end import NotFiniteError, end_workers
from ..runs.lock import release_locks
from ..runs.world import World, leave


def build_parser() -> CommandParser:
    """The options of `PretrainConfig`, and the file that sets them."""
    parser = CommandParser(
        prog=f"{PROGRAM} pretrain", description="FCMAE pretraining of ConvNeXt V2 on unlabelled images."
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file that sets any of the options below")
    add_options(parser, PretrainConfig)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[PretrainConfig, Start | None]:
    """The config of a command line and of the file of its --config; the model to start from.

    Raises:
        ValueError: An option does not exist, or does not take its value.
    """
    given = words_given(build_parser(), argv)
    path = given.pop("config")
    return configure(given, read_yaml(PretrainConfig, path) if path else {})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The options; by default those of the process.

    Returns:
        Exit status: 0; 1 if the run could not finish; 2 for a mistake in settings or data.
    """
    words = sys.argv[1:] if argv is None else argv
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        given = words_given(build_parser(), words)
        if "replay" in given:
            return replay_bad_step(Path(given["replay"]), given)
        config, start = parse_options(words)
        world = World(config.compute.device)
        run = set_up(config, start, world, start_command([*words]))
        if run is None:
            return 0
        train(run, world)
    except Exception as e:
        return ended_by(e, run, world)
    finally:
        release_locks()
        end_workers({*multiprocessing.active_children()} - others)
        if world is not None:
            world.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if not run.stop:
        say(f"Done: the encoder is in {run.folder.encoder}")
        say(next_commands(run.settings, run.folder.path, run.plan.epochs))
        return 0
    say(stopped(run.progress, run.plan, run.stop, run.settings["max_bad_images"], run.folder.path.name))
    return int(run.stop == "images")


def ended_by(error: Exception, run: Run | None, world: World | None) -> int:
    """Reports a fatal error once, from the process that raised it; other processes exit silently.

    Returns:
        Exit status. An error that is no user's mistake is raised again, for its traceback.
    """
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused("pretrain", error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # cleaning up would wait for the other processes forever
    if isinstance(error, NotFiniteError) and run is not None:
        return end_not_finite(error, run, world)
    if not world.training and isinstance(error, ValueError | RuntimeError):
        world.tell(f"{PROGRAM} pretrain: error: {error}")
        return 2
    reason = worker_died(error) or (str(error) if isinstance(error, DataError | NotSavedError) else "")
    if not reason and world.distributed:  # before the other processes end, because torchrun then ends this one
        world.tell(f"Process {world.rank} of {world.size} fails:\n{''.join(traceback.format_exception(error))}")
        return 1
    if not reason or run is None:
        raise error
    world.tell(f"{PROGRAM} pretrain: {reason}\n{resume_hint(run.folder.path.name)}")
    return 1


def end_not_finite(error: NotFiniteError, run: Run, world: World) -> int:
    """Reports a loss that is not finite, which all processes found at once, and keeps what --replay needs."""
    if world.primary:
        record = keep_bad_step(run, world, error, weights=True)
        world.tell(not_finite(error, run.settings["max_bad_steps"], record))
    else:
        with contextlib.suppress(RuntimeError):
            world.wait()  # or torchrun would ask rank 0 to end while it writes
    return 1


def replay_bad_step(path: Path, given: dict[str, Any]) -> int:
    """--replay: repeats the forward of an update whose loss was not finite; returns exit status 0.

    Args:
        path: The record of the update.
        given: Options of the command line; --data-dir, --data-list, --index and --device replace those of the run.

    Raises:
        ValueError: The record, its weights or the data cannot be read.
    """
    own = {name: given[name] for name in ("data_dir", "data_list", "index", "device") if name in given}
    record, model, open_rank, device = open_replay(path, own)
    say(f"Weights: {load_weights(record, path, model)}")
    cause = ""
    for finding in replay(record, model, open_rank, device):
        cause = cause or finding.cause
        text = finding.cause or "everything is finite"
        say(f"Process {finding.rank}, batch {finding.step + 1}: loss {finding.loss:.4g}; {text}")
    if not cause:
        say(
            f"The loss was {record['loss']} in the run and is finite here: it depends on device, compilation, or the "
            "weights."
        )
    return 0
