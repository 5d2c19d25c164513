"""The command: runs the loop, and tells how it ended."""

import argparse
import contextlib
import multiprocessing
import signal
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from ..command import refused, say
from .batches import Batches, DataError, worker_died
from .distributed import Seat, World
from .files import find_files
from .lock import release_locks
from .loop import Run, keep_bad_step, train
from .messages import (
    next_commands,
    not_finite,
    resume_hint,
    start_command,
    stopped,
)
from .options import parse_options
from .peers import leave
from .replay import load_weights, read_record, replay
from .run_folder import NotSavedError
from .setup import create_model, open_data, set_up
from .start import open_start
from .trainer import NotFiniteError

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake in settings or data is one message and exit status 2.

    Args:
        argv: The options; those of the process by default.

    Returns:
        Exit status: 0, 1 where the run could not finish, 2 for a mistake.
    """
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        args, start = parse_options(argv)
        if args.replay:
            return replay_bad_step(args, argv)
        world = World(args.device)
        run = set_up(args, start, world, start_command(argv))
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
    say(stopped(run.progress, run.plan, run.stop, args.max_bad_images, args.experiment))
    return int(run.stop == "images")


def end_workers(workers: set[BaseProcess]) -> None:
    """Ends data workers, for which Python would wait for ever: they ignore SIGTERM."""
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a fault, and raises it
    for worker in workers:
        worker.kill()
        worker.join(timeout=5)
    signal.signal(signal.SIGCHLD, handler)


def ended_by(error: Exception, run: Run | None, world: World | None) -> int:
    """Tells an error that has ended the run, once and on the process where it arose; the others end without a word.

    Returns:
        Exit status. What is no user's mistake is raised again, for its traceback.
    """
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused("pretrain", error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # what waits for the other processes would wait for ever
    if isinstance(error, NotFiniteError) and run is not None:
        return end_not_finite(error, run, world)
    if not world.training and isinstance(error, ValueError | RuntimeError):
        world.tell(f"timm-convnextv2 pretrain: error: {error}")
        return 2
    reason = worker_died(error) or (str(error) if isinstance(error, DataError | NotSavedError) else "")
    if not reason and world.distributed:  # before the others end, at which torchrun ends this one
        world.tell(f"Process {world.rank} of {world.size} fails:\n{''.join(traceback.format_exception(error))}")
        return 1
    if not reason or run is None:
        raise error
    world.tell(f"timm-convnextv2 pretrain: {reason}\n{resume_hint(run.folder.path.name)}")
    return 1


def end_not_finite(error: NotFiniteError, run: Run, world: World) -> int:
    """Tells of a loss that is not finite, which all processes found at once, and keeps what repeats it."""
    if world.primary:
        record = keep_bad_step(run, world, error, weights=True)
        world.tell(not_finite(error, run.settings["max_bad_steps"], record))
    else:
        with contextlib.suppress(RuntimeError):
            world.wait()  # or the first one would be asked to end while it writes
    return 1


def replay_bad_step(args: argparse.Namespace, argv: list[str] | None) -> int:
    """--replay: repeats the forward of an update whose loss was not finite; returns exit status 0.

    Args:
        args: The options.
        argv: As given; of them, --data-dir, --data-list, --index and --device win over those of the run.

    Raises:
        ValueError: The record, its weights or the data cannot be read.
    """
    path = Path(args.replay)
    record = read_record(path)
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    own = {
        k: getattr(args, k) for k in ("data_dir", "data_list", "index", "device") if f"--{k.replace('_', '-')}" in given
    }
    vars(args).update(record["settings"] | own | {"pretrained": False, "weights": None})
    if record["images"][0] is not None:
        args.workers = 0  # they change nothing but the order of streams
    world = World(args.device)
    device, listing = world.device, find_files(args, world)
    model = create_model(args, open_start(args.model))
    say(f"Weights: {load_weights(record, path, model)}")

    def open_rank(rank: int) -> Batches:
        return open_data(args, model, Seat(rank, record["world_size"]), listing)

    found = ""
    for finding in replay(record, model, open_rank, device):
        found = found or finding.cause
        what = finding.cause or "everything is finite"
        say(f"Process {finding.rank}, batch {finding.step + 1}: loss {finding.loss:.4g}; {what}")
    if not found:
        say(f"The loss was {record['loss']}, and is finite here: it depends on device, compilation, or other weights.")
    return 0
