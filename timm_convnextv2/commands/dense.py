"""What `detect` and `segment` share: their sub-commands and how they are parsed."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import transfer
from ..config import add_options, build, from_mapping, words_given
from ..console import PROGRAM, CommandParser, refused, say
from ..recipes import Recipe, list_recipes, load_recipe
from ..runs.end import run_command, start_command
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
            line = start_command(self.name, words)
            return run_command(
                f"{self.name} train",
                config.compute.device,
                lambda world: set_up(self.task, config, recipe, world, line),
            )
        try:
            self.actions[action][2](config)
        except (ValueError, OSError, RuntimeError) as e:
            return refused(f"{self.name} {action}", e)
        return 0
