"""The sub-commands that `detect` and `segment` share, and how they are parsed."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    """`detect` or `segment`: dense prediction with the actions train, eval and predict.

    `task` builds the task from the config of `train`. `actions` has config, help text and function by name; `train` has
    no function, as `set_up` trains any task.
    """

    name: str
    description: str
    task: Callable[[Any], Task]
    actions: dict[str, tuple[type, str, Callable[[Any], None] | None]]

    @property
    def recipes(self) -> Path:
        return Path(transfer.__file__).parent / "recipes" / self.name

    def parse(self, words: Sequence[str]) -> tuple[str, Any, Recipe | None]:
        """The action, its config, and the recipe whose values lie below the words."""
        parser = CommandParser(prog=f"{PROGRAM} {self.name}", description=self.description)
        subparsers = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
        for name, (config, text, _) in self.actions.items():
            add_options(subparsers.add_parser(name, help=text, description=text), config)
        given = words_given(parser, words)
        action = given.pop("action")
        cls = self.actions[action][0]
        recipe = load_recipe(given["recipe"], self.recipes) if given.get("recipe") else None
        below = [from_mapping(cls, recipe.values, f"--recipe {recipe.name}")] if recipe else []
        return action, build(cls, *below, given), recipe

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command. A mistake in options or data is one message and exit status 2."""
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["train"] and "--list-recipes" in words:
            say(list_recipes(self.recipes))
            return 0
        try:
            action, config, recipe = self.parse(words)
        except ValueError as e:
            return refused(self.name, e)
        act = self.actions[action][2]
        if act is None:
            line = start_command(self.name, words)
            begin = partial(set_up, self.task, config, recipe, line=line)
            return run_command(f"{self.name} train", config.compute.device, begin)
        try:
            act(config)
        except (ValueError, OSError, RuntimeError) as e:
            return refused(f"{self.name} {action}", e)
        return 0
