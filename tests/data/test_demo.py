"""The demo data set: its images, as a labelled folder, and with boxes and masks."""

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from timm_convnextv2.commands.main import main
from timm_convnextv2.data import DataSet, DemoSource, create_source
from timm_convnextv2.data.demo import images as demo_images
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.data.demo.folder import uncompressed_rle
from timm_convnextv2.features import open_labelled

SMALL = dict(size=16, train=16, validation=24)
SPLITS = ("train", "validation")


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch):
    """Without the cache of conftest.py."""
    monkeypatch.setattr(DemoSource, "_draw", DemoSource._draw.__wrapped__)


# ---- images


def test_demo_is_deterministic_balanced_and_varied():
    source, again = DemoSource(16, 64), pickle.loads(pickle.dumps(DemoSource(32, 64)))
    assert len(source.classes) == len(set(source.classes)) == 8
    assert torch.bincount(torch.tensor([source.label(i) for i in range(16)])).tolist() == [2] * 8
    for i in reversed(range(16)):
        assert torch.equal(source[i], again[i])
        assert source[i].shape == (3, 64, 64) and source[i].dtype == torch.uint8
        assert source[i].float().std() > 10  # no empty image
        assert source.classes[source.label(i)] in source.name(i)
    assert not any(torch.equal(source[i], source[j]) for i, j in itertools.combinations(range(16), 2))
    assert not torch.equal(source[0], DemoSource(16, 64, seed=1)[0])
    with pytest.raises(IndexError):
        source[16]


@pytest.mark.parametrize("objects", [False, True])
def test_demo_draws_the_texture_of_its_label(monkeypatch, objects):
    drawn = []
    textures = {
        name: lambda *a, f=f, name=name: (drawn.append(name), f(*a))[1] for name, f in demo_images._TEXTURES.items()
    }
    monkeypatch.setattr(demo_images, "_TEXTURES", textures)
    source = DemoSource(8, 16, objects=objects)
    for i in range(8):
        drawn.clear()
        source[i]
        assert drawn == [source.classes[source.label(i)]]


