"""Annotations in COCO's format: reading, checks before training starts, and images with targets for a detector."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ...data import Pixels, load_image
from ...data.formats.errors import UnreadableError, naming
from ...data.formats.files import printable
from ...data.formats.pixels import PLAIN
from ..figures import first
from ..yolo import read_yolo, to_coco

TOLERANCE = 1.0  # pixels that a box may exceed its image by, because tools round; the excess is cut off
FIT = 0.5  # smallest overlap (IoU) of a box with the box around its mask

_NO_MASK = "annotations without a `segmentation`"
_OUTSIDE, _NO_FIT = "boxes that reach outside of their image", "boxes that do not fit their masks"
_BOXES_ONLY = "Fix the file, or train without masks: --boxes-only."
_DROP = "Fix the file, or leave them out: --drop-wrong."
_RELATIVE, _CORNERS = "fractions of the image's size", "x1 y1 x2 y2"
_MERGE = "Fix the file, or merge them: --merge-duplicates."
_CROWD = {"0": 0, "1": 1, "false": 0, "true": 1, "": 0, "none": 0, "0.0": 0, "1.0": 1}


class CocoImage(NamedTuple):
    """An image and its annotations."""

    id: int
    path: str
    name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]


class Coco(NamedTuple):
    """Annotations that passed every check; `notes` count what was left out, merged or is unusual."""

    file: Path
    images: list[CocoImage]
    classes: list[str]  # in the order of `category_ids`
    category_ids: list[int]  # sorted; label i of a detector is number i - 1 here, as 0 is the background
    notes: tuple[str, ...] = ()

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return [annotation for image in self.images for annotation in image.annotations]

    @property
    def most_objects(self) -> int:
        """The largest number of objects in an image."""
        return max(sum(not a["iscrowd"] for a in image.annotations) for image in self.images)

    def content(self) -> dict[str, Any]:
        """The content of a COCO file, for an evaluator."""
        images = [dict(id=i.id, file_name=i.name, height=i.height, width=i.width) for i in self.images]
        categories = [dict(id=n, name=name) for n, name in zip(self.category_ids, self.classes, strict=True)]
        return dict(info={}, images=images, annotations=self.annotations, categories=categories)


def rle_codec() -> Any:
    """The module that encodes and decodes COCO's masks; a `ValueError` if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as e:
        need = "COCO masks and metrics need faster-coco-eval: pip install 'timm_convnextv2[detect]'"
        raise ValueError(f"{need} ({e}).") from e
    return mask


def open_coco(
    file: str | Path, folder: str | Path, *, split: str = "train", masks: bool = True, drop_wrong: bool = False,
    merge: bool = False
) -> Coco:  # fmt: skip
    """Reads and checks annotations of objects; images are relative to `folder`. YOLO's data.yaml is read as well.

    Ids may have gaps, annotations may be crowds (`iscrowd`), and images may have no annotations. With `masks`, every
    annotation needs a `segmentation`, polygons or RLE. Wrong annotations (no area, outside of the image, broken mask)
    are a `ValueError` with the count and the first names of each kind; `drop_wrong` drops and counts them instead.
    Images, annotations and category names that occur twice are an error, too, unless `merge`.
    """
    file, folder = Path(file), Path(folder)
    rle_codec()  # for its error message
    checks = _Checks(file, masks, drop_wrong, merge)
    if file.suffix in (".yaml", ".yml"):
        content, folder = to_coco(*read_yolo(file, split))
    else:
        content = _read(file)
        if not folder.is_dir():
            raise ValueError(f"The folder of the images, '{folder}', does not exist or is a file.")
    categories, same = checks.categories(content["categories"], content["annotations"])
    images, moved = checks.images(content["images"], folder)
    checks.attach(content["annotations"], images, moved, same)
    ids = sorted(categories)
    return Coco(file, list(images.values()), [categories[i] for i in ids], ids, tuple(checks.notes))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"The annotations '{file}' do not exist.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"The annotations '{file}' cannot be read as JSON: {e}") from e
    lists = ("images", "annotations", "categories")
    for name in lists:
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            keys = first(content, 9) if isinstance(content, dict) else ""
            what = f"has the keys {keys}" if keys else f"is a {type(content).__name__}"
            raise ValueError(
                f"'{file}' {what}; expected COCO's format, an object with lists of objects: {', '.join(lists)} "
                f"('{name}' is missing or no such list)."
            )
        if not part and name != "annotations":
            raise ValueError(f"'{file}' has no {name}.")
    return content


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


