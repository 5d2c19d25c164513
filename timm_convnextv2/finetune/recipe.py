"""Recipes: YAML files with options of timm's train.py; those of this package lie in `recipes/`."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..console import closest

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Attributes:
        name: The file's name without its ending.
        path: Where it lies.
        values: Values by train.py's option names, with underscores.
        description: First line of the header.
        global_batch: Images per update over all processes that the schedule was made for, from the header's
            `Global batch:`; None where it names none.
    """

    name: str
    path: Path
    values: dict[str, Any]
    description: str = ""
    global_batch: int | None = None

    def from_scratch(self) -> "Recipe":
        """The same recipe from random weights."""
        return replace(self, values={**self.values, "pretrained": False})


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with this package, in its folder of them for a command."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(name: str, folder: Path = RECIPES) -> Recipe:
    """Reads a recipe by its name, or by the path of a YAML file.

    Args:
        name: See above.
        folder: Where the named ones lie.

    Raises:
        ValueError: No such recipe, or the file is not a mapping.
    """
    known = recipe_names(folder)
    path = folder / f"{name}.yaml" if name in known else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"--recipe {name} is unknown.{closest(name, known)} There are: {', '.join(known)}; "
            "or give the path of a .yaml file."
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f"--recipe {name} cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--recipe {name} holds {type(values).__name__}, expected lines of `option: value`.")
    header = _header(text)
    batch = re.search(r"^Global batch: ([\d,]+)", "\n".join(header), re.M)
    return Recipe(
        name=path.stem,
        path=path.resolve(),
        values=values,
        description=next(iter(header), ""),
        global_batch=int(batch[1].replace(",", "")) if batch else None,
    )


def _header(text: str) -> list[str]:
    """The comment lines before the first option, without their `#`."""
    comment = re.match(r"(?:#.*\n|\n)*", text)
    return [line[1:].strip() for line in comment[0].splitlines()] if comment else []


def list_recipes(folder: Path = RECIPES) -> str:
    """One line a recipe of a folder: its name and what it is for."""
    recipes = [load_recipe(name, folder) for name in recipe_names(folder)]
    width = max(len(recipe.name) for recipe in recipes)
    return "\n".join(f"{recipe.name:{width}}  {recipe.description}" for recipe in recipes)
