"""The options that `finetune`, `validate` and `predict` have besides those of timm's scripts."""

from dataclasses import dataclass
from pathlib import Path

from ..config import option, part
from ..data.config import Splitting

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of `validate` and `predict` themselves; all others go to timm's validate.py or inference.py."""

    timm_train: str | None = option(
        None, "timm's script, or the folder of a clone (default: TIMM_TRAIN, timm's clone, or the cache)",
        metavar="PATH",
    )  # fmt: skip
    nodata: float | None = option(
        None, 'stored value that means "no data"; such pixels are filled with the mean (default: the model\'s; '
        "nan: none)", metavar="V",
    )  # fmt: skip


@dataclass(frozen=True)
class PredictConfig(EvaluationConfig):
    """Options of `predict` itself."""

    max_bad_images: float = option(
        1.0, "stop without results if more than this fraction of the images cannot be decoded", metavar="X",
        at_least=0, at_most=1,
    )  # fmt: skip


@dataclass(frozen=True)
class FinetuneConfig(EvaluationConfig):
    """Options of `finetune` itself; all others go to timm's train.py."""

    recipe: str | None = option(
        None, "a recipe of --list-recipes, or a YAML file with options of train.py", metavar="NAME"
    )
    list_recipes: bool = option(False, "print names and purposes of the recipes, then stop")
    global_batch_size: int | None = option(None, "images per update over all processes", metavar="N")
    from_scratch: bool = option(False, "the same recipe from random weights")
    no_amp: bool = option(False, "float32, although the recipe sets amp")
    license: str | None = option(
        None, "licence of the weights, e.g. mit; weights that you start from keep their own", metavar="ID"
    )
    split: Splitting = part(Splitting, "images")
    dry_run: bool = option(False, "check everything, print what would run, then stop")
