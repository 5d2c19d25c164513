"""The options of `timm-convnextv2 detect train|eval|predict`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from ..command import PROGRAM, CommandParser, closest
from ..finetune.recipe import Recipe, load_recipe

__all__ = ["RECIPES", "add_recipe", "build_parser", "parse"]

RECIPES = Path(__file__).parent / "recipes" / "detect"
CUDA = torch.cuda.is_available()


# fmt: off
def build_parser() -> CommandParser:
    """The three sub-commands."""
    parser = CommandParser(
        prog=f"{PROGRAM} detect",
        description="Detect objects: Mask R-CNN or Faster R-CNN on any backbone of timm, with COCO's annotations.",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
    train = commands.add_parser("train", help="train a detector on annotated images")
    evaluate = commands.add_parser("eval", help="measure a detector on annotated images")
    predict = commands.add_parser("predict", help="find objects in a folder of images")
    _add_train(train)
    for other in (evaluate, predict):
        other.add_argument("--model", required=True, metavar="FOLDER", help="what detect train exported: RUN/model")
    _add_data(evaluate, ("val",))
    add = predict.add_argument
    add("--images", required=True, metavar="DIR", help="images anywhere below it")
    add("--min-score", type=float, default=0.05, metavar="X", help="leave out what is less certain (default: 0.05)")
    evaluate.add_argument("--output", metavar="DIR", help="folder to write metrics.json and predictions.json to")
    predict.add_argument("--output", required=True, metavar="FILE", help="JSON to write, in COCO's format")
    for other in (evaluate, predict):
        _add_reading(other)
        other.add_argument("-b", "--batch-size", type=int, default=2, metavar="N", help="images at a time (default: 2)")
        other.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _add_data(parser: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="root of the data set; the paths below are relative to it")
    if "train" in splits:
        add("--train", default="train.json", metavar="FILE", help="annotations in COCO's format (default: train.json)")
        add("--train-images", default="train/images", metavar="DIR", help="their images (default: train/images)")
    if "val" in splits:
        add("--val", default="validation.json", metavar="FILE", help="to measure on (default: validation.json)")
        add("--val-images", default="validation/images", metavar="DIR", help="(default: validation/images)")
    add("--drop-wrong", action="store_true", help="leave wrong annotations out, with their count, in place of refusing")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nodata", type=float, metavar="V", help="stored value of pixels without data; they get the others' mean")
    add("--device", default="cuda" if CUDA else "cpu", metavar="NAME")
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="mixed precision")
    add("--amp-dtype", default="bfloat16", choices=["bfloat16", "float16"])
    add("-j", "--workers", type=int, default=4, metavar="N", help="data processes per process (default: 4)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--recipe", metavar="NAME", help="settings by name, or a .yaml file; the options here win")
    add("--list-recipes", action="store_true", help="name the recipes, and end")
    _add_data(parser, ("train", "val"))
    _add_reading(parser)
    model = parser.add_argument_group("model").add_argument
    model("--boxes-only", action="store_true", help="Faster R-CNN: boxes, no masks")
    model("--from-scratch", action="store_true", help="random weights in the backbone, to compare")
    model("--frozen", action="store_true", help="train the pyramid and the heads only")
    model("--in-chans", type=int, metavar="N", help="channels of the images (default: the model's)")
    model("--drop-path", type=float, metavar="X", help="share of residual paths left out in training")
    model("--out-channels", type=int, default=256, metavar="N", help="of the pyramid (default: 256)")
    model("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of timm.create_model's")
    model("--detector-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of torchvision's MaskRCNN, such as box_detections_per_img=300")
    images = parser.add_argument_group("images").add_argument
    images("--img-size", type=int, default=1024, metavar="N", help="side of the crops in training (default: 1024)")
    images("--scale", type=float, nargs=2, default=[0.1, 2.0], metavar="X",
           help="the image's size before the crop, in crops (default: 0.1 2.0)")
    images("--test-size", type=int, nargs=2, metavar=("SHORT", "LONG"),
           help="sides in evaluation: SHORT, but LONG at most (default: --img-size for both)")
    images("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip (default: 0.5)")
    images("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip (default: 0)")
    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=int, default=36, metavar="N", help="(default: 36)")
    training("-b", "--batch-size", type=int, default=4, metavar="N", help="images per process and step (default: 4)")
    training("--grad-accum-steps", type=int, default=1, metavar="N", help="steps per update (default: 1)")
    training("--opt", default="adamw", metavar="NAME", help="any optimizer of timm (default: adamw)")
    training("--lr", type=float, default=1e-4, metavar="X", help="learning rate of pyramid and heads (default: 1e-4)")
    training("--weight-decay", type=float, default=0.05, metavar="X", help="(default: 0.05)")
    training("--layer-decay", type=float, default=1.0, metavar="X", help="share of the rate in the next lower layer")
    training("--layer-decay-type", default="group", choices=["group", "single"], help="layers of a ConvNeXt V2")
    training("--sched", default="step", choices=["step", "cosine", "poly"], help="(default: step)")
    training("--decay-epochs", type=float, nargs="+", default=[27, 33], metavar="N",
             help="epochs after which 'step' divides the rate by 10 (default: 27 33)")
    training("--warmup-updates", type=int, default=1000, metavar="N", help="of linear warmup (default: 1000)")
    training("--clip-grad", type=float, metavar="NORM", help="clip the gradient's norm (default: no clipping)")
    training("--model-ema", action=argparse.BooleanOptionalAction, default=False,
             help="evaluate and export a moving average of the weights")
    training("--model-ema-decay", type=float, default=0.9998, metavar="X", help="(default: 0.9998)")
    training("--seed", type=int, default=42, metavar="N", help="(default: 42)")
    run = parser.add_argument_group("run").add_argument
    run("--output", default="output", metavar="DIR", help="(default: output)")
    run("--experiment", default="", metavar="NAME", help="sub-folder of --output (default: time and model)")
    run("--resume", default="", choices=["", "auto"], help="auto: continue the experiment's run, if there is one")
    run("--overwrite", action="store_true", help="first remove what an earlier run wrote to the folder")
    run("--eval-interval", type=int, default=1, metavar="N", help="epochs between evaluations (default: 1)")
    run("--shown-images", type=int, default=4, metavar="N", help="images to draw at each evaluation (default: 4)")
    run("--log-interval", type=int, default=20, metavar="N", help="updates between lines (default: 20)")
    run("--log-wandb", action="store_true")
    run("--wandb-project", metavar="NAME")
    run("--log-tensorboard", action="store_true")
    run("--dry-run", action="store_true", help="check everything, and end before training")
# fmt: on


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe | None]:
    """The options; of `train` with those of the recipe below them.

    Raises:
        ValueError: An option or a recipe is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    recipe = None
    if words[:1] == ["train"]:
        early = CommandParser(add_help=False)
        early.add_argument("--recipe")
        name = early.parse_known_args(words)[0].recipe
        if name is not None:
            recipe = load_recipe(name, RECIPES)
            words = ["train", *add_recipe(recipe, known_options()), *words[1:]]
    return parser.parse_args(words), recipe


def known_options() -> dict[str, argparse.Action]:
    """The options of `train` by name with underscores."""
    parser = CommandParser()
    _add_train(parser)
    return {action.dest: action for action in parser._actions}


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
