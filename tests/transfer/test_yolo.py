"""Labels in YOLO's format, read by detect and by segment; a detector that finds more than 100 objects."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import train

from timm_convnextv2.transfer.detection.coco import Coco, CocoImage, DetectionImages, open_coco
from timm_convnextv2.transfer.detection.metrics import average_precision
from timm_convnextv2.transfer.segmentation.masks import MaskedImages, Pairs
from timm_convnextv2.transfer.yolo import read_yolo

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")

SQUARE = "1 0.25 0.5 0.5 0.5 0.5 1.0 0.25 1.0"  # x 8..16, y 16..32 of 32 pixels
BOX = "0 0.5 0.25 0.25 0.5"  # x 12..20, y 0..16


def write(root, labels, **more):
    """A set whose images of both splits have these labels, as Ultralytics and Roboflow lay them out."""
    for split in ("train", "val"):
        for i, text in enumerate(labels):
            for kind in ("images", "labels"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{split}/{i}.png")
            if text is not None:
                (root / f"labels/{split}/{i}.txt").write_text(text)
    content = dict(train="images/train", val="../images/val", names={0: "cat", 1: "dog"}) | more
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root / "data.yaml"


def test_boxes_and_polygons(tmp_path):
    file = write(tmp_path, [f"{SQUARE}\n\n{SQUARE.replace('1 0', '0 0', 1)}\n", None])
    coco = open_coco(file, "", split="val")
    assert coco.classes == ["cat", "dog"] and coco.images[0].name == "0.png" and not coco.images[1].annotations
    target = DetectionImages(coco)[0][1]
    assert target["labels"].tolist() == [2, 1] and target["boxes"][0].tolist() == [8, 16, 16, 32]
    assert target["masks"][0].sum() == 8 * 16
    file = write(tmp_path, [BOX])
    assert open_coco(file, "", masks=False).annotations[0]["bbox"] == [12, 0, 8, 16]
    with pytest.raises(ValueError, match="1 annotations without a `segmentation`.*--boxes-only"):
        open_coco(file, "")


def test_masks_are_drawn_from_polygons(tmp_path):
    names, images = read_yolo(write(tmp_path, [SQUARE, None]), "train")
    data = MaskedImages(Pairs([image.path for image in images], images), ["background", *names])
    mask = data[0][1]
    assert mask[20, 12] == 2 and mask[10, 12] == 0 and 120 < (mask == 2).sum() < 160
    assert data.check().classes.tolist() == [2 * 32 * 32 - int((mask == 2).sum()), 0, int((mask == 2).sum())]
    names, images = read_yolo(write(tmp_path, [BOX]), "train")
    with pytest.raises(ValueError, match="labelled with boxes"):
        MaskedImages(Pairs([image.path for image in images], images), ["background", *names]).check()


@pytest.mark.parametrize(
    "labels, more, said",
    [
        (["2 0.5 0.5 0.5 0.5"], {}, "1 label cannot be used: .*0.txt line 1: 2 0.5"),
        (["0 5 5 20 20"], {}, "1 label cannot be used"),
        (["0 0.1 0.2 0.3 0.4 0.5"], {}, "1 label cannot be used"),
        (["cat 0.5 0.5 0.5 0.5"], {}, "1 label cannot be used"),
        ([None], {}, "None of 1 images of 'train' has labels"),
        ([BOX], {"names": None}, "cannot be read as YOLO's data.yaml"),
        ([BOX], {"train": "nowhere"}, "nowhere"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, more, said):
    with pytest.raises(ValueError, match=said):
        read_yolo(write(tmp_path, labels, **more), "train")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_commands_read_it(task, tmp_path, capsys):
    write(tmp_path / "d", [f"{SQUARE}\n0 0.1 0.1 0.4 0.1 0.4 0.4"] * 4)
    train(task, tmp_path / "d", tmp_path / "o", "--dry-run")
    classes = 2 if task == "detect" else 3
    assert f"of {classes} classes, 4 to validate" in capsys.readouterr().out


def crowded(tmp_path, n):
    """An image with n objects in rows, and perfect predictions."""
    boxes = [[4.0 * (i % 25), 4.0 * (i // 25), 3.0, 3.0] for i in range(n)]
    own = [dict(id=i + 1, image_id=1, category_id=1, bbox=box, area=9.0, iscrowd=0) for i, box in enumerate(boxes)]
    coco = Coco(tmp_path, [CocoImage(1, "", "a", 64, 100, own)], ["cell"], [1])
    return coco, [dict(image_id=1, category_id=1, bbox=box, score=0.9) for box in boxes]


def test_more_than_a_hundred_objects(tmp_path):
    coco, perfect = crowded(tmp_path, 300)
    assert coco.most_objects == 300
    assert average_precision(coco, perfect, masks=False)["box_ap"] == pytest.approx(100 / 300, abs=0.01)
    found = average_precision(coco, perfect, masks=False, max_objects=300)
    assert found["box_ap"] == found["box_ar100"] == 1.0


def test_the_number_of_objects_follows_the_data(tmp_path, capsys):
    coco, _ = crowded(tmp_path, 300)
    annotations = [dict(a, image_id=i, id=300 * i + a["id"]) for i in range(4) for a in coco.annotations]
    images = [dict(id=i, file_name=f"{i}.png", height=64, width=100) for i in range(4)]
    for split in ("train", "validation"):
        (tmp_path / f"d/{split}/images").mkdir(parents=True)
        for i in range(4):
            Image.new("L", (100, 64), i).save(tmp_path / f"d/{split}/images/{i}.png")
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cell")])
        (tmp_path / f"d/{split}.json").write_text(json.dumps(content))
    more = ["--boxes-only", "--img-size", 128, "--scale", 1, 1, "--dry-run"]
    train("detect", tmp_path / "d", tmp_path / "o", *more)
    assert "up to 300 objects per image are found and evaluated" in capsys.readouterr().out
    train("detect", tmp_path / "d", tmp_path / "o", *more, "--max-objects", 100)
    assert "up to" not in capsys.readouterr().out
    # of 3 pixels at a tenth of the size, none has a pixel
    train("detect", tmp_path / "d", tmp_path / "o", *more, "--img-size", 32, "--scale", 0.2, 0.2, status=2)
    assert "objects tried reaches the loss" in capsys.readouterr().err
    train("detect", tmp_path / "d", tmp_path / "o", *more, "--img-size", 32, "--scale", 1.6, 1.6)
    assert "objects tried do not reach the loss" in capsys.readouterr().out