class _Checks:
    """The checks of a file. Faults are refused, or left out or merged on request and counted in `notes`."""

    def __init__(self, file: Path, masks: bool, drop_wrong: bool, merge: bool) -> None:
        self.file, self.masks, self.drop_wrong, self.merge = file, masks, drop_wrong, merge
        self.notes: list[str] = []

    def refuse(self, wrong: Sequence[Any], what: str, remedy: str = "Fix the file.") -> None:
        """Raises one message for all faults of a kind, if there are any."""
        if wrong:
            raise ValueError(f"'{self.file}' has {len(wrong)} {what}: {first(wrong)}. {remedy}")

    def entries(self, entries: list[dict[str, Any]], what: str, **valid: Callable[[Any], bool]) -> None:
        """Refuses entries without a valid value of each key, and equal ids."""
        for key, is_valid in valid.items():
            self.refuse([e for e in entries if not is_valid(e.get(key))], f"{what} without a valid `{key}`")
        ids = Counter(e["id"] for e in entries)
        self.refuse([i for i, n in ids.items() if n > 1], f"{what} of equal `id`")

    def duplicates(self, found: Sequence[Any], what: str) -> None:
        """Refuses entries that repeat others, or counts them."""
        if not self.merge:
            self.refuse(found, what, _MERGE)
        elif found:
            self.notes.append(f"merged {len(found)} {what}: {first(found)}")

    def categories(
        self, entries: list[dict[str, Any]], annotations: list[dict[str, Any]]
    ) -> tuple[dict[int, str], dict[int, int]]:
        """The names by id, and the id that each id stands for."""
        self.entries(entries, "categories", id=_is_integer, name=_is_text)
        used = {a["category_id"] for a in annotations if _is_integer(a.get("category_id"))}
        parents = [(e["id"], str(e.get("supercategory"))) for e in entries]
        roots = [
            e for e in entries
            if e["id"] not in used and any(i != e["id"] and parent == e["name"] for i, parent in parents)
        ]  # fmt: skip
        if roots:
            what = "categories that no annotation uses, the parents of others"
            self.notes.append(f"left out {len(roots)} {what}: {first(e['name'] for e in roots)}")
        ids: dict[str, int] = {}
        same = {e["id"]: ids.setdefault(e["name"], e["id"]) for e in entries if e not in roots}
        twice = [e["name"] for e in entries if same.get(e["id"], e["id"]) != e["id"]]
        self.duplicates(twice, "categories of equal name")
        return {i: name for name, i in ids.items()}, same

    def images(self, entries: list[dict[str, Any]], folder: Path) -> tuple[dict[int, CocoImage], dict[int, int]]:
        """The images by id, and the id that each id stands for."""
        sides = dict.fromkeys(("height", "width"), lambda v: _is_integer(v) and 0 < v < 2**31)
        self.entries(entries, "images", id=_is_integer, file_name=_is_text, **sides)
        images, ids, outside, lost = {}, {}, [], []
        same: dict[int, int] = {}
        for e in entries:
            name = e["file_name"]
            if "\\" in name and not os.path.isfile(folder / name):
                name = name.replace("\\", "/")  # written on Windows
            path = os.path.normpath(folder / name)
            if not path.startswith(os.path.join(os.path.normpath(folder), "")):
                outside.append(name)
            elif not os.path.isfile(path):
                lost.append(name)
            same[e["id"]] = ids.setdefault(path, e["id"])
            if same[e["id"]] == e["id"]:
                images[e["id"]] = CocoImage(e["id"], path, name, e["height"], e["width"], [])
        self.refuse(outside, f"images whose `file_name` leaves their folder '{folder}'")
        parent = lost and os.path.isfile(folder.parent / lost[0])
        remedy = f"Pass the folder that they are in, '{folder.parent}'." if parent else "Fix the file."
        self.refuse(lost, f"images (of {len(entries)}) that are missing in '{folder}'", remedy)
        twice = [e["file_name"] for e in entries if same[e["id"]] != e["id"]]
        self.duplicates(twice, "files under several image ids")
        return images, same

    def attach(
        self, entries: list[dict[str, Any]], images: dict[int, CocoImage], moved: dict[int, int], same: dict[int, int]
    ) -> None:
        """Adds the annotations to their images."""
        for key, known, what in (("image_id", moved, "images"), ("category_id", same, "categories")):
            lost = [f"{key} {e.get(key)}" for e in entries if not _is_integer(e.get(key)) or e[key] not in known]
            self.refuse(lost, f"annotations of {what} that it does not list")
        boxes = [(e["bbox"], images[moved[e["image_id"]]]) for e in entries if _is_box(e.get("bbox"))]
        unit = _unit(boxes)
        if unit == _RELATIVE:
            what = f"'{self.file}': all {len(boxes)} boxes lie within 0 and 1, as if relative to the image's size"
            raise ValueError(f"{what}. Multiply them by its width and height.")
        faults: dict[str, list[str]] = {}
        seen: dict[tuple, list[Any]] = {}
        twice, small, crowds = [], 0, 0
        for number, entry in enumerate(entries, 1):
            image, category = images[moved[entry["image_id"]]], same[entry["category_id"]]
            where = f"annotation {entry.get('id', number)} of {image.name}"
            if fault := _fault(entry, image, self.masks):
                faults.setdefault(fault, []).append(where)
                continue
            x, y, w, h = (float(v) for v in entry["bbox"])
            others, mask = seen.setdefault((image.id, category, x, y, w, h), []), entry.get("segmentation")
            if mask in others:
                twice.append(where)
                continue
            others.append(mask)
            crowd, area = _CROWD[str(entry.get("iscrowd", 0)).lower()], entry.get("area")
            small, crowds = small + (w < 1 or h < 1), crowds + crowd
            fields = dict(id=number, category_id=category, image_id=image.id, iscrowd=crowd, bbox=[x, y, w, h])
            image.annotations.append({**entry, **fields, "area": w * h if area is None else area})
        for fault, names in faults.items():
            if not self.drop_wrong:
                many = fault in (_OUTSIDE, _NO_FIT) and len(names) > 0.05 * len(boxes)
                hint = f" As a whole they look like {unit}." if unit and many else ""
                self.refuse(names, fault, (_BOXES_ONLY if fault == _NO_MASK else _DROP) + hint)
            self.notes.append(f"left out {len(names)} {fault}: {first(names)}")
        self.duplicates(twice, "annotations that repeat others")
        kept = sum(len(image.annotations) for image in images.values())
        if crowds and crowds == kept:
            what = "annotations, and all are crowds (`iscrowd` 1), which are neither trained on nor counted"
            raise ValueError(f"'{self.file}' has {kept} {what}. Set `iscrowd` to 0 if each of them is one object.")
        if crowds:
            self.notes.append(f"{crowds} of {kept} annotations are crowds, which are not trained on")
        if unit == _CORNERS and not faults and len(boxes) >= 20:
            self.notes.append(f"all boxes would also fit as {unit}, while COCO has x, y, width, height")
        if small:
            self.notes.append(f"{small} of {kept} boxes are smaller than a pixel, which is too small to be trained on")


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(_is_finite(v) for v in box)


