"""The options of `timm-convnextv2 segment train|eval|predict`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.utils import ParseKwargs

from ..command import PROGRAM, CommandParser
from ..finetune.recipe import Recipe
from .options import add_learning, add_reading, add_run, check_counts, with_recipe

__all__ = ["RECIPES", "build_parser", "parse"]

RECIPES = Path(__file__).parent / "recipes" / "segment"


# fmt: off
def build_parser() -> CommandParser:
    """The three sub-commands."""
    parser = CommandParser(
        prog=f"{PROGRAM} segment",
        description="Classify every pixel: UPerNet on any backbone of timm, with a mask for each image.",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
    train = commands.add_parser("train", help="train a segmenter on images with masks")
    evaluate = commands.add_parser("eval", help="measure a segmenter on images with masks")
    predict = commands.add_parser("predict", help="write masks for a folder of images")
    _add_train(train)
    for other in (evaluate, predict):
        other.add_argument("--model", required=True, metavar="FOLDER", help="what segment train exported: RUN/model")
    _add_data(evaluate)
    evaluate.add_argument("--split", default="validation", choices=["train", "validation", "test"],
                          help="what is measured (default: validation)")
    evaluate.add_argument("--output", metavar="DIR", help="folder to write metrics.json to")
    predict.add_argument("--images", required=True, metavar="DIR", help="images anywhere below it")
    predict.add_argument("--output", required=True, metavar="DIR", help="folder to write index PNGs to")
    for other in (evaluate, predict):
        add_reading(other)
        _add_test(other)
        other.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X",
                           help="factors of the image's size, whose probabilities are averaged (default: 1)")
        other.add_argument("--flip", action="store_true", help="average with the mirrored image")
        other.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR",
        help="with SPLIT/images and SPLIT/masks, or images/SPLIT and masks/SPLIT, for the splits train and validation")
    add("--classes", metavar="FILE", help="names of the classes, line 1 is index 0 (default: DATA_DIR/classes.txt)")
    add("--ignore-index", type=int, default=255, metavar="N", help="in masks: pixels that do not count (default: 255)")
    add("--reduce-zero-label", action="store_true",
        help="0 in a mask means no class, and the first class is 1, as in ADE20K")


def _add_test(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--short-side", type=int, metavar="N",
        help="resize images so that the shorter side has N pixels (default: the images' own size)")
    add("--window", type=int, metavar="N", help="test in sliding windows of N pixels (default: whole images)")
    add("--stride", type=int, metavar="N", help="pixels between windows (default: two thirds of --window)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--recipe", metavar="NAME", help="settings by name, or a .yaml file; the options here win")
    add("--list-recipes", action="store_true", help="name the recipes, and end")
    _add_data(parser)
    add_reading(parser)
    model = parser.add_argument_group("model").add_argument
    model("--from-scratch", action="store_true", help="random weights in the backbone, to compare")
    model("--frozen", action="store_true", help="train the heads only")
    model("--in-chans", type=int, metavar="N", help="channels of the images (default: the model's)")
    model("--drop-path", type=float, metavar="X", help="share of residual paths left out in training")
    model("--channels", type=int, default=512, metavar="N", help="of the head (default: 512)")
    model("--auxiliary-channels", type=int, default=256, metavar="N", help="of the auxiliary head; 0 for none")
    model("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of timm.create_model's")
    images = parser.add_argument_group("images").add_argument
    images("--img-size", type=int, default=512, metavar="N", help="side of the crops in training (default: 512)")
    images("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar="X",
           help="factor of the image's size before the crop (default: 0.5 2.0)")
    images("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip (default: 0.5)")
    images("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip (default: 0)")
    images("--colours", action=argparse.BooleanOptionalAction, default=True,
           help="distort the colours of images with three channels (default: yes)")
    _add_test(parser)
    group = parser.add_argument_group("training")
    add_learning(group, "the heads")
    training = group.add_argument
    training("--epochs", type=int, default=100, metavar="N", help="(default: 100)")
    training("--updates", type=int, metavar="N", help="length of the run in updates, in place of --epochs")
    training("-b", "--batch-size", type=int, default=8, metavar="N", help="images per process and step (default: 8)")
    training("--sched", default="poly", choices=["poly", "cosine"], help="poly: linear to 0 (default)")
    training("--warmup-updates", type=int, default=0, metavar="N", help="of linear warmup (default: 0)")
    training("--warmup-share", type=float, default=1e-6, metavar="X", help="of the rate, at its start (default: 1e-6)")
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
    if args.action == "train" and args.batch_size < 2:
        raise ValueError(
            f"--batch-size is {args.batch_size}, expected at least 2: batch normalisation needs several images."
        )
    return args, recipe
