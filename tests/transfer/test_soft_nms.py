"""Soft-NMS against a plain definition, and in a detector."""

import math

import pytest
import torch
from tiny import tiny_detector
from torchvision.ops import batched_nms, box_iou

from timm_convnextv2.transfer.detection.soft_nms import MIN_SCORE, soft_nms, use_soft_nms


def make_boxes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=generator) * 20
    sizes = 5 + torch.rand(n, 2, generator=generator) * 20
    scores, labels = torch.rand(n, generator=generator), torch.randint(1, 3, (n,), generator=generator)
    return torch.cat([corners, corners + sizes], 1), scores, labels


def plainly(boxes, scores, labels, method, threshold):
    """Class by class, box by box."""
    found = []
    for label in labels.unique().tolist():
        left = [(float(scores[i]), i) for i in range(len(boxes)) if labels[i] == label]
        while left:
            score, best = max(left)
            if score < MIN_SCORE:
                break
            found.append((score, best))
            rest = []
            for value, i in left:
                if i != best:
                    iou = float(box_iou(boxes[best : best + 1], boxes[i : i + 1]))
                    linear = 1 - iou if iou > threshold else 1
                    rest.append((value * (linear if method == "linear" else math.exp(-(iou**2) / 0.5)), i))
            left = rest
    return sorted(found, reverse=True)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_against_the_definition(method, n):
    boxes, scores, labels = make_boxes(n)
    before = scores.clone()
    kept, decayed = soft_nms(boxes, scores, labels, method, threshold=0.3)
    expected = plainly(boxes, scores, labels, method, 0.3)
    assert kept.tolist() == [i for _, i in expected] and torch.equal(scores, before)
    torch.testing.assert_close(decayed, torch.tensor([score for score, _ in expected]))
    short = soft_nms(boxes, scores, labels, method, threshold=0.3, limit=7)
    assert torch.equal(short[0], kept[:7]) and torch.equal(short[1], decayed[:7])


def test_a_detector_takes_it():
    """What NMS keeps is kept; other boxes come with lower scores; the limit on their number holds."""
    options = dict(boxes_only=True, box_score_thresh=0.0, rpn_post_nms_top_n_test=30)
    detector = tiny_detector(2, **options | dict(box_detections_per_img=1000)).eval()
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        hard = detector(images)[0]
        soft = use_soft_nms(detector, "linear")(images)[0]
    assert len(soft["boxes"]) > len(hard["boxes"]) > 0
    assert (soft["scores"].diff() <= 0).all()
    keep = batched_nms(soft["boxes"], soft["scores"], soft["labels"], 0.5)
    assert len(keep) <= len(soft["boxes"])
    torch.testing.assert_close(soft["boxes"][0], hard["boxes"][0])
    limited = tiny_detector(2, **options | dict(box_detections_per_img=3)).eval()
    with torch.no_grad():
        assert len(use_soft_nms(limited, "gaussian")(images)[0]["boxes"]) == 3
    with pytest.raises(ValueError, match="soft-NMS is 'hard', expected linear or gaussian"):
        soft_nms(*make_boxes(2), "hard")
