"""`timm-convnextv2 demo`."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import flat, option, part
from ..console import say
from ..data.config import DemoOptions
from ..data.demo import DemoSource, write_folder
from .base import run


@dataclass(frozen=True)
class DemoConfig:
    """Options of the command."""

    folder: str = option(
        ..., "new or empty; written as FOLDER/{train,validation}/CLASS/*.png", metavar="FOLDER", positional=True
    )
    demo: DemoOptions = part(DemoOptions)


def demo(config: DemoConfig) -> None:
    """Writes the images."""
    folder, written, classes = write_folder(config.folder, **flat(config.demo)), config.demo, DemoSource.classes
    say(
        f"{folder}: {written.train} training images and {written.validation} validation images, {written.size} x "
        f"{written.size}, of {len(classes)} classes: {', '.join(classes)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run("demo", "Write a small labelled image folder to try things out.", DemoConfig, demo, argv)
