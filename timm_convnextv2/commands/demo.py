"""`timm-convnextv2 demo`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import flat, option, part
from ..console import say
from ..data.demo import DemoSource, write_folder
from ..data.demo.folder import DemoOptions
from .base import run


@dataclass(frozen=True)
class DemoConfig:
    """Options of the command."""

    folder: str = option(
        ..., "new or empty; written as FOLDER/{train,validation}/CLASS/*.png", metavar="FOLDER", positional=True
    )
    demo: DemoOptions = part(DemoOptions)


def main(argv: Sequence[str] | None = None) -> int:
    return run("demo", "Write a small labelled image folder to try things out.", DemoConfig, write, argv)


def write(config: DemoConfig) -> None:
    folder = write_folder(config.folder, **flat(config.demo))
    demo, classes = config.demo, DemoSource.classes
    say(
        f"{folder}: {demo.train} training images and {demo.validation} validation images, {demo.size} x {demo.size}, "
        f"of {len(classes)} classes: {', '.join(classes)}"
    )
