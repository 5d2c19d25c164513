"""Detectors on any backbone, their export, and their average precision against pycocotools."""

import contextlib
import copy
import io

import numpy as np
import pytest
import torch
from helpers import assert_same
from PIL import Image
from tiny import tiny_detector
from torchvision.models.detection import FasterRCNN, MaskRCNN

from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.data.demo.folder import uncompressed_rle
from timm_convnextv2.transfer import build_detector, create_backbone, export_detector, open_detector, parameter_groups
from timm_convnextv2.transfer.detection.coco import (
    Coco,
    CocoImage,
    DetectionImages,
    collate,
    large_scale_jitter,
    open_coco,
)
from timm_convnextv2.transfer.detection.detector import open_with_classes
from timm_convnextv2.transfer.detection.metrics import METRICS, average_precision, evaluate_detector, save_found
from timm_convnextv2.transfer.loop import Samples

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "d", size=64, train=8, validation=8, coco=True)


@pytest.fixture
def coco(data):
    return open_coco(data / "train.json", data / "train/images")


def rectangle(box, height, width):
    x, y, w, h = (int(v) for v in box)
    flat = np.zeros((height, width), bool)
    flat[y : y + h, x : x + w] = True
    return uncompressed_rle(flat)


def planted(tmp_path):
    """300 objects of three sizes and some crowds in 40 images, and 400 detections near them or nowhere."""
    draw = np.random.default_rng(0)
    images = [dict(id=3 * i + 2, file_name=f"{i}", height=160, width=200) for i in range(40)]
    annotations, results = [], []
    for i in range(300):
        side = float(draw.choice([12, 50, 110]))
        w, h = side * draw.uniform(0.7, 1.2), side * draw.uniform(0.7, 1.2)
        box = [float(int(v)) for v in (draw.uniform(0, 199 - w), draw.uniform(0, 159 - h), w, h)]
        image, category = int(draw.choice([e["id"] for e in images])), int(draw.choice([2, 5, 11]))
        annotations.append(
            dict(id=i + 1, image_id=image, category_id=category, bbox=box, area=box[2] * box[3],
                 iscrowd=int(draw.random() < 0.1), segmentation=rectangle(box, 160, 200))
        )  # fmt: skip
        for _ in range(int(draw.integers(0, 3))):
            x, y = max(0, int(box[0] + draw.normal(0, 3))), max(0, int(box[1] + draw.normal(0, 3)))
            near = [float(x), float(y), float(max(1, int(box[2] * draw.uniform(0.8, 1.1)))), box[3]]
            results.append(
                dict(image_id=image, category_id=category, bbox=near, score=float(draw.random()),
                     segmentation=rectangle(near, 160, 200))
            )  # fmt: skip
    return images, annotations, results


def test_average_precision_is_that_of_pycocotools(tmp_path):
    tools = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    from pycocotools import mask
    from pycocotools.cocoeval import COCOeval

    images, annotations, results = planted(tmp_path)
    results = [
        {**r, "segmentation": {**(c := mask.frPyObjects(r["segmentation"], 160, 200)), "counts": c["counts"].decode()}}
        for r in results
    ]
    categories = [dict(id=i, name=str(i)) for i in (2, 5, 11)]
    coco = Coco(
        tmp_path, [
            CocoImage(e["id"], "", e["file_name"], 160, 200, [a for a in annotations if a["image_id"] == e["id"]])
            for e in images
        ], ["2", "5", "11"], [2, 5, 11],
    )  # fmt: skip
    ours = average_precision(coco, copy.deepcopy(results), masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tools.COCO()
        truth.dataset = dict(images=images, annotations=annotations, categories=categories)
        truth.createIndex()
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            found = truth.loadRes(
                [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
            )
            evaluator = COCOeval(truth, found, kind)
            evaluator.evaluate(), evaluator.accumulate(), evaluator.summarize()
            theirs = dict(zip((f"{name}_{metric}" for metric in METRICS), evaluator.stats, strict=True))
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-9)
            assert 0.05 < theirs[f"{name}_ap"] < 0.9 and len(set(theirs.values())) > 9
            if name == "box":  # by class
                precision = evaluator.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]
                assert ours["class_ap"] == pytest.approx(precision.mean((0, 1)), abs=1e-9)
                assert np.array(ours["class_precision"]) == pytest.approx(precision[0].T, abs=1e-4)
    assert len(ours) == 26


def test_nothing_found_is_zero(coco):
    found = average_precision(coco, [], masks=True)
    assert found["box_ap"] == found["mask_ar100"] == 0 and found["box_ap_large"] == -1


