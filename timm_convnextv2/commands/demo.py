"""`timm-convnextv2 demo`."""

from collections.abc import Sequence

from ..config import flat
from ..console import say
from ..data.demo import DemoSource, write_folder
from .base import run
from .options import DemoConfig


def demo(config: DemoConfig) -> None:
    """Writes the images."""
    folder, written, classes = write_folder(config.folder, **flat(config.demo)), config.demo, DemoSource.classes
    say(
        f"{folder}: {written.train} training images and {written.validation} validation images, {written.size} x "
        f"{written.size}, of {len(classes)} classes: {', '.join(classes)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run("demo", demo, argv)