def _unit(boxes: Sequence[tuple[list[float], CocoImage]]) -> str:
    """Another unit than x, y, width, height in pixels that all boxes together fit better; '' if there is none."""
    if not boxes:
        return ""
    a, b, c, d = np.array([box for box, _ in boxes], dtype=float).T
    width, height = np.array([(image.width, image.height) for _, image in boxes], dtype=float).T
    if min(x.min() for x in (a, b, c, d)) >= 0 and max(x.max() for x in (a, b, c, d)) <= 1:
        return _RELATIVE
    if ((a < c) & (b < d) & (c <= width + TOLERANCE) & (d <= height + TOLERANCE)).all():
        return _CORNERS
    inside = (a - c / 2 >= -TOLERANCE) & (b - d / 2 >= -TOLERANCE)
    inside &= (a + c / 2 <= width + TOLERANCE) & (b + d / 2 <= height + TOLERANCE)
    return "centre x, centre y, width, height" if inside.all() else ""


def _fault(entry: dict[str, Any], image: CocoImage, masks: bool) -> str:
    """The fault of an annotation, in the plural; '' if it has none."""
    box, area = entry.get("bbox"), entry.get("area")
    if not _is_box(box):
        return "annotations whose `bbox` is not four numbers [x, y, width, height]"
    if str(entry.get("iscrowd", 0)).lower() not in _CROWD:
        return "annotations whose `iscrowd` is not 0 or 1"
    if area is not None and not (_is_finite(area) and area >= 0):
        return "annotations whose `area` is not a number"
    x, y, w, h = map(float, entry["bbox"])
    if w <= 0 or h <= 0:
        return "boxes without area"
    beyond = max(-x, -y, x + w - image.width, y + h - image.height)
    inside = min(x + w, image.width) > max(x, 0) and min(y + h, image.height) > max(y, 0)
    if beyond > TOLERANCE or not inside:
        return _OUTSIDE
    mask = entry.get("segmentation")
    if not mask:
        return _NO_MASK if masks else ""
    fault, around = _mask_box(mask, image)
    if fault:
        return fault if masks else ""
    left, top, right, bottom = around
    both = max(0.0, min(x + w, right) - max(x, left)) * max(0.0, min(y + h, bottom) - max(y, top))
    either = w * h + (right - left) * (bottom - top) - both
    apart = max(abs(x - left), abs(y - top), abs(x + w - right), abs(y + h - bottom))
    return _NO_FIT if both < FIT * either and apart > 2 else ""


