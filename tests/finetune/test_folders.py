"""Folders of labelled images: listed, left out and described."""

import os
import shutil

import pytest
from folders import write_images
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_convnextv2.finetune import folders


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "train", n=4)
    return tmp_path / "train"


def test_order_and_classes_are_timms(root):
    write_images(root / "b" / "deeper", classes=("d10", "d9"), n=2)
    ours, timms = folders.FolderReader(root), ReaderImageFolder(str(root))
    assert ours.samples == timms.samples and ours.class_to_idx == timms.class_to_idx
    assert ours.filenames(basename=True) == timms.filenames(basename=True)
    assert ours.counts() == {"a": 4, "b": 4, "c": 4, "d9": 2, "d10": 2}


def test_hidden_and_special_files_and_links_that_lead_back_are_left_out(root):
    write_images(root, classes=(".ipynb_checkpoints",), n=2)
    (root / "a" / "0.png").rename(root / "a" / ".0.png")
    (root / "a" / "up").symlink_to(root)
    os.mkfifo(root / "a" / "x.jpg")
    (root / "a" / "gone.png").symlink_to(root / "nowhere")
    reader = folders.FolderReader(root)
    assert reader.counts() == {"a": 3, "b": 4, "c": 4}
    assert "2 not opened, no regular file" in folders.describe(reader)[1]


def test_other_files_are_counted_and_named(root):
    for i in range(3):
        (root / "a" / f"{i}.doc").touch()
        (root / "b" / f"{i}.HEIC").touch()
    (root / "b" / "README").touch()
    (root / "d").mkdir()
    (root / "d" / "x.doc").touch()
    reader = folders.FolderReader(root)
    assert str(reader.left) == "8 other files ignored: 4 .doc, 3 .heic, 1 without extension"
    first, second, third = folders.describe(reader)
    assert first == f"{root}: 12 images of 3 classes: a 4, b 4, c 4" and "8 other files" in second
    assert third.endswith("no images in d")
    with pytest.raises(ValueError, match="0 images in .*1 other file ignored: 1 .doc"):
        folders.FolderReader(root / "d")


def test_class_map_and_extensions(root, tmp_path):
    (tmp_path / "map.txt").write_text("c\na\n")
    reader = folders.FolderReader(root, str(tmp_path / "map.txt"), ".png")
    assert reader.counts() == {"c": 4, "a": 4} and reader.unlabelled == {"b": 4}
    assert "left out 4 images" in folders.describe(reader)[-1]
    with pytest.raises(ValueError, match="--class-map nowhere.txt"):
        folders.FolderReader(root, "nowhere.txt")
    with pytest.raises(ValueError, match="Images are .jpg"):
        folders.FolderReader(root, input_key=".jpg")


@pytest.mark.parametrize("counts, warned", [({"a": 21, "b": 2}, True), ({"a": 20, "b": 2}, False), ({"a": 9}, False)])
def test_imbalance(counts, warned):
    text = folders.imbalance(counts)
    assert ("21 images of a against 2 of b" in text) == warned


def test_counts_of_many_classes_are_their_extremes(tmp_path):
    write_images(tmp_path, classes=[f"k{i}" for i in range(20)], n=1)
    write_images(tmp_path / "k3", classes=["k3"], n=2)
    assert folders.describe(folders.FolderReader(tmp_path))[0].endswith("from 1 (k0) to 3 (k3) per class")


def test_finetune_says_it(run, data, tmp_path, capsys):
    write_images(tmp_path / "d" / "train", classes=("a",), n=22)
    write_images(tmp_path / "d" / "train", classes=("b",), n=2)
    write_images(tmp_path / "d" / "val", classes=("a", "b", ".ipynb_checkpoints"), n=2)
    (tmp_path / "d" / "val" / "a" / "x.doc").touch()
    first = min((tmp_path / "d" / "train" / "a").iterdir())
    shutil.copy(first, tmp_path / "d" / "val" / "b" / "copy.png")
    assert run(data=tmp_path / "d")["args"]["num_classes"] == 2
    out, err = capsys.readouterr()
    assert "24 images of 2 classes: a 22, b 2" in out and "1 other file ignored: 1 .doc" in out
    assert "warning: the classes are unequal" in err
    assert "warning: 1 validation image has the same bytes as a training image" in err
