"""The sub-commands that `detect` and `segment` share: how they are parsed, and what `train` and `eval` do."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import transfer
from ..config import build, from_mapping
from ..console import refused, say
from ..files import claim_folder, write_json
from ..recipes import Recipe, list_recipes, load_recipe
from ..runs.device import fit_amp
from ..runs.end import run_command, start_command
from ..transfer.task import Task, set_up
from .base import command_of, ended, own_options
from .table import COMMANDS


@dataclass(frozen=True)
class Dense:
    """`detect` or `segment`: dense prediction with the actions train, eval and predict.

    `task` builds the task from the config of `train` or of `eval`; `predict` is the
    function of the third action, which returns the exit status.
    """

    name: str
    task: Callable[[Any], Task]
    predict: Callable[[Any], int]

    @property
    def recipes(self) -> Path:
        return Path(transfer.__file__).parent / "recipes" / self.name

    def parse(self, words: Sequence[str]) -> tuple[str, Any, Recipe | None]:
        """The action, its config, and the recipe whose values lie below the words."""
        name, rest = command_of([self.name, *words])
        given, _ = own_options(name, rest)
        action, cls = name.split()[1], COMMANDS[name].config
        recipe = load_recipe(given["recipe"], self.recipes) if given.get("recipe") else None
        below = [from_mapping(cls, recipe.values, f"--recipe {recipe.name}")] if recipe else []
        return action, fit_amp(build(cls, *below, given), given), recipe

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
        if action == "train":
            begin = partial(set_up, self.task, config, recipe, line=start_command(self.name, words))
            return run_command(f"{self.name} train", config.compute.device, begin)
        return ended(f"{self.name} {action}", lambda: (self.predict if action == "predict" else self.evaluate)(config))

    def evaluate(self, config: Any) -> int:
        """Evaluates an exported model; prints the metrics, and writes them with what was found if there is --output."""
        task = self.task(config)
        for note in task.check():
            say(note)
        output = config.output and claim_folder(config.output, overwrite=config.overwrite)
        metrics, found, _ = task.evaluate(task.model)
        say(task.table(metrics))
        if output:
            by_class = {k: dict(zip(task.classes, v, strict=True)) for k, v in metrics.items() if isinstance(v, list)}
            write_json(output / "metrics.json", metrics | by_class, indent=2)
            task.write_found(output / "predictions.json", found)
        return 0