def _mask_box(mask: Any, image: CocoImage) -> tuple[str, tuple[float, ...]]:
    """The fault of a mask, in the plural; x1, y1, x2, y2 of what it covers."""
    if isinstance(mask, dict):
        if mask.get("size") != [image.height, image.width]:
            return "masks (RLE) of another size than their images", ()
        runs = rle_runs(mask.get("counts"))
        if runs is None or sum(runs.tolist()) != image.height * image.width:
            return "masks (RLE) whose counts do not add up to the image", ()
        ends = np.cumsum(runs)
        starts, ends = (ends - runs)[1::2], ends[1::2] - 1
        starts, ends = starts[ends >= starts], ends[ends >= starts]
        if not len(starts):
            return "masks without a pixel", ()
        height, columns = image.height, (starts // image.height, ends // image.height)
        across = (columns[0] != columns[1]).any()
        top, bottom = (0, height) if across else ((starts % height).min(), (ends % height).max() + 1)
        return "", (float(columns[0].min()), float(top), float(columns[1].max() + 1), float(bottom))
    rings = isinstance(mask, list) and all(
        isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 and all(_is_finite(v) for v in ring)
        for ring in mask
    )
    if not rings:
        return "masks that are neither RLE nor polygons of at least three points", ()
    points = np.concatenate([np.array(ring, dtype=float).reshape(-1, 2) for ring in mask])
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return ("", (left, top, right, bottom)) if left < right and top < bottom else ("masks without area", ())


def rle_runs(counts: Any) -> np.ndarray | None:
    """The run lengths of an RLE, a list or COCO's compressed string; None if they are none."""
    if isinstance(counts, list):
        return np.array(counts, dtype=np.int64) if all(_is_integer(n) and n >= 0 for n in counts) else None
    if not isinstance(counts, str) or not counts or not counts.isascii():
        return None
    code = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((code & 32) == 0)  # five bits per character, the lowest first; 32: more follow
    lengths = np.diff(last, prepend=-1)
    if code.min() < 0 or code.max() > 63 or not len(last) or last[-1] != len(code) - 1 or lengths.max() > 8:
        return None
    place = np.arange(len(code)) - np.repeat(last - lengths + 1, lengths)
    runs = np.add.reduceat((code & 31) << (5 * place), last - lengths + 1)
    runs = np.where(code[last] & 16, runs - (np.int64(1) << (5 * lengths)), runs)  # negative
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])  # from the third on, differences
    return runs if (runs >= 0).all() else None


