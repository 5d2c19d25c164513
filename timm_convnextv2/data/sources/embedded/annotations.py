"""What detection and segmentation read beside images: COCO's JSON, and PNGs with the class of each pixel."""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Annotations:
    """The annotations of a split, with one object an image.

    Args:
        folder: Gets `SPLIT.json`, `SPLIT/masks/` and `classes.txt`.
        split: Name of the split; `folder / split` exists.
        classes: Their names; the numbers in the files start at 1.
        coco: Write the JSON.
        masks: Write the PNGs and `classes.txt`.
    """

    def __init__(self, folder: Path, split: str, classes: Sequence[str], coco: bool, masks: bool) -> None:
        self.folder, self.split, self.classes, self.coco, self.masks = folder, split, classes, coco, masks
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        if masks:
            (folder / split / "masks").mkdir()

    def add(self, name: str, label: int, mask: np.ndarray) -> None:
        """Adds an image: its file name, the class of its object from 0, and the object's pixels, bool `[H, W]`."""
        number, (height, width) = len(self.images) + 1, mask.shape
        self.images.append(dict(id=number, file_name=name, height=height, width=width))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        self.annotations.append(
            dict(
                id=number,
                image_id=number,
                category_id=label + 1,
                bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                area=int(mask.sum()),
                iscrowd=0,
                segmentation=uncompressed_rle(mask),
            )
        )
        if self.masks:
            image = Image.fromarray(mask.astype(np.uint8) * (label + 1), mode="L")
            image.putpalette(_palette(len(self.classes)))
            image.save(self.folder / self.split / "masks" / name)

    def write(self) -> None:
        """Writes what belongs to all images."""
        if self.coco:
            categories = [dict(id=i, name=name) for i, name in enumerate(self.classes, 1)]
            content = dict(images=self.images, annotations=self.annotations, categories=categories)
            (self.folder / f"{self.split}.json").write_text(json.dumps(content), encoding="utf-8")
        if self.masks:
            (self.folder / "classes.txt").write_text("".join(f"{n}\n" for n in ("background", *self.classes)))


def uncompressed_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's run lengths of a bool mask `[H, W]`: column by column, the first run is of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return dict(size=[int(n) for n in mask.shape], counts=counts[:-1] if counts[-1] == 0 else counts)


def _palette(classes: int) -> list[int]:
    """Black, and a colour a class."""
    colours = [colorsys.hsv_to_rgb(i / classes, 0.8, 0.95) for i in range(classes)]
    return [0, 0, 0, *(round(255 * value) for colour in colours for value in colour)]