def test_every_texture_has_the_same_shares_of_its_two_colours(monkeypatch):
    """In black and white without light and noise, so that no histogram tells the classes apart."""
    black, white = np.zeros((3, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    monkeypatch.setattr(demo_images, "_two_colours", lambda dice: (white, black))
    monkeypatch.setattr(demo_images, "_gradient", lambda *args: 1)
    source = DemoSource(8 * 24, 64)
    share = np.array([float((source[i].float() > 127).float().mean()) for i in range(len(source))]).reshape(24, 8)
    assert 0.4 < share.min() < 0.46 and 0.54 < share.max() < 0.6
    assert np.abs(share.mean(0) - 0.5).max() < 0.03


def test_demo_is_the_same_everywhere():
    # mean colours of one image, to half a grey level: guards the stream of random numbers and the drawing
    means = DemoSource()[5].float().mean((1, 2))
    assert torch.allclose(means, torch.tensor([69.77, 68.45, 62.26]), atol=0.5)


def test_demo_grey_and_errors():
    rgb, grey = DemoSource(4, 32)[3].float(), DemoSource(4, 32, in_chans=1)[3].float()
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    assert grey.shape == (1, 32, 32) and (grey - luma).abs().max() <= 1.5
    with pytest.raises(ValueError, match="in_chans=4"):
        DemoSource(in_chans=4)
    with pytest.raises(ValueError, match=">= 1"):
        DemoSource(0)


# ---- labelled folder


def pixels(folder, split=""):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)) for p in sorted(Path(folder, split).rglob("*.png"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("written") / "deep/data", **SMALL)


def test_folder_is_what_timm_reads(written):
    assert sorted(p.name for p in written.iterdir()) == ["train", "validation"]
    for split, count in (("train", 16), ("validation", 24)):
        dataset = create_dataset("", root=written, split=split)  # what train.py does
        assert Counter(label for _, label in dataset) == {i: count // 8 for i in range(8)}
        assert set(dataset.reader.class_to_idx) == set(DemoSource.classes)
    source = DemoSource(16, 16, seed=4)  # the train split: image i with label i % 8
    for i in range(16):
        image = np.asarray(Image.open(written / "train" / source.classes[i % 8] / f"{i:05d}.png"))
        assert image.dtype == np.uint8 and np.array_equal(image.transpose(2, 0, 1), source[i])


def test_no_image_is_seen_twice(written, tmp_path):
    other = pixels(write_folder(tmp_path / "other", **SMALL, seed=1))
    ours = pixels(written)
    pretraining = []
    for split in ("train", "validation", "val", "test"):  # what pretraining on 'demo' draws, at this size
        source = create_source(data_set=DataSet("demo", split, 24))
        source.size = 16
        pretraining += [source[i].permute(1, 2, 0).numpy() for i in range(24)]
    for part in (labelled := open_labelled("demo")).train, labelled.test:
        part.source.size = 16
        pretraining += [part.source[i].permute(1, 2, 0).numpy() for i in range(24)]
    images = [image.tobytes() for image in (*ours.values(), *other.values())]
    assert len(set(images)) == len(images) == 80
    assert not set(images) & {image.tobytes() for image in pretraining}


def test_same_seed_same_folder_and_more_images_keep_the_first(written, tmp_path):
    again = pixels(write_folder(tmp_path / "again", **SMALL))
    assert list(again) == list(pixels(written))
    assert all(np.array_equal(image, again[name]) for name, image in pixels(written).items())
    more = pixels(write_folder(tmp_path / "more", size=16, train=32, validation=8))
    assert all(np.array_equal(image, more[name]) for name, image in pixels(written, "train").items())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(train=20), "--train 20: .* multiple of 8"),
        (dict(validation=0), "--validation .* 0"),
        (dict(seed=-1), "--seed .* -1"),
        (dict(size=4), "--size .* 4"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "data", **settings)
    assert not list(tmp_path.iterdir())


def test_only_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(pixels(write_folder(tmp_path / "empty", **SMALL))) == 40
    for taken in ("full/mine.txt", "file"):
        (tmp_path / taken).parent.mkdir(exist_ok=True)
        (tmp_path / taken).write_text("mine")
        with pytest.raises(ValueError, match="empty folder"):
            write_folder(tmp_path / taken.split("/")[0], **SMALL)
        assert (tmp_path / taken).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def draw(*args):
        drawn.append(args)
        if len(drawn) == 20:
            assert len(list(tmp_path.rglob("*.png"))) == 19 and not (tmp_path / "data").exists()
            raise KeyboardInterrupt
        return np.zeros((3, 16, 16), np.float32), None

    monkeypatch.setattr(demo_images, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "data", **SMALL)
    assert len(drawn) == 20 and not list(tmp_path.iterdir())


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "data", "--size", "16", "--train", "8", "--validation", "16"]) == 0
    out, err = capsys.readouterr()
    assert not err and all(word in out for word in (str(tmp_path / "data"), "8 training", "16 validation", "stripes,"))
    assert len(pixels(tmp_path / "data", "validation")) == 16
    # mistakes are one message: a folder with content, a file instead of a folder
    (tmp_path / "data/x").write_text("")
    for folder in ("data", "data/x/under"):
        assert main(["demo", folder]) == 2
        out, err = capsys.readouterr()
        assert not out and "demo: error:" in err and err.count("\n") == 1


# ---- annotations


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated") / "data"
    assert main(["demo", str(folder), "--size", "32", "--train", "8", "--validation", "16", "--coco", "--masks"]) == 0
    return folder


def test_files_and_names(annotated):
    assert {p.name for p in annotated.iterdir()} == {"classes.txt", *SPLITS, *(f"{split}.json" for split in SPLITS)}
    assert (annotated / "classes.txt").read_text().split() == ["background", *DemoSource.classes]
    for split, count in zip(SPLITS, (8, 16), strict=True):
        for kind in ("images", "masks"):
            assert len(list((annotated / split / kind).glob("*.png"))) == count
    content = json.loads((annotated / "train.json").read_text())
    assert content["categories"][0] == {"id": 1, "name": "stripes"} and len(content["annotations"]) == 8


def test_box_mask_and_run_lengths_agree(annotated):
    content = json.loads((annotated / "validation.json").read_text())
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        png = np.asarray(Image.open(annotated / "validation/masks" / image["file_name"]))
        assert set(np.unique(png)) == {0, annotation["category_id"]} and png.shape == (32, 32)
        rows, columns = np.nonzero(png)
        x, y, w, h = annotation["bbox"]
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == (png > 0).sum()
        runs = annotation["segmentation"]["counts"]
        flat = np.concatenate([np.full(n, i % 2) for i, n in enumerate(runs)])
        assert np.array_equal(flat.reshape(32, 32, order="F"), png > 0)


def test_the_mask_is_where_the_object_is_painted(monkeypatch):
    """With the colours of its texture exchanged, the pixels of the object differ, and others only at its edge."""
    source = DemoSource(8, 64, seed=5, objects=True)
    plain, masks = [source[i].numpy() for i in range(8)], [source.mask(i) for i in range(8)]
    colours = demo_images._two_colours
    monkeypatch.setattr(demo_images, "_two_colours", lambda dice: colours(dice)[::-1])
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
