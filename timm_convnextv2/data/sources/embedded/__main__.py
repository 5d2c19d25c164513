"""Writes the embedded pictures as a labelled image folder.

python -m timm_convnextv2.data.embedded FOLDER [--size 56] [--train N] [--validation N] [--seed S] [--coco] [--masks]
"""

import argparse
import sys

from . import EmbeddedSource, write_folder


def cli(argv: list[str] | None = None) -> int:
    """Runs `write_folder`; a mistake in the options is one message and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_convnextv2.data.embedded", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="written as FOLDER/{train,validation}/CLASS/*.png; new, or empty")
    add("--size", type=int, default=56, metavar="N", help="height and width in pixels (default: 56)")
    add("--train", type=int, default=160, metavar="N", help="training pictures, a multiple of 8 (default: 160)")
    add("--validation", type=int, default=800, metavar="N", help="validation pictures, likewise (default: 800)")
    add("--seed", type=int, default=0, metavar="S", help="which pictures; none are those of pretraining (default: 0)")
    add(
        "--coco",
        action="store_true",
        help="write FOLDER/{train,validation}.json with boxes and masks, images in images/",
    )
    add("--masks", action="store_true", help="write {train,validation}/masks/*.png, images in images/, and classes.txt")
    args = parser.parse_args(argv)
    try:
        folder = write_folder(**vars(args))
    except (ValueError, OSError) as e:
        print(f"{parser.prog}: error: {e}", file=sys.stderr)
        return 2
    classes = EmbeddedSource.classes
    print(
        f"{folder}: {args.train} pictures to train and {args.validation} to validate, {args.size} x {args.size}, of "
        f"{len(classes)} classes: {', '.join(classes)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli())
