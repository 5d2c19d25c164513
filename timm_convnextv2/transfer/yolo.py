"""Labels in YOLO's format: `data.yaml`, and a text file of boxes or polygons beside each image."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..config import parse_yaml
from ..console import count
from ..data import FolderSource, ImageError
from ..data.formats.decode import open_scene, read_header
from ..data.formats.files import printable
from ..data.formats.pixels import PLAIN
from .figures import first

_EXPECTED = "`CLASS X Y WIDTH HEIGHT` or a polygon, `CLASS X1 Y1 X2 Y2 X3 Y3 ...`, relative to the image's size"


class YoloImage(NamedTuple):
    """An image and its objects: class index, and a box `[[x1, y1], [x2, y2]]` or a polygon `[N, 2]`, in pixels."""

    path: str
    height: int
    width: int
    objects: list[tuple[int, np.ndarray]]


def find_yolo(file: Path, root: Path) -> Path | None:
    """The `data.yaml` to read instead of `file`: the file itself, or that of the root if the file does not exist."""
    if file.suffix in (".yaml", ".yml"):
        return file
    return root / "data.yaml" if not file.exists() and (root / "data.yaml").is_file() else None


def read_yolo(file: Path, split: str) -> tuple[list[str], list[YoloImage]]:
    """The class names, and the images of a split ('train' or 'val') with their labels.

    An image without a label file has no objects. `names` is a list or a mapping from 0; `path` and the splits are
    folders relative to `data.yaml`, or a `.txt` with one image per line.

    Raises:
        ValueError: A file cannot be read, a label is in another format, or no image has labels.
    """
    try:
        content: Any = parse_yaml(file.read_text(encoding="utf-8"))
        names = content["names"]
        names = [names[i] for i in range(len(names))]
        places = content[split] if isinstance(content[split], list) else [content[split]]
        root = file.parent / (content.get("path") or "")
        root = root if root.is_dir() else file.parent
        paths = [Path(os.path.abspath(path)) for place in places for path in _images(root, str(place))]
    except (OSError, ValueError, KeyError, TypeError) as e:
        what = f"'{file}' cannot be read as YOLO's data.yaml ({type(e).__name__}: {' '.join(str(e).split())})"
        raise ValueError(f"{what}; expected `names`, `train` and `val`.") from e
    labels = [_label_file(path) for path in paths]
    if not any(label.is_file() for label in labels):
        raise ValueError(f"None of {len(paths)} images of '{split}' has labels, such as {first(labels, 1)}.")
    faults: list[str] = []
    images = [_read(path, label, len(names), faults) for path, label in zip(paths, labels, strict=True)]
    if faults:
        raise ValueError(f"{count(len(faults), 'label')} cannot be used: {first(faults)}. Expected {_EXPECTED}.")
    return [str(name) for name in names], images


def _images(root: Path, place: str) -> list[Path]:
    folder = root / place
    if not folder.exists() and place.startswith("../"):  # as Roboflow exports
        folder = root / place.removeprefix("../")
    if folder.suffix == ".txt":
        lines = folder.read_text(encoding="utf-8").split("\n")
        return [folder.parent / line.strip() for line in lines if line.strip()]
    source = FolderSource(folder)
    return sorted(Path(source.path(i)) for i in range(len(source)))


def _label_file(path: Path) -> Path:
    """`images/` is replaced by `labels/` in the last place where it stands, as YOLO does."""
    before, _, after = path.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}" if before else path).with_suffix(".txt")


def _read(path: Path, label: Path, num_classes: int, faults: list[str]) -> YoloImage:
    try:
        with closing(open_scene(str(path), 3, PLAIN)) as scene:
            height, width = scene.size
    except ImageError:  # other channels
        header = read_header(path)
        height, width = header.height, header.width
    image = YoloImage(str(path), height, width, [])
    for number, line in enumerate(label.read_text(encoding="utf-8").splitlines() if label.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            cls, *values = map(float, line.split())
        except ValueError:
            cls, values = -1.0, []
        points, box = np.array(values), len(values) == 4
        shaped = box or len(values) >= 6 and len(values) % 2 == 0
        if not (shaped and cls in range(num_classes) and (points >= -0.01).all() and (points <= 1.01).all()):
            faults.append(f"{printable(label)} line {number}: {line.strip()[:60]}")
            continue
        points = points.reshape(-1, 2)
        points = np.stack([points[0] - points[1] / 2, points[0] + points[1] / 2]) if box else points
        image.objects.append((int(cls), points.clip(0, 1) * (width, height)))
    return image


def to_coco(names: list[str], images: list[YoloImage]) -> tuple[dict[str, Any], Path]:
    """The same in COCO's format, and the folder that the paths are relative to."""
    root, annotations = Path(os.path.commonpath([Path(image.path).parent for image in images])), []
    for number, image in enumerate(images):
        for cls, points in image.objects:
            (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
            outline = {} if len(points) == 2 else {"segmentation": [points.ravel().tolist()]}
            box = [left, top, right - left, bottom - top]
            annotations.append(dict(id=len(annotations), image_id=number, category_id=cls, bbox=box, **outline))
    entries = [
        dict(id=i, file_name=Path(image.path).relative_to(root).as_posix(), height=image.height, width=image.width)
        for i, image in enumerate(images)
    ]
    categories = [dict(id=i, name=name) for i, name in enumerate(names)]
    return dict(images=entries, annotations=annotations, categories=categories), root


def draw_classes(image: YoloImage) -> np.ndarray:
    """The polygons as a mask, int64 `[H, W]`: 0 is the background, class i is i + 1; later ones lie on top."""
    mask = Image.new("I", (image.width, image.height))
    for cls, points in image.objects:
        if len(points) == 2:
            raise ValueError(f"'{printable(image.path)}' is labelled with boxes; segmentation needs polygons.")
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points.tolist()], fill=cls + 1)
    return np.array(mask).astype(np.int64)
