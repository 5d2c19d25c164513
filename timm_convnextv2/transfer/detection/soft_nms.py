"""Soft-NMS (Bodla et al., 2017), which the paper evaluates with: overlapping boxes are down-weighted, not removed."""

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou

SIGMA = 0.5  # width of the Gaussian, the authors' value
MIN_SCORE = 0.001  # boxes below it are left out


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, method: str = "linear", *, limit: int = 100, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Indices `[K]` of boxes `[N, 4]` (x1, y1, x2, y2) and their decayed scores in descending order, at most `limit`.

    Takes the best box, lowers the scores of the others of its class by their IoU with it, and repeats. 'linear'
    multiplies by 1 - IoU if the IoU is above the threshold, 'gaussian' by exp(-IoU^2 / 0.5).
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"The method of soft-NMS is {method!r}, expected linear or gaussian.")
    scores = scores.clone()
    kept: list[int] = []
    decayed: list[float] = []
    while len(kept) < min(limit, len(boxes)):
        best = int(scores.argmax())
        score = float(scores[best])
        if score < MIN_SCORE:
            break
        kept.append(best)
        decayed.append(score)
        iou = box_iou(boxes[best : best + 1], boxes)[0] * (labels == labels[best])
        linear = torch.where(iou > threshold, 1 - iou, 1.0)
        scores *= linear if method == "linear" else torch.exp(-(iou**2) / SIGMA)
        scores[best] = -math.inf
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device), scores.new_tensor(decayed)


def use_soft_nms(detector: FasterRCNN, method: str = "linear") -> FasterRCNN:
    """Replaces the NMS of a detector's final boxes by soft-NMS at `box_nms_thresh`, in place; proposals keep NMS."""
    heads: Any = detector.roi_heads
    limit, threshold, all_boxes = heads.detections_per_img, heads.nms_thresh, heads.postprocess_detections
    heads.detections_per_img, heads.nms_thresh = sys.maxsize, 1.0  # torchvision suppresses and drops nothing itself

    def postprocess(*args: Any) -> tuple[list[Tensor], ...]:
        found: tuple[list[Tensor], ...] = ([], [], [])
        for boxes, scores, labels in zip(*all_boxes(*args), strict=True):
            kept, decayed = soft_nms(boxes.float(), scores.float(), labels, method, limit=limit, threshold=threshold)
            for part, value in zip(found, (boxes[kept], decayed, labels[kept]), strict=True):
                part.append(value)
        return found

    heads.postprocess_detections = postprocess
    return detector
