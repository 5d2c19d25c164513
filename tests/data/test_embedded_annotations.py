"""The embedded pictures with boxes and masks."""

import json

import numpy as np
import pytest
from PIL import Image

from timm_convnextv2.data import EmbeddedSource
from timm_convnextv2.data.sources.embedded import write_folder
from timm_convnextv2.data.sources.embedded.__main__ import cli
from timm_convnextv2.data.sources.embedded.annotations import uncompressed_rle


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated") / "data"
    assert cli([str(folder), "--size", "32", "--train", "8", "--validation", "16", "--coco", "--masks"]) == 0
    return folder


def test_files_and_names(written):
    assert sorted(p.name for p in written.iterdir()) == [
        "classes.txt", "train", "train.json", "validation", "validation.json",
    ]  # fmt: skip
    assert (written / "classes.txt").read_text().split() == ["background", *EmbeddedSource.classes]
    for split, count in (("train", 8), ("validation", 16)):
        for kind in ("images", "masks"):
            assert len(list((written / split / kind).glob("*.png"))) == count
    content = json.loads((written / "train.json").read_text())
    assert content["categories"][0] == {"id": 1, "name": "disc"} and len(content["annotations"]) == 8


def test_images_are_those_of_the_labelled_folder(written, tmp_path):
    labelled = write_folder(tmp_path / "data", size=32, train=8, validation=8)
    for path in (labelled / "train").rglob("*.png"):
        assert path.read_bytes() == (written / "train/images" / path.name).read_bytes()


def test_box_mask_and_run_lengths_agree(written):
    content = json.loads((written / "validation.json").read_text())
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        png = np.asarray(Image.open(written / "validation/masks" / image["file_name"]))
        assert set(np.unique(png)) == {0, annotation["category_id"]} and png.shape == (32, 32)
        rows, columns = np.nonzero(png)
        x, y, w, h = annotation["bbox"]
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == (png > 0).sum()
        runs = annotation["segmentation"]["counts"]
        flat = np.concatenate([np.full(n, i % 2) for i, n in enumerate(runs)])
        assert np.array_equal(flat.reshape(32, 32, order="F"), png > 0)


def test_the_mask_is_where_the_object_is_painted(monkeypatch):
    """Of a picture drawn with another surface, the object's pixels differ, the soft edge apart."""
    source = EmbeddedSource(8, 64, seed=5)
    plain, masks = [source[i].numpy() for i in range(8)], [source.mask(i) for i in range(8)]
    from timm_convnextv2.data.sources import embedded

    surface = embedded._surface
    monkeypatch.setattr(embedded, "_surface", lambda *args: 1 - surface(*args))
    for i in range(8):
        differs = (source[i].numpy() != plain[i]).any(0)
        assert (differs & ~_grown(masks[i])).sum() < 0.02 * masks[i].sum()
        assert (differs & masks[i]).sum() > 0.7 * masks[i].sum()


def _grown(mask):
    padded = np.pad(mask, 1)
    return np.max([padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize(
    "mask, counts",
    [
        ([[0, 0], [0, 0]], [4]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [0, 0]], [0, 1, 3]),
        ([[0, 0], [1, 0]], [1, 1, 2]),
        ([[0, 0], [0, 1]], [3, 1]),
    ],
)
def test_run_lengths(mask, counts):
    assert uncompressed_rle(np.array(mask, bool)) == dict(size=[2, 2], counts=counts)
