"""The embedded pictures as a labelled image folder."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from timm_convnextv2.data import EmbeddedSource, create_source
from timm_convnextv2.data.sources import embedded
from timm_convnextv2.data.sources.embedded import write_folder
from timm_convnextv2.data.sources.embedded.__main__ import cli

SMALL = dict(size=16, train=16, validation=24)


def pixels(folder, split=""):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)) for p in sorted(Path(folder, split).rglob("*.png"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("written") / "deep/data", **SMALL)


def test_folder_is_what_timm_reads(written):
    assert sorted(p.name for p in written.iterdir()) == ["train", "validation"]
    for split, count in (("train", 16), ("validation", 24)):
        dataset = create_dataset("", root=written, split=split)  # what train.py does
        labels = Counter(label for _, label in dataset)
        assert labels == {i: count // 8 for i in range(8)}
        assert set(dataset.reader.class_to_idx) == set(EmbeddedSource.classes)
    for image in pixels(written).values():
        assert image.shape == (16, 16, 3) and image.dtype == np.uint8


def test_pictures_lie_under_their_class(written):
    # the train split is source 2 of the embedded set: picture i with label i % 8
    source = EmbeddedSource(16, 16, seed=2)
    for i in range(16):
        image = np.asarray(Image.open(written / "train" / source.classes[i % 8] / f"{i:05d}.png"))
        assert np.array_equal(image.transpose(2, 0, 1), source[i])


def test_no_picture_is_seen_twice(written, tmp_path):
    other = pixels(write_folder(tmp_path / "other", **SMALL, seed=1))
    ours = pixels(written)
    pretraining = []
    for split in ("train", "validation", "val", "test"):  # what pretraining on 'embedded' draws, at this size
        source = create_source(dataset="embedded", split=split, num_samples=24)
        source.size = 16
        pretraining += [source[i].permute(1, 2, 0).numpy() for i in range(24)]
    images = [image.tobytes() for image in (*ours.values(), *other.values())]
    assert len(set(images)) == len(images) == 80
    assert not set(images) & {image.tobytes() for image in pretraining}


def test_same_seed_same_folder_and_more_pictures_keep_the_first(written, tmp_path):
    again = pixels(write_folder(tmp_path / "again", **SMALL))
    assert list(again) == list(pixels(written))
    assert all(np.array_equal(image, again[name]) for name, image in pixels(written).items())
    more = pixels(write_folder(tmp_path / "more", size=16, train=32, validation=8))
    assert all(np.array_equal(image, more[name]) for name, image in pixels(written, "train").items())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(train=20), "train=20 pictures: expected a multiple of 8"),
        (dict(validation=0), "validation=0 pictures: expected a multiple of 8"),
        (dict(seed=-1), "seed >= 0, got -1"),
        (dict(size=4), "size >= 8.* 4 "),
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
        with pytest.raises(ValueError, match="is not an empty folder"):
            write_folder(tmp_path / taken.split("/")[0], **SMALL)
        assert (tmp_path / taken).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def render(*args):
        drawn.append(args)
        if len(drawn) == 20:
            assert len(list(tmp_path.rglob("*.png"))) == 19 and not (tmp_path / "data").exists()
            raise KeyboardInterrupt
        return np.zeros((3, 16, 16), np.float32)

    monkeypatch.setattr(embedded, "_render", render)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "data", **SMALL)
    assert len(drawn) == 20 and not list(tmp_path.iterdir())


def test_shell(tmp_path):
    command = [sys.executable, "-m", "timm_convnextv2.data.sources.embedded", "data"]
    command += ["--size", "16", "--train", "8", "--validation", "16"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{tmp_path / 'data'}: 8 pictures to train and 16 to validate, 16 x 16, of 8 classes: disc," in run.stdout
    assert len(pixels(tmp_path / "data", "validation")) == 16


def test_shell_mistakes_are_one_message(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_text("")
    assert cli([str(tmp_path / "data")]) == 2
    out, err = capsys.readouterr()
    assert (
        not out and err.startswith("python -m timm_convnextv2.data.sources.embedded: error:") and err.count("\n") == 1
    )
    assert cli([str(tmp_path / "data/x/under")]) == 2  # a file where a folder should be
    assert "error:" in capsys.readouterr().err
