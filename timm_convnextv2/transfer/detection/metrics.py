"""A detector's results in COCO's format, their average precision, and figures of them beside the truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...data.display import display_of
from ...report.images import save_rows
from ...runs.world import World
from ..loop import shared_loader
from .coco import Coco, CocoImage, DetectionImages, collate, rle_codec

# COCO's twelve numbers, in its order
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
METRICS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
MAX_OBJECTS = 100  # per image: what COCO evaluates and torchvision finds
SURE = 0.5  # lowest score that is drawn

_COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075"]

Result = dict[str, Any]


@torch.no_grad()
def find_objects(
    detector: FasterRCNN, images: Sequence[Tensor], ids: Sequence[int], category_ids: Sequence[int],
    amp_dtype: torch.dtype | None = None,
) -> list[Result]:  # fmt: skip
    """What a detector in eval mode finds in images, float `[C, H, W]` in 0..1, with their ids; in COCO's format."""
    device = next(detector.parameters()).device
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        found = detector([image.to(device) for image in images])
    return [result for i, objects in zip(ids, found, strict=True) for result in _results(objects, i, category_ids)]


def _results(found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    boxes = found["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = found["labels"].tolist(), found["scores"].float().tolist()
    results: list[Result] = [
        dict(image_id=image_id, category_id=category_ids[label - 1], bbox=[round(v, 2) for v in box], score=score)
        for box, label, score in zip(boxes.tolist(), labels, scores, strict=True)
    ]
    if "masks" in found and results:
        masks = (found["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        for result, mask in zip(results, masks, strict=True):
            code = rle_codec().encode(np.asfortranarray(mask))
            counts = code["counts"]
            size = [int(n) for n in code["size"]]
            result["segmentation"] = dict(size=size, counts=counts.decode() if isinstance(counts, bytes) else counts)
    return results


def average_precision(
    coco: Coco, results: list[Result], *, masks: bool, max_objects: int = MAX_OBJECTS
) -> dict[str, Any]:
    """COCO's twelve numbers, for boxes as `box_*` and for masks as `mask_*`, in 0..1; -1 if no object counts.

    `class_ap` is the list of box AP by category, `class_precision` that of the precision at IoU 0.5 at 101 recalls from
    0 to 1; None for categories without objects.

    Computed by faster-coco-eval from results on all images of `coco`, of which the best `max_objects` per image count.
    With another number than COCO's 100, `ar100` is the average recall with that number.
    """
    rle_codec()  # for its error message
    from faster_coco_eval import COCO, COCOeval_faster

    kinds: Any = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
    truth = COCO(coco.content())
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        # loadRes derives areas and boxes from masks, so that results for boxes must not have any
        own = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
        evaluator: Any = COCOeval_faster(truth, truth.loadRes(own), kind)
        evaluator.params.maxDets = [1, 10, max_objects]
        evaluator.run()
        found |= {f"{name}_{metric}": float(v) for metric, v in zip(METRICS, evaluator.stats[:12], strict=True)}
        if name == "box":  # [threshold, recall, category, area, limit], -1 where nothing counts
            precision = evaluator.eval["precision"][:, :, :, 0, -1]
            parts = [part if (part > -1).any() else None for part in precision.transpose(2, 0, 1)]
            found["class_ap"] = [None if part is None else float(part[part > -1].mean()) for part in parts]
            found["class_precision"] = [None if part is None else part[0].round(4).tolist() for part in parts]
    return found


def evaluate_detector(
    detector: Any, data: DetectionImages, *, batch_size: int = 1, workers: int = 0,
    amp_dtype: torch.dtype | None = None, world: World | None = None, max_objects: int = MAX_OBJECTS
) -> tuple[dict[str, Any], list[Result]]:  # fmt: skip
    """Average precision on images, and the results, the same on all processes, which share the images."""
    detector.eval()
    coco, results = data.coco, []
    bare = coco._replace(images=[image._replace(annotations=[]) for image in coco.images])  # decodes no masks
    images = DetectionImages(bare, masks=False, in_chans=data.in_chans, pixels=data.pixels)
    part, loader = shared_loader(images, world, workers, batch_size=batch_size, collate_fn=collate)
    ids = iter([coco.images[i].id for i in part])
    for batch, _ in loader:
        results += find_objects(detector, batch, [next(ids) for _ in batch], coco.category_ids, amp_dtype)
    if world is not None:
        results = world.gather(results)
    masks = not detector.made_of["boxes_only"]
    return average_precision(coco, results, masks=masks, max_objects=max_objects), results


def table(metrics: dict[str, float]) -> str:
    """COCO's numbers, boxes and masks in columns."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    rows = [f"{'':10}" + "".join(f"{kind:>8}" for kind in kinds)]
    for name in METRICS:
        values = (metrics[f"{kind}_{name}"] for kind in kinds)
        rows.append(f"{name:10}" + "".join(f"{v:8.3f}" if v >= 0 else f"{'-':>8}" for v in values))
    return "\n".join([*rows, "from 0 to 1, computed by faster-coco-eval; - if no object has that size"])


def save_found(
    path: str | Path, data: DetectionImages, results: Sequence[Result], indices: Sequence[int], min_score: float = SURE
) -> None:
    """Draws the truth (left) and the objects found (right) of some images as one PNG."""
    rows = []
    for i in indices:
        (loaded,), _ = collate([data[i]])
        image = data.coco.images[i]
        sure = [r for r in results if r["image_id"] == image.id and r["score"] >= min_score]
        found = draw_objects(data, image._replace(annotations=sure), loaded)
        text = f"{'found' if sure else 'nothing found'}, score >= {min_score:g}"
        rows.append([(draw_objects(data, image, loaded), image.name), (found, text)])
    save_rows(path, rows, (8, 4 * len(rows)))


def draw_objects(data: DetectionImages, image: CocoImage, loaded: Tensor) -> np.ndarray:
    """An image, float `[C, H, W]`, with its annotations or results, uint8 `[H, W, 3]`.

    Small images are enlarged to keep the names legible.
    """
    factor, target = max(1, 400 // max(loaded.shape[-2:])), data.target(image)
    shown = (display_of([loaded]).rgb(loaded) * 255).round().to(torch.uint8).permute(2, 0, 1)
    shown = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    if len(target["labels"]):
        own = [a for a in image.annotations if not a.get("iscrowd")]
        names = [data.coco.classes[label - 1] for label in target["labels"].tolist()]
        names = [f"{name} {a['score']:.2f}" if "score" in a else name for name, a in zip(names, own, strict=True)]
        colours = [_COLOURS[(label - 1) % len(_COLOURS)] for label in target["labels"].tolist()]
        if "masks" in target:
            masks = target["masks"].bool().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
            shown = draw_segmentation_masks(shown, masks, alpha=0.4, colors=colours)
        shown = draw_bounding_boxes(shown, target["boxes"] * factor, names, colors=colours, width=2)
    return shown.permute(1, 2, 0).numpy()
