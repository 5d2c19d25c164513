"""What `detect` and `segment` share: parsing, and the frame of a run."""

import multiprocessing
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .. import transfer
from ..config import add_options, build, from_mapping, words_given
from ..console import PROGRAM, CommandParser, invocation, refused, say
from ..recipes import Recipe, list_recipes, load_recipe
from ..runs.end import NotFiniteError, end_workers
from ..runs.folder import NotSavedError
from ..runs.lock import release_locks
from ..runs.world import World, leave
from ..transfer.errors import UnreadableError
from ..transfer.loop import Run, train
from ..transfer.task import Task, set_up


@dataclass(frozen=True)
class Dense:
    """`detect` or `segment`.

    Attributes:
        name: Of the command.
        description: Shown by --help.
        task: Builds the task from the config of `train`.
        train: Config and help of `train`.
        actions: Config, help and function of the others.
    """

    name: str
    description: str
    task: Callable[[Any], Task]
    train: tuple[type, str]
    actions: dict[str, tuple[type, str, Callable[[Any], None]]]

    @property
    def recipes(self) -> Path:
        """The folder of its recipes."""
        return Path(transfer.__file__).parent / "recipes" / self.name

    def parse(self, words: Sequence[str]) -> tuple[str, Any, Recipe | None]:
        """The action, its config, and the recipe below the options of `train`.

        Raises:
            ValueError: An option or a recipe is wrong.
        """
        parser = CommandParser(prog=f"{PROGRAM} {self.name}", description=self.description)
        subparsers = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
        configs = {"train": self.train[0], **{action: entry[0] for action, entry in self.actions.items()}}
        helps = {"train": self.train[1], **{action: entry[1] for action, entry in self.actions.items()}}
        for action, config in configs.items():
            add_options(subparsers.add_parser(action, help=helps[action], description=helps[action]), config)
        given = words_given(parser, words)
        cls = configs[given.pop("action")]
        recipe = load_recipe(given["recipe"], self.recipes) if given.get("recipe") else None
        below = [from_mapping(cls, recipe.values, f"--recipe {recipe.name}")] if recipe else []
        return words[0], build(cls, *below, given), recipe

    def main(self, argv: Sequence[str] | None) -> int:
        """Runs the command. A mistake in options or data is one message and exit status 2."""
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["train"] and "--list-recipes" in words:
            say(list_recipes(self.recipes))
            return 0
        try:
            action, config, recipe = self.parse(words)
        except ValueError as e:
            return refused(self.name, e)
        if action == "train":
            line = shlex.join([*invocation(self.name), *words])
            return train_command(
                f"{self.name} train",
                config.compute.device,
                lambda world: set_up(self.task, config, recipe, world, line),
            )
        try:
            self.actions[action][2](config)
        except (ValueError, OSError, RuntimeError) as e:
            return refused(f"{self.name} {action}", e)
        return 0


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
