"""Annotations in COCO's format: reading, checks before training starts, and images with targets for a detector."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data import Pixels, check_readable, load_image
from ...data.formats.errors import naming
from ...data.formats.files import printable
from ...data.formats.pixels import PLAIN
from ...data.sources.files import ImageFiles
from ..backbone import as_float
from ..figures import first

TOLERANCE = 1.0  # pixels that a box may exceed its image by, because tools round; the excess is cut off
CATEGORIES_DIFFER = "All annotations need the categories that the model was trained on."

_NO_MASK = "annotations without a `segmentation`"


class CocoImage(NamedTuple):
    """An image and its annotations."""

    id: int
    path: str
    name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]


class Coco(NamedTuple):
    """Annotations that passed every check."""

    file: Path
    images: list[CocoImage]
    classes: list[str]  # in the order of `category_ids`
    category_ids: list[int]  # sorted; label i of a detector is number i - 1 here, as 0 is the background
    left_out: int = 0  # wrong annotations that were dropped

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return [annotation for image in self.images for annotation in image.annotations]

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
    file: str | Path, folder: str | Path, *, masks: bool = True, drop_wrong: bool = False, in_chans: int | None = None,
    pixels: Pixels = PLAIN
) -> Coco:  # fmt: skip
    """Reads and checks annotations of objects; images are relative to `folder`.

    Ids may have gaps, annotations may be crowds (`iscrowd`), and images may have no annotations. With `masks`, every
    annotation needs a `segmentation`, polygons or RLE. Wrong annotations (no area, outside of the image, broken mask)
    are a `ValueError` with the count and the first names of each kind; `drop_wrong` drops and counts them instead.
    `in_chans` decodes some images to this number of channels and compares their sizes.
    """
    file, folder = Path(file), Path(folder)
    content = _read(file)
    if not folder.is_dir():
        raise ValueError(f"The folder of the images, '{folder}', does not exist or is a file.")
    _check_entries(content["categories"], file, "categories", "id name", id=_is_integer, name=_is_text)
    categories = {e["id"]: e["name"] for e in content["categories"]}
    sides = dict.fromkeys(("height", "width"), lambda v: _is_integer(v) and v > 0)
    _check_entries(content["images"], file, "images", "id", id=_is_integer, file_name=_is_text, **sides)
    images = {
        e["id"]: CocoImage(e["id"], str(folder / e["file_name"]), e["file_name"], e["height"], e["width"], [])
        for e in content["images"]
    }
    missing = [image.name for image in images.values() if not Path(image.path).is_file()]
    _refuse(missing, file, f"images (of {len(images)}) that are missing in '{folder}'")
    left_out = _attach(content["annotations"], images, categories, file, masks, drop_wrong)
    ids = sorted(categories)
    coco = Coco(file, list(images.values()), [categories[i] for i in ids], ids, left_out)
    if in_chans is not None:
        check_sizes(coco, in_chans, pixels)
    return coco


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"The annotations '{file}' do not exist.") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"The annotations '{file}' cannot be read as JSON: {e}") from e
    lists = ("images", "annotations", "categories")
    for name in lists:
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            what = f"has the keys {sorted(content)}" if isinstance(content, dict) else f"is a {type(content).__name__}"
            raise ValueError(
                f"'{file}' {what}; expected COCO's format, an object with lists of objects: {', '.join(lists)} "
                f"('{name}' is missing or no such list)."
            )
        if not part and name != "annotations":
            raise ValueError(f"'{file}' has no {name}.")
    return content


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_entries(entries: list[dict[str, Any]], file: Path, what: str, unique: str, **valid: Any) -> None:
    """Refuses entries without a valid value of each key, and equal values of the keys in `unique`."""
    for key, is_valid in valid.items():
        _refuse([e for e in entries if not is_valid(e.get(key))], file, f"{what} without a valid `{key}`")
    for key in unique.split():
        again = [v for v, n in Counter(e[key] for e in entries).items() if n > 1]
        _refuse(again, file, f"{what} of equal `{key}`")


def _attach(
    entries: list[dict[str, Any]], images: dict[int, CocoImage], categories: dict[int, str], file: Path, masks: bool,
    drop_wrong: bool
) -> int:  # fmt: skip
    """Adds the annotations to their images; returns how many were left out."""
    for key, known, what in (("image_id", images, "images"), ("category_id", categories, "categories")):
        lost = [f"{key} {e.get(key)}" for e in entries if not _is_integer(e.get(key)) or e[key] not in known]
        _refuse(lost, file, f"annotations of {what} that it does not list")
    faults: dict[str, list[str]] = {}
    for number, entry in enumerate(entries, 1):
        image = images[entry["image_id"]]
        if fault := _fault(entry, image, masks):
            faults.setdefault(fault, []).append(f"annotation {entry.get('id', number)} of {image.name}")
            continue
        x, y, w, h = (float(v) for v in entry["bbox"])
        area = entry.get("area")
        fields = dict(iscrowd=int(bool(entry.get("iscrowd", 0))), area=w * h if area is None else area)
        image.annotations.append({**entry, "id": number, **fields, "bbox": [x, y, w, h]})
    for fault, names in faults.items() if not drop_wrong else ():
        hint = "train without masks: --boxes-only" if fault == _NO_MASK else "leave them out: --drop-wrong"
        _refuse(names, file, fault, f"Fix the file, or {hint}.")
    return sum(map(len, faults.values()))


def _fault(entry: dict[str, Any], image: CocoImage, masks: bool) -> str:
    """The fault of an annotation, in the plural; '' if it has none."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(v) for v in box):
        return "annotations whose `bbox` is not four numbers [x, y, width, height]"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "boxes without area"
    beyond = max(-x, -y, x + w - image.width, y + h - image.height)
    inside = min(x + w, image.width) > max(x, 0) and min(y + h, image.height) > max(y, 0)
    if beyond > TOLERANCE or not inside:
        return "boxes that reach outside of their image"
    return _mask_fault(entry.get("segmentation"), image) if masks else ""


