"""Annotations in COCO's format: what they become, and what is refused before anything is trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from timm_convnextv2.transfer.detection.coco import (
    DetectionImages,
    collate,
    large_scale_jitter,
    open_coco,
    rle_codec,
    rle_runs,
)
from timm_convnextv2.transfer.loop import Samples

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")

# a polygon and run lengths of the same 2 x 3 pixels of an image of 8 x 10
SQUARE = [[2, 1, 4, 1, 4, 4, 2, 4]]
RUNS = dict(size=[8, 10], counts=[17, 3, 5, 3, 52])


def annotation(number=1, image=5, category=7, box=(2, 1, 2, 3), mask=SQUARE, **more):
    box = list(box) if isinstance(box, tuple) else box
    return dict(id=number, image_id=image, category_id=category, bbox=box, segmentation=mask, **more)


def content(annotations=None):
    """Two images with ids 5 and 9, categories 3 and 7."""
    return dict(
        images=[dict(id=i, file_name=f"{n}.png", height=8, width=10) for i, n in ((5, "a"), (9, "b"))],
        annotations=[annotation()] if annotations is None else annotations,
        categories=[dict(id=7, name="cat"), dict(id=3, name="ant")],
    )


@pytest.fixture
def opened(tmp_path):
    """Writes content and images, and opens them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 10, 3), 100, np.uint8)).save(folder / f"{name}.png")

    def write(value, **how):
        (tmp_path / "a.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return open_coco(tmp_path / "a.json", folder, **how)

    write.folder = folder
    return write


def test_gaps_crowds_masks_of_both_kinds_and_images_without_objects(opened):
    several = [
        annotation(1),
        annotation(2, category=3, mask=RUNS),
        annotation(3, box=(0, 0, 10, 8), iscrowd="1", mask=dict(size=[8, 10], counts=[0, 80])),
        # rounded beyond the edge by less than a pixel
        annotation(4, box=(8, 6, 2.6, 2), mask=[[8, 6, 10.6, 6, 10.6, 8]], iscrowd=0.0),
    ]
    coco = opened(content(several))
    assert (coco.classes, coco.category_ids) == (["ant", "cat"], [3, 7])
    (image,), (target,) = collate([DetectionImages(coco)[0]])
    assert image.shape == (3, 8, 10) and image[0, 0, 0] == pytest.approx(100 / 255)
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["boxes"].tolist() == [[2, 1, 4, 4], [2, 1, 4, 4], [8, 6, 10, 8]]
    expected = torch.zeros(8, 10, dtype=torch.uint8)
    expected[1:4, 2:4] = 1
    assert torch.equal(target["masks"][0], expected) and torch.equal(target["masks"][1], expected)
    image, target = Samples(DetectionImages(coco), large_scale_jitter(16))[0, 1]
    assert [tuple(target[k].shape) for k in ("boxes", "labels", "masks")] == [(0, 4), (0,), (0, 16, 16)]
    assert len(coco.annotations) == 4  # the crowd is the evaluator's
    assert coco.notes == ("1 of 4 annotations are crowds, which are not trained on",) and coco.most_objects == 3


def test_16_bits_and_many_channels(opened):
    for name in "ab":
        np.save(opened.folder / f"{name}.npy", np.full((8, 10, 5), 30000, np.uint16))
    value = content()
    for image in value["images"]:
        image["file_name"] = image["file_name"].replace("png", "npy")
    images = DetectionImages(opened(value), in_chans=5)
    (image,), (target,) = collate([large_scale_jitter(16, (1, 1))(*images[0])])
    assert image.shape == (5, 16, 16) and image.max() == pytest.approx(30000 / 65535)
    assert target["masks"].shape == (1, 16, 16)


def changed(**changes):
    """The content with the first annotation changed."""
    return content([annotation(**changes)])


BAD = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "is a list; expected COCO's format, an object with lists of objects: images"),
    "other keys": ({"imgs": []}, r"has the keys imgs; expected COCO's format"),
    "no categories": (dict(content(), categories=[]), "has no categories"),
    "missing images": (
        dict(content(), images=[dict(id=i, file_name=f"x{i}.png", height=8, width=10) for i in range(5)]),
        r"has 5 images \(of 5\) that are missing in '.*': x0.png, x1.png, x2.png, ...\.",
    ),
    "no sizes": (dict(content(), images=[dict(id=5, file_name="a.png")]), "1 images without a valid `height`"),
    "ids twice": (dict(content(), images=content()["images"][:1] * 2), "1 images of equal `id`: 5"),
    "unknown image": (changed(image=6), "1 annotations of images that it does not list: image_id 6"),
    "unknown category": (changed(category=1), "1 annotations of categories that it does not list: category_id 1"),
    "names twice": (
        dict(content(), categories=[dict(id=7, name="cat"), dict(id=3, name="cat")]),
        "1 categories of equal name: cat",
    ),
    "no box": (changed(box=[1, 2, 3]), "1 annotations whose `bbox` is not four numbers"),
    "zero area": (changed(box=(2, 1, 0, 3)), "1 boxes without area: annotation 1 of a.png"),
    "outside": (changed(box=(20, 1, 2, 3)), "1 boxes that reach outside of their image: annotation 1 of a.png"),
    "partly outside": (changed(box=(7, 1, 6, 3)), "1 boxes that reach outside"),
    "NaN area": (changed(area=float("nan")), "1 annotations whose `area` is not a number"),
    "other crowd": (changed(iscrowd="brush"), "1 annotations whose `iscrowd` is not 0 or 1"),
    "all crowds": (changed(iscrowd="1"), "has 1 annotations, and all are crowds"),
    "image twice": (
        dict(content(), images=[dict(id=i, file_name="a.png", height=8, width=10) for i in (5, 9)]),
        "1 files under several image ids: a.png. .*--merge-duplicates",
    ),
    "annotation twice": (content([annotation(1), annotation(2)]), "1 annotations that repeat others: .* 2 of a.png"),
    "fractions": (changed(box=(0.2, 0.1, 0.2, 0.4)), "all 1 boxes lie within 0 and 1.*Multiply"),
    "x1 y1 x2 y2": (changed(box=(3, 2, 9, 7)), "reach outside .* look like x1 y1 x2 y2"),
    "centres": (changed(box=(8, 5, 4, 6)), "reach outside .* look like centre x, centre y"),
    "far from its mask": (changed(box=(6, 4, 3, 3)), "1 boxes that do not fit their masks"),
    "a line": (changed(mask=[[2, 1, 2, 4, 2, 3]]), "1 masks without area"),
    "a list as id": (changed(image=[5]), r"1 annotations of images that it does not list: image_id \[5\]"),
    "above its folder": (
        dict(content(), images=[dict(id=5, file_name="../images/../a.json", height=8, width=10)]),
        "1 images whose `file_name` leaves their folder",
    ),
    "a broken string": (changed(mask=dict(size=[8, 10], counts="5^PX01_")), "counts do not add up"),
    "no mask": (changed(mask=[]), "1 annotations without a `segmentation`.* --boxes-only"),
    "mask size": (changed(mask=dict(size=[10, 8], counts=[80])), r"1 masks \(RLE\) of another size than their images"),
    "mask counts": (changed(mask=dict(size=[8, 10], counts=[70])), r"1 masks \(RLE\) whose counts do not add up"),
    "two points": (changed(mask=[[1, 1, 2, 2]]), "1 masks that are neither RLE nor polygons"),
}  # fmt: skip


