"""A detector's results in COCO's format, their average precision, and figures of them beside the truth."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...report.images import save_rows
from ...runs.world import World
from ..figures import as_rgb
from .coco import Coco, CocoImage, DetectionSamples, collate, rle_codec
from .detector import backbone_of, made_of_detector

# COCO's twelve numbers, in its order
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
METRICS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
SURE = 0.5  # lowest score that is drawn

_COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075"]

Result = dict[str, Any]


@torch.no_grad()
def find_objects(
    detector: FasterRCNN, coco: Coco, *, batch_size: int = 1, workers: int = 0, amp_dtype: torch.dtype | None = None,
    world: World | None = None
) -> Iterator[tuple[CocoImage, list[Result]]]:  # fmt: skip
    """Runs a detector on images and yields each image, with its decoded size, and its COCO results.

    It ignores annotations and sets the detector to eval mode. Each process of `world` finds its part of the images.
    """
    detector.eval()
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    part = coco._replace(images=[image._replace(annotations=[]) for image in coco.images[rank::size]])
    if not part.images:
        return
    backbone, device = backbone_of(detector), next(detector.parameters()).device
    samples = DetectionSamples(part, masks=False, in_chans=backbone.in_chans, pixels=backbone.pixels)
    keys: Any = [(0, i) for i in range(len(samples))]
    how: Any = dict(num_workers=workers, collate_fn=collate, generator=torch.Generator())
    loader = DataLoader(samples, batch_size, sampler=keys, **how)
    images = iter(part.images)
    for batch, _ in loader:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            found = detector([image.to(device) for image in batch])
        for loaded, image, objects in zip(batch, images, found, strict=False):
            image = image._replace(height=loaded.shape[-2], width=loaded.shape[-1])
            yield image, _results(objects, image.id, coco.category_ids)


def _results(found: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[Result]:
    boxes = found["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = found["labels"].tolist(), found["scores"].float().tolist()
    results: list[Result] = [
        dict(image_id=image_id, category_id=category_ids[label - 1], bbox=[round(v, 2) for v in box], score=score)
        for box, label, score in zip(boxes.tolist(), labels, scores, strict=True)
    ]
    if "masks" in found and results:
        codec = rle_codec()
        masks = (found["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        for result, mask in zip(results, masks, strict=True):
            code = codec.encode(np.asfortranarray(mask))
            counts = code["counts"]
            size = [int(n) for n in code["size"]]
            result["segmentation"] = dict(size=size, counts=counts.decode() if isinstance(counts, bytes) else counts)
    return results


def average_precision(coco: Coco, results: list[Result], *, masks: bool) -> dict[str, float]:
    """COCO's twelve numbers, for boxes as `box_*` and for masks as `mask_*`, in 0..1; -1 if no object counts.

    Computed by faster-coco-eval from the results of `find_objects` on all images of `coco`.
    """
    rle_codec()  # for its error message
    from faster_coco_eval import COCO, COCOeval_faster

    kinds: Any = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}

    truth = COCO(coco.content())
    found: dict[str, float] = {}
    for name, kind in kinds.items():
        # loadRes derives areas and boxes from masks, so that results for boxes must not have any
        own = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
        evaluator: Any = COCOeval_faster(truth, truth.loadRes(own), kind)
        evaluator.run()
        found |= {f"{name}_{metric}": float(v) for metric, v in zip(METRICS, evaluator.stats[:12], strict=True)}
    return found


def evaluate_detector(
    detector: FasterRCNN, coco: Coco, *, world: World | None = None, **how: Any
) -> tuple[dict[str, float], list[Result]]:
    """Average precision on images, and the results, the same on all processes; `how` goes to `find_objects`."""
    results = [result for _, found in find_objects(detector, coco, world=world, **how) for result in found]
    if world is not None:
        results = world.gather(results)
    return average_precision(coco, results, masks=not made_of_detector(detector)["boxes_only"]), results


def table(metrics: dict[str, float]) -> str:
    """COCO's numbers in percent, boxes and masks in columns."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    rows = [f"{'':10}" + "".join(f"{kind:>8}" for kind in kinds)]
    for name in METRICS:
        values = (metrics[f"{kind}_{name}"] for kind in kinds)
        rows.append(f"{name:10}" + "".join(f"{100 * v:8.1f}" if v >= 0 else f"{'-':>8}" for v in values))
    return "\n".join([*rows, "in %, computed by faster-coco-eval; - if no object has that size"])


def save_found(
    path: str | Path, samples: DetectionSamples, results: Sequence[Result], image_ids: Sequence[int],
    min_score: float = SURE,
) -> None:  # fmt: skip
    """Draws the truth (left) and the objects found (right) of some images as one PNG; `samples` have no transform."""
    coco, rows = samples.coco, []
    index = {image.id: i for i, image in enumerate(coco.images)}
    for image_id in image_ids:
        image, truth = samples[0, index[image_id]]
        sure = [r for r in results if r["image_id"] == image_id and r["score"] >= min_score]
        shown = (as_rgb(image) * 255).round().to(torch.uint8).permute(2, 0, 1)
        found = _target(sure, coco, samples.masks)
        pairs = ((truth, coco.images[index[image_id]].name), (found, f"found, score >= {min_score:g}"))
        rows.append([(_drawn(shown, target, coco.classes).permute(1, 2, 0).numpy(), text) for target, text in pairs])
    save_rows(path, rows, (8, 4 * len(rows)))


def _target(results: Sequence[Result], coco: Coco, masks: bool) -> dict[str, Any]:
    boxes = torch.tensor([r["bbox"] for r in results]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label = {category: i for i, category in enumerate(coco.category_ids, 1)}
    labels = torch.tensor([label[r["category_id"]] for r in results])
    target: dict[str, Any] = dict(boxes=boxes, labels=labels, scores=[r["score"] for r in results])
    if masks and results:
        target["masks"] = torch.from_numpy(np.stack([rle_codec().decode(r["segmentation"]) for r in results]))
    return target


def _drawn(image: Tensor, target: dict[str, Any], classes: list[str]) -> Tensor:
    """The image with boxes, names and masks; small images are enlarged to keep the names legible."""
    factor = max(1, 400 // max(image.shape[-2:]))
    image = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    labels = target["labels"].tolist()
    if not labels:
        return image
    colours = [_COLOURS[(label - 1) % len(_COLOURS)] for label in labels]
    names = [classes[label - 1] for label in labels]
    if "scores" in target:
        names = [f"{name} {score:.2f}" for name, score in zip(names, target["scores"], strict=True)]
    if "masks" in target:
        masks = target["masks"].bool().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        image = draw_segmentation_masks(image, masks, alpha=0.4, colors=colours)
    return draw_bounding_boxes(image, target["boxes"] * factor, names, colors=colours, width=2)