class DetectionImages(Dataset):
    """Images with their targets: `images[i]` is `(image, target)`, as torchvision's `tv_tensors` for a transform.

    The image is `[C, H, W]` as from `data.load_image`; the target has `boxes` `[N, 4]` (x1, y1, x2, y2 in pixels),
    `labels` int64 `[N]` from 1, and `masks` uint8 `[N, H, W]`. Crowds are left out; N may be 0.
    """

    def __init__(self, coco: Coco, *, masks: bool = True, in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        self.coco, self.masks, self.in_chans, self.pixels = coco, masks, in_chans, pixels
        self._label = {category: i for i, category in enumerate(coco.category_ids, 1)}
        self.files = [image.path for image in coco.images]

    def __len__(self) -> int:
        return len(self.coco.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return tv_tensors.Image(self.load(i)), self.target(self.coco.images[i])

    def load(self, i: int) -> Tensor:
        """The image alone; an `UnreadableError` if it cannot be decoded or has another size than annotated."""
        image = self.coco.images[i]
        with naming(f"The image {printable(image.name)} (id {image.id})"):
            loaded = load_image(image.path, self.in_chans, self.pixels)
            height, width = loaded.shape[-2:]
            if (height, width) != (image.height, image.width):
                raise ValueError(
                    f"it has {width} x {height} pixels, annotated as {image.width} x {image.height} in "
                    f"'{self.coco.file}'. Annotate the image as it is, or fix the file."
                )
        return loaded

    def check(self, tries: int = 32) -> None:
        """Loads some of the images; a `ValueError` names those that cannot be used."""
        tries, faults = min(tries, len(self)), []
        for k in range(tries):
            try:
                self.load(k * len(self) // tries)
            except UnreadableError as e:
                faults.append(str(e))
        if faults:
            reasons = "\n".join(faults[:3])
            raise ValueError(f"{len(faults)} of {tries} images tried (of {len(self)}) cannot be used:\n{reasons}")

    def target(self, image: CocoImage) -> dict[str, Tensor]:
        """The objects of an image, at its own size."""
        own = [a for a in image.annotations if not a.get("iscrowd")]
        size = (image.height, image.width)
        boxes: Any = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        box: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)  # pyright: ignore
        target = dict(boxes=box, labels=torch.tensor([self._label[a["category_id"]] for a in own], dtype=torch.int64))
        if self.masks:
            masks = [decode_mask(a["segmentation"], *size) for a in own]
            target["masks"] = tv_tensors.Mask(np.stack(masks) if masks else np.zeros((0, *size), np.uint8))
        return target


def decode_mask(mask: Any, height: int, width: int) -> np.ndarray:
    """Polygons or RLE as uint8 `[height, width]`, 1 inside."""
    codec = rle_codec()
    encoded = isinstance(mask, dict) and not isinstance(mask["counts"], list)
    parts = mask if encoded else codec.frPyObjects(mask, height, width)
    return np.ascontiguousarray(codec.decode(codec.merge(parts) if isinstance(parts, list) else parts))


def large_scale_jitter(
    size: int, scale: tuple[float, float] = (0.1, 2.0), *, hflip: float = 0.5, vflip: float = 0.0
) -> v2.Transform:
    """Crops of `size` pixels from images resized to `scale` times that, as in the paper (appendix A.3), and flips.

    Smaller images are padded with black; boxes without a pixel in the crop are removed.
    """
    flips = v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)
    crop = v2.ScaleJitter((size, size), scale), v2.RandomCrop((size, size), pad_if_needed=True)
    return v2.Compose([*flips, *crop, v2.SanitizeBoundingBoxes(min_size=1)])


def to_unit(image: Tensor) -> Tensor:
    """An image as float in 0..1; floats as stored."""
    return functional.to_dtype(image, torch.float32, scale=True)


def collate(samples: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images as float in 0..1 (floats as stored), and their targets, both as plain tensors."""
    images, targets = zip(*samples, strict=True)
    scaled = [to_unit(image.as_subclass(Tensor)) for image in images]
    return scaled, [{name: value.as_subclass(Tensor) for name, value in target.items()} for target in targets]
