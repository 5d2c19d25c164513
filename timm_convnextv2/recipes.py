"""Recipes: YAML files of a command's options, with their source, batch size and cost in a header of comments."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import parse_yaml
from .console import closest


@dataclass(frozen=True)
class Recipe:
    """A recipe file."""

    name: str  # without the ending
    path: Path  # absolute
    values: dict[str, Any]  # by option name
    description: str = ""  # first line of the header
    global_batch: int | None = None  # images per update over all processes, from the header's `Global batch:`

    def evolve(self, **values: Any) -> "Recipe":
        """A copy with other values."""
        return replace(self, values={**self.values, **values})


def recipe_names(folder: Path) -> list[str]:
    """Names of the recipes in a folder of this package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(name: str, folder: Path) -> Recipe:
    """Reads the recipe `name` in `folder`, or the .yaml file of that path; a ValueError if there is none."""
    known = recipe_names(folder)
    path = folder / f"{name}.yaml" if name in known else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"--recipe {name} is unknown.{closest(name, known)} Expected one of {', '.join(known)}, "
            "or the path of a .yaml file."
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_yaml(text)
    except (OSError, ValueError) as e:
        raise ValueError(f"--recipe {name} cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--recipe {name} holds {type(values).__name__}, expected lines of `option: value`.")
    comment = re.match(r"(?:#.*\n|\n)*", text)  # only before the first option: later comments explain single values
    header = [line[1:].strip() for line in comment[0].splitlines()] if comment else []
    batch = re.search(r"^Global batch: ([\d,]+)", "\n".join(header), re.M)
    return Recipe(
        name=path.stem,
        path=path.resolve(),
        values=values,
        description=header[0] if header else "",
        global_batch=int(batch[1].replace(",", "")) if batch else None,
    )


def list_recipes(folder: Path) -> str:
    """One line per recipe of a folder: its name and what it is for."""
    recipes = [load_recipe(name, folder) for name in recipe_names(folder)]
    width = max(len(recipe.name) for recipe in recipes)
    return "\n".join(f"{recipe.name:{width}}  {recipe.description}" for recipe in recipes)