def _mask_fault(mask: Any, image: CocoImage) -> str:
    if not mask:
        return _NO_MASK
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if size != [image.height, image.width]:
            return "masks (RLE) of another size than their images"
        runs = counts if isinstance(counts, list) and all(_is_integer(n) and n >= 0 for n in counts) else []
        if not isinstance(counts, str) and sum(runs) != image.height * image.width:
            return "masks (RLE) whose counts do not add up to the image"
        return ""
    rings = isinstance(mask, list) and all(
        isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 and all(_is_finite(v) for v in ring)
        for ring in mask
    )
    return "" if rings else "masks that are neither RLE nor polygons of at least three points"


def _refuse(wrong: Sequence[Any], file: Path, what: str, remedy: str = "Fix the file.") -> None:
    """Raises one message for all faults of a kind, if there are any."""
    if wrong:
        raise ValueError(f"'{file}' has {len(wrong)} {what}: {first(wrong)}. {remedy}")


def check_sizes(coco: Coco, in_chans: int, pixels: Pixels = PLAIN) -> None:
    """Decodes some of the images and compares their sizes with the annotations."""
    source = ImageFiles([image.path for image in coco.images], in_chans, pixels)
    sizes: list[tuple[int, int]] = []
    tried = min(32, len(source))
    if bad := check_readable(source, tried, lambda x: sizes.append((x.shape[-2], x.shape[-1]))):
        reasons = "\n".join(why for _, why in bad[:3])
        found = f"{len(bad)} of {tried} images tried (of {len(source)})"
        raise ValueError(f"{found} cannot be decoded; fix or remove them:\n{reasons}")
    images = [coco.images[i * len(source) // tried] for i in range(tried)]
    wrong = [
        f"{image.name} has {w} x {h} pixels, annotated as {image.width} x {image.height}"
        for image, (h, w) in zip(images, sizes, strict=True)
        if (h, w) != (image.height, image.width)
    ]
    _refuse(wrong, coco.file, f"images of another size than the files (of {tried} tried)")


class DetectionImages(Dataset):
    """Images with their targets: `images[i]` is `(image, target)`, as torchvision's `tv_tensors` for a transform.

    The image is `[C, H, W]` as from `data.load_image`; the target has `boxes` `[N, 4]` (x1, y1, x2, y2 in pixels),
    `labels` int64 `[N]` from 1, and `masks` uint8 `[N, H, W]`. Crowds are left out; N may be 0.
    """

    def __init__(self, coco: Coco, *, masks: bool = True, in_chans: int = 3, pixels: Pixels = PLAIN) -> None:
        self.coco, self.masks, self.in_chans, self.pixels = coco, masks, in_chans, pixels
        self._label = {category: i for i, category in enumerate(coco.category_ids, 1)}

    def __len__(self) -> int:
        return len(self.coco.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.coco.images[i]
        with naming(f"The image {printable(image.name)} (id {image.id})"):
            loaded = load_image(image.path, self.in_chans, self.pixels)
            height, width = loaded.shape[-2:]
            if image.height and (height, width) != (image.height, image.width):
                raise ValueError(
                    f"it has {width} x {height} pixels, annotated as {image.width} x {image.height} in "
                    f"'{self.coco.file}'. Annotate the image as it is, or fix the file."
                )
        return tv_tensors.Image(loaded), self.target(image)

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


def collate(samples: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images as float in 0..1 (floats as stored), and their targets, both as plain tensors."""
    images, targets = zip(*samples, strict=True)
    scaled = [as_float(image.as_subclass(Tensor)) for image in images]
    return scaled, [{name: value.as_subclass(Tensor) for name, value in target.items()} for target in targets]