@pytest.mark.parametrize("boxes_only", [False, True])
def test_a_detector_trains_and_its_export_is_the_same(coco, boxes_only, tmp_path):
    detector = tiny_detector(boxes_only=boxes_only, box_score_thresh=0.0)
    assert isinstance(detector, MaskRCNN) is not boxes_only and isinstance(detector, FasterRCNN)
    samples = Samples(DetectionImages(coco, masks=not boxes_only), large_scale_jitter(64))
    losses = detector(*collate([samples[0, i] for i in range(3)]))
    assert len(losses) == 5 - boxes_only
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if "head" not in name:  # of which some see no object
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    metrics = {"box_ap": 0.25}
    export_detector(detector, tmp_path / "model", classes=coco.classes, metrics=metrics)
    assert "| box_ap | 0.2500 |" in (tmp_path / "model/README.md").read_text()
    again, classes = open_with_classes(tmp_path / "model")
    assert classes == coco.classes
    assert_same(dict(again.state_dict()), dict(detector.state_dict()))
    image = collate([samples[0, 0]])[0][0]
    with torch.no_grad():
        assert_same(again([image]), detector.eval()([image]))


def test_what_is_found_is_evaluated_and_drawn(coco, tmp_path):
    detector = tiny_detector(box_score_thresh=0.0)
    metrics, results = evaluate_detector(detector, DetectionImages(coco), batch_size=3)
    assert len(metrics) == 26 and len(results) == 8 * 2
    for result in results:
        assert result["category_id"] in range(1, 9) and result["segmentation"]["size"] == [64, 64]
    save_found(tmp_path / "a/b.png", DetectionImages(coco), results, [1, 3], min_score=0.0)
    save_found(tmp_path / "none.png", DetectionImages(coco), [], [1, 3])
    first, none = (
        np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "a/b.png", tmp_path / "none.png")
    )
    half = first.shape[1] // 2
    assert np.array_equal(first[30:, :half], none[30:, :half]) and not np.array_equal(first[:, half:], none[:, half:])


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_stock_models_are_backbones_too(name):
    more = dict(img_size=64, window_size=2) if name.startswith("swin") else {}
    backbone = create_backbone(name, pretrained=False, **more)
    detector = build_detector(backbone, 2, img_size=64, out_channels=8).eval()
    assert backbone.strides == [4, 8, 16, 32]
    with torch.no_grad():
        maps = detector.backbone(torch.rand(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(8, n, n) for n in (16, 8, 4, 2, 1)]
    groups = parameter_groups(detector, backbone, weight_decay=0.1, layer_decay=0.9)
    assert len({group["lr_scale"] for group in groups}) > 3


def test_channels_and_mean_of_another_number_of_channels():
    detector = tiny_detector(in_chans=5)
    assert len(detector.transform.image_mean) == 5
    with torch.no_grad():
        assert len(detector.eval()([torch.rand(5, 40, 64)])) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(patch_size=3), r"strides \[3, 6, 12, 24\].*powers of two only"),
        (dict(num_classes=0), "num_classes is 0"),
        (dict(box_score_tresh=0.1), "no option box_score_tresh. Did you mean 'box_score_thresh'"),
    ],
)
def test_mistakes(settings, message):
    classes = settings.pop("num_classes", 2)
    patch = {"patch_size": settings.pop("patch_size")} if "patch_size" in settings else {}
    backbone = create_backbone("convnextv2_atto", pretrained=False, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), **patch)
    with pytest.raises(ValueError, match=message):
        build_detector(backbone, classes, **settings)


def test_a_folder_that_is_no_detector(tmp_path, small):
    with pytest.raises(ValueError, match="is not a detector: .*it has no config.json"):
        open_detector(tmp_path)
    with pytest.raises(ValueError, match="config.json has the task None, expected detection"):
        open_detector(small.removeprefix("local-dir:"))


@pytest.mark.slow
def test_a_detector_memorises_eight_images(coco):
    """Box AP above 0.9 on what it was trained on, in about a hundred steps."""
    fast = dict(rpn_post_nms_top_n_train=60, rpn_post_nms_top_n_test=60, box_batch_size_per_image=32)
    detector = tiny_detector(boxes_only=True, out_channels=32, **fast)
    data = DetectionImages(coco, masks=False)
    batch = collate([data[i] for i in range(8)])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    reached = 0.0
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (0.1 if step > 300 else 1)
        optimizer.zero_grad()
        sum(detector.train()(*batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        if step % 25 == 24:
            reached = evaluate_detector(detector, data, batch_size=8)[0]["box_ap"]
            if reached > 0.9:
                break
    assert reached > 0.9
