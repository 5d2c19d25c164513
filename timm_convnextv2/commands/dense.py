"""What the commands that train share: the frame of a run, and how its end is told."""

import argparse
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..console import PROGRAM, CommandParser, closest, refused, say
from ..recipes import Recipe, load_recipe
from ..runs.end import NotFiniteError, end_workers
from ..runs.folder import NotSavedError
from ..runs.lock import release_locks
from ..runs.world import World, leave
from ..transfer.loop import Run, train
from ..transfer.unreadable import UnreadableError

_AT_LEAST_1 = ("epochs", "updates", "batch_size", "grad_accum_steps", "img_size", "short_side", "window", "channels")


_AT_LEAST_1 += ("out_channels", "eval_interval", "log_interval")


_AT_LEAST_0 = ("workers", "shown_images", "warmup_updates", "auxiliary_channels")


# fmt: off
def add_reading(parser: argparse.ArgumentParser) -> None:
    """How images are read and models run."""
    add = parser.add_argument
    add("--nodata", type=float, metavar="V", help="stored value of pixels without data; they get the others' mean")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME")
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="mixed precision")
    add("--amp-dtype", default="bfloat16", choices=["bfloat16", "float16"])
    add("-j", "--workers", type=int, default=4, metavar="N", help="data processes per process (default: 4)")


def add_learning(group: argparse._ArgumentGroup, heads: str) -> None:
    """The optimizer, but for what has other defaults in each task: length, batch, schedule."""
    add = group.add_argument
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps per update (default: 1)")
    add("--opt", default="adamw", metavar="NAME", help="any optimizer of timm (default: adamw)")
    add("--lr", type=float, default=1e-4, metavar="X", help=f"learning rate of {heads} (default: 1e-4)")
    add("--weight-decay", type=float, default=0.05, metavar="X", help="(default: 0.05)")
    add("--layer-decay", type=float, default=1.0, metavar="X", help="share of the rate in the next lower layer")
    add("--layer-decay-type", default="group", choices=["group", "single"], help="layers of a ConvNeXt V2")
    add("--clip-grad", type=float, metavar="NORM", help="clip the gradient's norm (default: no clipping)")
    add("--model-ema", action=argparse.BooleanOptionalAction, default=False,
        help="evaluate and export a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9998, metavar="X", help="(default: 0.9998)")
    add("--seed", type=int, default=42, metavar="N", help="(default: 42)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Where a run is, and what it tells."""
    add = parser.add_argument_group("run").add_argument
    add("--output", default="output", metavar="DIR", help="(default: output)")
    add("--experiment", default="", metavar="NAME", help="sub-folder of --output (default: time and model)")
    add("--resume", default="", choices=["", "auto"], help="auto: continue the experiment's run, if there is one")
    add("--overwrite", action="store_true", help="first remove what an earlier run wrote to the folder")
    add("--eval-interval", type=int, default=1, metavar="N", help="epochs between evaluations (default: 1)")
    add("--shown-images", type=int, default=4, metavar="N", help="images to draw at each evaluation (default: 4)")
    add("--log-interval", type=int, default=20, metavar="N", help="updates between lines (default: 20)")
    add("--log-wandb", action="store_true")
    add("--wandb-project", metavar="NAME")
    add("--log-tensorboard", action="store_true")
    add("--dry-run", action="store_true", help="check everything, and end before training")
# fmt: on


def check_counts(args: argparse.Namespace) -> None:
    """Refuses numbers that are too small to be counted with.

    Raises:
        ValueError: Names the option.
    """
    for least, names in ((1, _AT_LEAST_1), (0, _AT_LEAST_0)):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}.")


def known_options(add_train: Callable[[CommandParser], None]) -> dict[str, argparse.Action]:
    """The options of `train` by name with underscores."""
    parser = CommandParser()
    add_train(parser)
    return {action.dest: action for action in parser._actions}


def with_recipe(
    words: list[str], recipes: Path, add_train: Callable[[CommandParser], None]
) -> tuple[list[str], Recipe | None]:
    """The words of a command line; of `train`, with those of its --recipe below them.

    Raises:
        ValueError: The recipe is wrong.
    """
    if words[:1] != ["train"]:
        return words, None
    early = CommandParser(add_help=False)
    early.add_argument("--recipe")
    name = early.parse_known_args(words)[0].recipe
    if name is None:
        return words, None
    recipe = load_recipe(name, recipes)
    return ["train", *add_recipe(recipe, known_options(add_train)), *words[1:]], recipe


def add_recipe(recipe: Recipe, known: dict[str, argparse.Action]) -> list[str]:
    """The values of a recipe as words of a command line, for the parser to check.

    Raises:
        ValueError: An option that does not exist.
    """
    words: list[str] = []
    for name, value in recipe.values.items():
        action = known.get(name)
        if action is None:
            raise ValueError(f"--recipe {recipe.name}: there is no option {name}.{closest(name, known)}")
        option = next(text for text in action.option_strings if text.startswith("--"))
        if value is None or (action.nargs == 0 and value is False):
            continue
        words.append(option)
        if action.nargs != 0:
            words += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words


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
