"""`timm-convnextv2 demo`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import add_options, build, flat, option, part, words_given
from ..console import PROGRAM, CommandParser, refused, say
from ..data.demo import DemoSource, write_folder
from ..data.demo.folder import DemoOptions


@dataclass(frozen=True)
class DemoConfig:
    """Options of the command."""

    folder: str = option(
        ..., "new or empty; written as FOLDER/{train,validation}/CLASS/*.png", metavar="FOLDER", positional=True
    )
    demo: DemoOptions = part(DemoOptions)


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser(prog=f"{PROGRAM} demo", description="Write a small labelled image folder to try things out.")
    add_options(parser, DemoConfig)
    try:
        config = build(DemoConfig, words_given(parser, argv))
        folder = write_folder(config.folder, **flat(config.demo))
    except (ValueError, OSError) as e:
        return refused("demo", e)
    demo, classes = config.demo, DemoSource.classes
    say(
        f"{folder}: {demo.train} training images and {demo.validation} validation images, {demo.size} x {demo.size}, "
        f"of {len(classes)} classes: {', '.join(classes)}"
    )
    return 0
