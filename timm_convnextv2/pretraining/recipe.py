"""Recipes of pretraining: the one that --recipe names, or the one that suits the images."""

import contextlib
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config import flat, from_mapping
from ..data.config import ImagePaths
from ..data.formats.decode import read_header
from ..data.paths.listing import first_files, origins_of
from ..recipes import load_recipe
from .config import PretrainConfig

RECIPES = Path(__file__).parent / "recipes"
SMALL = "small-images"
LARGEST_SMALL = 96  # px
LARGEST_CROP = 64  # px; patches of one pixel make larger crops slow
TRIED = 32  # images whose size is read
OWN_NETWORK = {"patch_size", "model_kwargs", "pretrained", "weights"}  # naming one of these chooses the recipe oneself


def recipe_values(config: PretrainConfig, named: Collection[str]) -> dict[str, Any]:
    """The values of the recipe of a run, its name included; {} for the defaults.

    The recipe is that of --recipe, or `small-images` if the images, or the crops that the user `named`, are small.
    """
    name, crop = config.recipe, None
    if "input_size" in named and config.crops.input_size:
        crop = min(config.crops.input_size[1:])
    elif "img_size" in named:
        crop = config.crops.img_size
    if name is None and OWN_NETWORK & {*named}:
        return {}
    side = crop
    if side is None and name in (None, SMALL) and not (config.data_set.dataset or config.paths.index):
        side = usual_side(config.paths)
        side = min(filter(None, (side, config.windows.window_size)), default=None)
    if name is None and (side is None or side > LARGEST_SMALL):
        return {}
    recipe = load_recipe(name or SMALL, RECIPES)
    values = from_mapping(PretrainConfig, recipe.values, f"--recipe {recipe.name}")
    if recipe.name == SMALL and crop is None and side is not None:
        values["img_size"] = max(16, min(LARGEST_CROP, side // 8 * 8))
    return {"recipe": name or SMALL, **values}


def usual_side(paths: ImagePaths) -> int | None:
    """The median shorter side in pixels of the first images of folders and lists; None for other places."""
    sides = []
    with contextlib.suppress(OSError, ValueError):  # refused later, with all other mistakes
        for path in first_files(origins_of(paths.data_dir, paths.data_list), TRIED):
            with contextlib.suppress(OSError, ValueError):
                header = read_header(path)
                sides.append(min(header.height, header.width))
    return int(statistics.median(sides)) if sides else None


def recipe_line(config: PretrainConfig) -> str:
    """What the recipe of a run sets, or ''."""
    if config.recipe is None:
        return ""
    recipe, settings = load_recipe(config.recipe, RECIPES), flat(config)
    values = {name: settings[name] for name in (*recipe.values, *(["img_size"] if recipe.name == SMALL else []))}
    shown = ", ".join(f"{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values.items())
    return f"Recipe {recipe.name}, {recipe.description}: {shown}"