@pytest.mark.parametrize("value, message", BAD.values(), ids=BAD)
def test_bad_annotations_are_one_message(opened, value, message):
    with pytest.raises(ValueError, match=message) as error:
        opened(value)
    assert "\n" not in str(error.value)


def test_wrong_annotations_can_be_left_out_and_are_counted(opened):
    several = [annotation(1), annotation(2, box=(2, 1, 0, 3)), annotation(3, box=(20, 1, 2, 3))]
    coco = opened(content(several), drop_wrong=True)
    assert len(coco.annotations) == 1 and [note.split(":")[0] for note in coco.notes] == [
        "left out 1 boxes without area", "left out 1 boxes that reach outside of their image",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has 1 boxes without area.*--drop-wrong"):
        opened(content(several))


def test_duplicates_are_merged_on_request_and_counted(opened):
    value = content([annotation(1), annotation(2), annotation(3, image=9, category=3), annotation(4, image=9)])
    value["images"][1]["file_name"] = "a.png"
    value["categories"][1]["name"] = "cat"
    coco = opened(value, merge=True)
    assert (len(coco.images), coco.classes, len(coco.annotations)) == (1, ["cat"], 1)
    assert [note.split(":")[0] for note in coco.notes] == [
        "merged 1 categories of equal name", "merged 1 files under several image ids",
        "merged 3 annotations that repeat others",
    ]  # fmt: skip


def test_exports_of_annotation_tools(opened):
    """Paths of Windows, a parent of all categories, compressed masks, a box below a pixel."""
    (opened.folder / "sub").mkdir()
    (opened.folder / "a.png").rename(opened.folder / "sub/a.png")
    value = content([annotation(1), annotation(2, box=(3, 1, 0.5, 3), mask=[[3, 1, 3.5, 1, 3.5, 4]])])
    value["images"][0]["file_name"] = "sub\\a.png"
    value["categories"] = [dict(e, supercategory="pets") for e in value["categories"]]
    value["categories"] += [dict(id=0, name="pets", supercategory="none")]
    counts = rle_codec().frPyObjects(RUNS, 8, 10)["counts"]
    value["annotations"][0]["segmentation"] = dict(size=[8, 10], counts=counts.decode())
    coco = opened(value)
    assert coco.classes == ["ant", "cat"] and coco.images[0].name == "sub/a.png"
    assert "1 categories that no annotation uses" in coco.notes[0] and "1 of 2 boxes are smaller" in coco.notes[1]
    assert DetectionImages(coco)[0][1]["masks"][0].sum() == 6
    with pytest.raises(ValueError, match="missing in .* Pass the folder that they are in"):
        open_coco(opened.folder.parent / "a.json", opened.folder / "sub")


def test_corners_in_place_of_sizes_are_named_where_they_fit(opened):
    value = content([annotation(i, box=(0, 0, 1 + i / 40, 2 + i / 40), mask=None) for i in range(20)])
    assert "would also fit as x1 y1 x2 y2" in opened(value, masks=False).notes[0]
    value["annotations"][3]["bbox"] = [3, 0, 2, 1]
    assert not opened(value, masks=False).notes


def test_compressed_masks_are_read_as_the_codec_reads_them():
    draw = np.random.default_rng(0)
    for size in ((1, 1), (7, 3), (300, 200)):
        mask = np.asfortranarray(draw.random(size) < draw.random(), dtype=np.uint8)
        runs = rle_runs(rle_codec().encode(mask)["counts"].decode())
        flat = np.repeat(np.arange(len(runs)) % 2, runs)
        assert np.array_equal(flat, mask.ravel(order="F"))
    assert rle_runs("") is rle_runs("P") is rle_runs("\x7f") is rle_runs([1, -1]) is None


def test_images_of_another_size_or_corrupt_are_found_before_training(opened):
    Image.fromarray(np.zeros((10, 8, 3), np.uint8)).save(opened.folder / "b.png")
    with pytest.raises(ValueError, match="1 of 2 images tried .*\n.*b.png .* has 8 x 10 pixels, annotated as 10 x 8"):
        DetectionImages(opened(content())).check()
    (opened.folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 2 images tried .of 2. cannot be used"):
        DetectionImages(opened(content())).check()


def test_places_that_are_not_there(tmp_path, opened):
    with pytest.raises(ValueError, match="annotations '.*none.json' do not exist"):
        open_coco(tmp_path / "none.json", tmp_path)
    opened(content())
    with pytest.raises(ValueError, match="folder of the images, '.*none', does not exist"):
        open_coco(tmp_path / "a.json", tmp_path / "none")
