"""What the commands that train share: the frame of a run, and how its end is told."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..command import PROGRAM, refused, say
from ..pretrain.command import end_workers
from ..pretrain.distributed import World
from ..pretrain.lock import release_locks
from ..pretrain.peers import leave
from ..pretrain.trainer import NotFiniteError
from .folder import NotSavedError
from .loop import Run, train
from .unreadable import UnreadableError

__all__ = ["data_name", "experiment_name", "how_made", "train_command"]


def train_command(name: str, device: str, set_up: Callable[[World], Run | None]) -> int:
    """Sets a run up and trains; a mistake in settings or data is one message.

    Args:
        name: Of the command, such as 'detect train'.
        device: See `World`.
        set_up: Opens and checks everything; gives None where there is nothing to train (--dry-run).

    Returns:
        Exit status: 0, 1 where the run could not finish, 2 for a mistake.
    """
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        world = World(device)
        run = set_up(world)
        if run is None:
            return 0
        train(run, world)
    except Exception as e:
        return ended_by(name, e, world, run)
    finally:
        release_locks()
        end_workers({*multiprocessing.active_children()} - others)
        if world is not None:
            world.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    again = f"resume with --experiment {run.folder.path.name} --resume auto and the same options"
    say(f"Stopped by {run.stop}; {again}." if run.stop else f"Done: the model is in {run.folder.path / 'model'}")
    return 0


def ended_by(name: str, error: Exception, world: World | None, run: Run | None) -> int:
    """Tells an error once, on the process where it arose; raises again what is no user's mistake."""
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused(name, error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # what waits for the other processes would wait for ever
    if isinstance(error, UnreadableError) and run is not None:
        stands = f"The run is saved up to update {run.saved}" if run.saved else "Nothing of the run is saved yet"
        world.tell(
            f"{PROGRAM} {name}: error: {error} {stands}. Put a file that can be read in its place, and continue with "
            f"--experiment {run.folder.path.name} --resume auto and the same options."
        )
        return 1
    if isinstance(error, ValueError | NotSavedError):
        world.tell(f"{PROGRAM} {name}: error: {error}")
        return 2 if run is None else 1
    if isinstance(error, NotFiniteError):
        world.tell(
            f"{PROGRAM} {name}: {error} It is that of update {error.number + 1}. Lower --lr, pass --clip-grad 1, or "
            "leave --amp out; --resume auto continues from the last checkpoint."
        )
        return 1
    if world.distributed:
        world.tell(f"Process {world.rank} of {world.size} fails:\n{''.join(traceback.format_exception(error))}")
        return 1
    raise error


def experiment_name(task: str, model: str, world: World) -> str:
    """Time, task and model, the same on all processes."""
    stamp = world.share(datetime.now().strftime("%Y%m%d-%H%M%S"))
    return f"{stamp}-{task}-{Path(model.rpartition(':')[2]).name.replace('.', '_')}"


def data_name(folder: str) -> str:
    """What a data set is called in a model card: the name of its folder, and not where it lies."""
    return Path(folder).resolve().name


def how_made(settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of the model card's table, of the settings of a run."""
    of = settings
    batch = of["batch_size"] * of["grad_accum_steps"] * of["world_size"]
    start = "random weights" if of["from_scratch"] else of["model"].rpartition("/")[2].rpartition(":")[2]
    return {
        "Backbone started from": start,
        "Data": f"{data_name(of['data_dir'])}: {of['num_images']} images, {of['num_validation']} to validate",
        "Length": f"{of['total_updates']} updates of {batch} images",
        "Training crops": f"{of['img_size']} x {of['img_size']} pixels",
        "Optimizer": f"{of['opt']}, learning rate {of['lr']:g}, weight decay {of['weight_decay']:g}, layer decay "
        f"{of['layer_decay']:g}",
    }
