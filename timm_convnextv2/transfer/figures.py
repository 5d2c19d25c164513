"""What both tasks show: images of what a model found, names in messages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.formats.files import printable
from ..files import whole_file


def save_image(path: str | Path, image: Any) -> None:
    """Writes uint8 `[H, W, 3]`, or an image of Pillow, as a PNG; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with whole_file(path) as part:
        image.save(part, format="png")


def first(names: Iterable[Any], limit: int = 3) -> str:
    """The first of some names, for a message."""
    names = [printable(str(name)[:200]) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
