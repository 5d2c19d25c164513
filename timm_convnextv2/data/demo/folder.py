"""Writes demo images as a labelled folder, or with boxes and masks for detection and segmentation."""

import colorsys
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...config import check_limits
from ..config import DemoOptions
from .images import DemoSource

# `--dataset demo` draws seed 0 for the split 'train' and 1 for any other, `open_labelled("demo")` 2 and 3
_OTHER_SEEDS = 4


def write_folder(folder: str | os.PathLike, **options: Any) -> Path:
    """Writes `FOLDER/{train,validation}/CLASS/*.png`, as timm's `train.py` reads it; returns its absolute path.

    With `coco` or `masks`, writes images with one object of these textures in each to
    `FOLDER/{train,validation}/images`, beside their annotations. No image is in both splits, in the folder of another
    seed, or among the images of `--dataset demo`. The folder appears once it is complete. `options` are fields of
    `DemoOptions`.

    Raises:
        ValueError: The folder exists and is not empty (or is a file), or an option is out of range.
    """
    chosen = DemoOptions(**options)
    check_limits(chosen)
    splits = {"train": chosen.train, "validation": chosen.validation}
    for name, count in splits.items():
        if count % len(DemoSource.classes):
            raise ValueError(
                f"--{name} {count}: expected a multiple of {len(DemoSource.classes)}, the number of classes."
            )
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Choose another one, or remove it.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for number, (split, count) in enumerate(splits.items(), _OTHER_SEEDS + 2 * chosen.seed):
            annotated = chosen.coco or chosen.masks
            write = _write_annotated if annotated else _write_labelled
            write(DemoSource(count, chosen.size, seed=number, objects=annotated), temporary, split, chosen)
        if folder.exists():
            folder.rmdir()  # Windows cannot move a folder onto an empty one
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_labelled(source: DemoSource, folder: Path, split: str, options: DemoOptions) -> None:
    """Writes one folder per class."""
    for name in source.classes:
        (folder / split / name).mkdir(parents=True)
    for i in range(len(source)):
        _to_pil(source, i).save(folder / split / source.classes[source.label(i)] / f"{i:05d}.png")


def _write_annotated(source: DemoSource, folder: Path, split: str, options: DemoOptions) -> None:
    """Writes one folder of images, and their annotations."""
    home, categories = folder / split, [dict(id=label, name=name) for label, name in enumerate(source.classes, 1)]
    (home / "images").mkdir(parents=True)
    if options.masks:
        (home / "masks").mkdir()
        (folder / "classes.txt").write_text("".join(f"{n}\n" for n in ("background", *source.classes)))
    images, annotations = [], []
    for i in range(len(source)):
        name, label, mask = f"{i:05d}.png", source.label(i) + 1, source.mask(i)
        _to_pil(source, i).save(home / "images" / name)
        images.append(dict(id=i + 1, file_name=name, height=source.size, width=source.size))
        annotations.append(_annotation(i + 1, label, mask))
        if options.masks:
            image = Image.fromarray(mask.astype(np.uint8) * label, mode="L")
            image.putpalette(_palette(len(source.classes)))
            image.save(home / "masks" / name)
    if options.coco:
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _to_pil(source: DemoSource, i: int) -> Image.Image:
    return Image.fromarray(source[i].permute(1, 2, 0).numpy())


def _annotation(number: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    """COCO's annotation of the one object of an image; `mask` is bool `[H, W]`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    box, area, runs = [left, top, right - left, bottom - top], int(mask.sum()), uncompressed_rle(mask)
    return dict(id=number, image_id=number, category_id=label, bbox=box, area=area, iscrowd=0, segmentation=runs)


def uncompressed_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's run lengths of a bool mask `[H, W]`: column by column, starting with the zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return dict(size=[int(n) for n in mask.shape], counts=counts[:-1] if counts[-1] == 0 else counts)


def _palette(classes: int) -> list[int]:
    """Black, then one colour per class."""
    colours = [colorsys.hsv_to_rgb(i / classes, 0.8, 0.95) for i in range(classes)]
    return [0, 0, 0, *(round(255 * value) for colour in colours for value in colour)]
