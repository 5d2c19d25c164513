"""The options of `timm-convnextv2 detect train|eval|predict`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.utils import ParseKwargs

from ..command import PROGRAM, CommandParser
from ..finetune.recipe import Recipe
from .options import add_learning, add_reading, add_run, check_counts, with_recipe
from .soft_nms import METHODS

__all__ = ["RECIPES", "build_parser", "parse"]

RECIPES = Path(__file__).parent / "recipes" / "detect"


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
        add_reading(other)
        other.add_argument("--soft-nms", choices=METHODS, help="lower the scores of boxes that overlap better ones, as "
                           "the paper does, in place of removing them (default: remove)")
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


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--recipe", metavar="NAME", help="settings by name, or a .yaml file; the options here win")
    add("--list-recipes", action="store_true", help="name the recipes, and end")
    _add_data(parser, ("train", "val"))
    add_reading(parser)
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
    group = parser.add_argument_group("training")
    add_learning(group, "pyramid and heads")
    training = group.add_argument
    training("--epochs", type=int, default=36, metavar="N", help="(default: 36)")
    training("-b", "--batch-size", type=int, default=4, metavar="N", help="images per process and step (default: 4)")
    training("--sched", default="step", choices=["step", "cosine", "poly"], help="(default: step)")
    training("--decay-epochs", type=float, nargs="+", default=[27, 33], metavar="N",
             help="epochs after which 'step' divides the rate by 10 (default: 27 33)")
    training("--warmup-updates", type=int, default=1000, metavar="N", help="of linear warmup (default: 1000)")
    add_run(parser)
# fmt: on


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe | None]:
    """The options; of `train` with those of the recipe below them.

    Raises:
        ValueError: An option or a recipe is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words, recipe = with_recipe(words, RECIPES, _add_train)
    args = build_parser().parse_args(words)
    check_counts(args)
    return args, recipe
