"""Labelled images: the places that are understood, and those that are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_convnextv2.data import DemoSource, Pixels
from timm_convnextv2.features import knn, open_labelled


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.full((4, 4, 5), value, np.uint8))
    else:
        Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def folders(root, classes=("cat", "dog"), images=8):
    for label, name in enumerate(classes):
        for i in range(images):
            write(root / name / f"{i}.png", 100 * label + i)
    return root


def names(split, root):
    return [path.removeprefix(f"{root}/") for path in split.source.paths]


@pytest.mark.parametrize("validation", ["validation", "val", "test"])
def test_train_and_validation(tmp_path, validation):
    folders(tmp_path / "train"), folders(tmp_path / validation, images=2)
    data = open_labelled(tmp_path)
    assert data.classes == ["cat", "dog"] and not data.several and data.chance == 0.5
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 and data.train.labels.dtype == torch.long
    assert names(data.test, tmp_path) == [f"{validation}/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)]
    assert data.test.labels.tolist() == [0, 0, 1, 1] and data.test.source[3][0, 0, 0] == 101
    assert data.notes[0].startswith("4 test images have the same bytes as a training image (4 compared with 16): ")


def test_one_level_is_split_by_seed_in_each_class(tmp_path):
    folders(tmp_path), folders(tmp_path, classes=["train"], images=1)  # a class may have this name
    data, again, other = open_labelled(tmp_path), open_labelled(tmp_path), open_labelled(tmp_path, seed=1)
    assert data.test.labels.tolist() == [0, 0, 1, 1] and data.train.labels.bincount().tolist() == [6, 6, 1]
    assert names(data.test, tmp_path) == names(again.test, tmp_path) != names(other.test, tmp_path)
    assert not set(names(data.test, tmp_path)) & set(names(data.train, tmp_path))
    assert len(open_labelled(tmp_path, validation_share=0.5).test.labels) == 8


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_table_of_labels(tmp_path, encoding):
    folders(tmp_path / "images")
    rows = [f"images/{c}/{i}.png,{c}" for c in ("dog", "cat") for i in range(8)]
    (tmp_path / "labels.csv").write_text("name,label\n" + "\n".join(rows), encoding=encoding)
    data = open_labelled(tmp_path / "labels.csv")
    assert data.classes == ["cat", "dog"] and data.test.labels.tolist() == [1, 1, 0, 0]
    assert ["dog" in path for path in data.train.source.paths] == data.train.labels.bool().tolist()


def test_table_of_several_labels(tmp_path):
    folders(tmp_path)
    rows = [f'cat/{i}.png,"{label}"' for i, label in enumerate(["b;a", "a", "b ; c", "c;c", "a;b;c", "b", "a", "c"])]
    (tmp_path / "labels.csv").write_text("name,label\n" + "\n".join(rows))
    data = open_labelled(tmp_path / "labels.csv")
    assert data.several and data.classes == ["a", "b", "c"]
    parts = (data.train, data.test)
    labels = dict(pair for part in parts for pair in zip(names(part, tmp_path), part.labels, strict=True))
    assert [labels[f"cat/{i}.png"].tolist() for i in range(5)] == [[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1] * 3]
    assert len(data.test.labels) == 2


def test_rows_of_one_image_are_merged_and_never_split(tmp_path):
    """With a row per row of the table, random labels on noise gave kNN 1 an accuracy of 100 %."""
    folders(tmp_path)
    rows = [f"{c}/{'./' * (k == 1)}{i}.png,{c}" for k in range(3) for c in ("cat", "dog") for i in range(8)]
    (tmp_path / "labels.csv").write_text("name,label\n" + "\n".join(rows))
    data = open_labelled(tmp_path / "labels.csv")
    train, test = ({*names(part, tmp_path)} for part in (data.train, data.test))
    assert (len(train), len(test), len(data.train.labels), len(data.test.labels)) == (12, 4, 12, 4) and not train & test
    assert data.notes == ("32 of 48 rows repeat the label of an image and were merged.",)
    (tmp_path / "labels.csv").write_text("name,label\ncat/0.png,cat\ndog/0.png,dog\ncat/./0.png,dog\n")
    with pytest.raises(ValueError, match=r"two labels for 'cat/./0.png': line 2 'cat', line 4 'dog'"):
        open_labelled(tmp_path / "labels.csv")


def test_classes_are_named_and_sessions_are_warned_of(tmp_path):
    folders(tmp_path / "deer", ["monday", "tuesday"]), folders(tmp_path / "boar", ["monday"])
    line, warning, *_ = open_labelled(tmp_path).describe(tmp_path)
    assert "2 classes (monday, tuesday)" in line
    assert "1 of 2 classes are in several folders, such as 'monday' (boar/monday, deer/monday)" in warning
    assert len(open_labelled(tmp_path / "deer").describe(tmp_path)) == 1


def test_other_channels(tmp_path):
    for name in ("a", "b"):
        for i in range(2):
            write(tmp_path / name / f"{i}.npy")
    assert open_labelled(tmp_path, in_chans=5).train.source[0].shape == (5, 4, 4)
    with pytest.raises(ValueError, match="expected 3 channels"):
        open_labelled(tmp_path)


def damaged(root):
    folders(root)
    (root / "cat" / "3.png").write_bytes(b"no image")
    return root


def grouped(root, groups=4, images=3):
    for name in ("cat", "dog"):
        for i in range(groups * images):
            write(root / name / f"{name}{i // images}" / f"{i}.png", i)
    return root


def of_groups(root, rows):
    folders(root)
    (root / "labels.csv").write_text("name,label,patient\n" + "\n".join(rows))
    return root / "labels.csv"


@pytest.mark.parametrize("kind", ["folders", "csv folders", "csv column"])
def test_a_group_is_on_one_side(tmp_path, kind):
    grouped(tmp_path)
    options = {"group_by": "parent-folder"} if kind != "csv column" else {"groups": "patient"}
    place = tmp_path
    if kind != "folders":
        rows = [f"{p.relative_to(tmp_path)},{p.parts[-3]},{p.parent.name}" for p in sorted(tmp_path.rglob("*.png"))]
        place = tmp_path / "labels.csv"
        place.write_text("name,label,patient\n" + "\n".join(rows))
    for seed in range(5):
        data = open_labelled(place, seed=seed, **options)
        train, test = ({path.split("/")[-2] for path in part.source.paths} for part in (data.train, data.test))
        assert not train & test and train | test == {f"{c}{i}" for c in ("cat", "dog") for i in range(4)}
        assert data.classes == ["cat", "dog"] and data.test.labels.tolist() == [0] * 3 + [1] * 3  # a quarter of each
    assert len({tuple(open_labelled(place, seed=seed, **options).test.source.paths) for seed in range(5)}) > 1


def test_images_that_groups_tie_together_would_leak(tmp_path):
    """Random labels by group on images that are nearly equal in a group: only grouping shows that nothing is there."""
    generator = np.random.default_rng(0)
    for group in range(40):
        for i in range(4):
            path = tmp_path / "ab"[group % 2] / str(group) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i == 0:
                base = generator.integers(0, 200, (8, 8, 3))
            Image.fromarray((base + generator.integers(0, 9, base.shape)).astype(np.uint8)).save(path)
    found = {}
    for grouping in (None, "parent-folder"):
        place = tmp_path
        if grouping is None:
            place = tmp_path / "labels.csv"
            rows = [f"{p.relative_to(tmp_path)},{p.parts[-3]}" for p in sorted(tmp_path.rglob("*.png"))]
            place.write_text("name,label\n" + "\n".join(rows))
        data = open_labelled(place, group_by=grouping)
        train, test = (
            torch.stack([part.source[i].flatten().float() for i in range(len(part.labels))]) / 255
            for part in (data.train, data.test)
        )
        near = knn(train, data.train.labels, test, 1)
        found[grouping] = float((near == data.test.labels).float().mean())
    assert found[None] > 0.95 and found["parent-folder"] < 0.75


def table(root, text):
    folders(root)
    (root / "labels.csv").write_text(text)
    return root / "labels.csv"


def halves(root, train, validation):
    folders(root / "train", train), folders(root / "validation", validation)
    return root


BAD = {
    "do not exist; expected a folder or a CSV": lambda root: root / "nowhere",
    "has one class, cat; expected at least two": lambda root: folders(root, ["cat"]),
    "one class, dog": lambda root: halves(root, ["dog"], ["dog"]),
    r"only .*train. has cat .*; only .*validation. has bird": lambda root: halves(
        root, ["cat", "dog"], ["bird", "dog"]
    ),
    r"has train/ and no folder to validate on, expected one of val, .*give '.*train'": lambda root: (
        folders(root / "train").parent
    ),
    "is in no folder of a class": lambda root: write(root / "x.png") or folders(root),
    r"cannot be decoded.*\n.*cat/3.png": damaged,
    "No class has two images": lambda root: folders(root, images=1),
    "No image below": lambda root: root,
    r"has the columns \['file', 'label'\], expected name and label": lambda root: table(root, "file,label\nx,y\n"),
    "line 2: no file": lambda root: table(root, "name,label\nx.png,y\n"),
    r"line 3: no label for 'dog/0.png'": lambda root: table(root, "name,label\ncat/0.png,y\ndog/0.png,\n"),
    r"--groups patient: .* has the columns name, label": lambda root: (table(root, "name,label\n"), "patient"),
    r"line 2: no patient for 'cat/0.png'": lambda root: (of_groups(root, ["cat/0.png,cat,"]), "patient"),
    r"two groups for 'cat/0.png': 'a' and 'b'": lambda root: (
        of_groups(root, ["cat/0.png,cat,a", "cat/0.png,cat,b"]),
        "patient",
    ),
    r"leaves no test image of cat, dog; cat has 1 of 2 groups": lambda root: (
        of_groups(root, [f"{c}/{i}.png,{c},{c}" for c in ("cat", "dog") for i in range(8)]),
        "patient",
    ),
    "has no images; expected at least two classes": lambda root: table(root, "name,label\n"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(tmp_path, message):
    place = BAD[message](tmp_path)
    place, groups = place if isinstance(place, tuple) else (place, None)
    with pytest.raises(ValueError, match=message):
        open_labelled(place, groups=groups)


def test_a_group_in_both_folders_is_refused(tmp_path):
    grouped(tmp_path / "train"), grouped(tmp_path / "validation", groups=1)
    with pytest.raises(ValueError, match=r"2 groups are in '.*train' and in '.*validation', such as 'cat0'"):
        open_labelled(tmp_path, group_by="parent-folder")
    with pytest.raises(ValueError, match="choose one"):
        open_labelled(tmp_path, group_by="parent-folder", groups="patient")


@pytest.mark.parametrize("share", [0, 1, -1])
def test_share_out_of_range(tmp_path, share):
    with pytest.raises(ValueError, match="validation_share is"):
        open_labelled(folders(tmp_path), validation_share=share)


def test_the_demo_images_are_labelled():
    found = open_labelled("demo", pixels=Pixels(standardize="channel"))
    assert found.classes == list(DemoSource.classes) and (len(found.train.source), len(found.test.source)) == (512, 400)
    for split, seed in ((found.train, 2), (found.test, 3)):
        assert split.labels.bincount().tolist() == [len(split.source) // 8] * 8
        wanted = DemoSource(16, seed=seed, pixels=Pixels(standardize="channel"))
        assert torch.equal(split.source[9], wanted[9]) and int(split.labels[9]) == wanted.label(9)
    assert found.chance == 1 / 8


@pytest.mark.parametrize("classes, images, warned", [(10, 4, True), (10, 5, False), (9, 3, False)])
def test_patients_may_have_been_taken_for_classes(tmp_path, classes, images, warned):
    for i in range(classes * images):
        (folder := tmp_path / f"PAT{i % classes:02d}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
    found = [line for line in open_labelled(tmp_path).describe(tmp_path) if "patients or sessions" in line]
    assert len(found) == warned and all(f"10 classes of {images}.0 images on average" in line for line in found)
