"""Several folders, patterns, tar files and lists as one source."""

import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from drawn import write_numbered

from timm_convnextv2.data import DataSet, FolderSource, ImagePaths, create_source, hold_out
from timm_convnextv2.data.paths.index import find_images
from timm_convnextv2.data.paths.listing import origins_of
from timm_convnextv2.data.paths.lists import read_list

FILES = ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png", "b/notes.txt", "c/1.png"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """In the folder we are in."""
    write_numbered(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(source):
    return [source.row_name(i) for i in range(len(source))]


def values(source):
    return [int(source[i][0, 0, 0]) for i in range(len(source))]


def test_several_folders(images):
    source = create_source(["b", "a"], in_chans=1)
    assert names(source) == ["b/3.png", "b/4.png", "a/1.png", "a/deep/2.png"]  # unique: with the folder
    assert values(source) == [30, 40, 10, 20]
    assert [source.path(i) for i in range(4)] == names(source) == [source.name(i) for i in range(4)]
    assert str(source.left) == "1 other file ignored: 1 .txt"
    train, apart = hold_out(source, 0.25, 1)
    assert sorted(values(train) + values(apart)) == [10, 20, 30, 40]
    again = pickle.loads(pickle.dumps(source))
    assert values(again) == values(source) and names(again) == names(source)
    rgb = source.reading(3, source.pixels)
    assert rgb[3].shape == rgb.read(3, lambda size: 1).shape == (3, 4, 4) and source[3].shape == (1, 4, 4)
    with pytest.raises(IndexError):
        source[4]


def test_one_folder_is_what_it_was(images):
    source = create_source("a", in_chans=1)
    assert type(source) is FolderSource and names(source) == ["1.png", "deep/2.png"] and source.groups is None
    assert type(create_source(["a"])) is FolderSource


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*/*.png", ["a/1.png", "b/3.png", "b/4.png", "c/1.png"]),
        ("**/*.png", ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png", "c/1.png"]),
        ("[ab]", ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png"]),  # folders: what is below them
        ("?/[!1].*", ["b/3.png", "b/4.png"]),
        ("a/**", ["1.png", "deep/2.png"]),  # names begin where the pattern does
    ],
)
def test_patterns(images, pattern, expected):
    assert names(create_source(pattern, in_chans=1)) == expected
    absolute = create_source(os.path.join(images, pattern), in_chans=1)
    assert names(absolute) == expected and values(absolute) == values(create_source(pattern, in_chans=1))


def test_a_folder_whose_name_looks_like_a_pattern(images):
    (images / "a").rename("[ab]")
    assert names(create_source("[ab]")) == ["1.png", "deep/2.png"]


def test_a_tar_beside_a_folder(images):
    with tarfile.open("t.tar", "w") as tar:
        tar.add("b/3.png", "3.png")
    source = create_source(["t.tar", "c"], in_chans=1)
    assert names(source) == ["t.tar/3.png", "c/1.png"] and values(source) == [30, 11]
    assert not source.has_files
    with pytest.raises(ValueError, match="--index .*tar file .t.tar"):
        find_images(["t.tar", "c"], index="x")


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
@pytest.mark.parametrize("base", [None, "b"])
def test_lists(images, kind, base):
    listed = ["../b/4.png", "../a/1.png", str(images / "c/1.png")]
    (images / "lists").mkdir()
    path = images / "lists" / f"some.{kind}"
    weights = {"txt": None, "csv": [1, 2, 1.5], "parquet": [1, 2, 1.5]}[kind]
    if kind == "txt":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(listed).encode() + b"\n\n")
    elif kind == "csv":
        rows = [f'{i},"{name}",{weight}' for i, (name, weight) in enumerate(zip(listed, weights, strict=True))]
        path.write_text("\n".join(["id,file_name,weight", *rows]))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"label": [1, 2, 3], "path": listed, "weight": weights}), path)
    source = create_source(ImagePaths.of(base, path), in_chans=1)
    assert names(source) == listed and values(source) == [40, 10, 11]
    assert (source.groups is None) == (kind == "txt")
    if weights:
        assert [(group.tolist(), weight) for group, weight in zip(source.groups.members, (1, 1.5, 2), strict=True)] == [
            ([0], 1), ([2], 1.5), ([1], 2),
        ]  # fmt: skip
    both = create_source(ImagePaths.of(base, [path, path]), in_chans=1, source_weights=(3, 1))
    assert len(both) == 6 and both.groups.shares[: len(both.groups.shares) // 2].sum() == 0.75


def test_names_that_are_no_text(images):
    name = b"a/\xff \xc3\xa4#.png"
    os.rename(b"a/1.png", name)
    (images / "list.txt").write_bytes(name + b"\n")
    source = create_source(ImagePaths.of(None, "list.txt"), in_chans=1)
    assert os.fsencode(source.path(0)) == name and values(source) == [10]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.txt", "\n\n", "is empty"),
        ("l.json", "[]", "expected a file that ends in .txt, .csv, .parquet"),
        ("l.csv", "", "no column of names: expected one of path, file_name, filename, name, it has none"),
        ("l.csv", "a/1.png\nb/3.png\n", "no column of names.*it has a/1.png"),
        ("l.csv", "path,weight\na,1\nb\n", "line 3: has 1 cells, expected 2"),
        ("l.csv", "path,weight\na,1\nb,0\n", "the weight of b is '0', expected a number above 0"),
        ("l.csv", "path,weight\na,x\n", "the weight of a is 'x'"),
        ("l.csv", "path,weight\n,1\n", "image 1 has no name"),
        ("l.txt", "a\0b\n", "has a NUL in it"),
        ("l.parquet", "no", "cannot be read"),
    ],
)
def test_lists_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_list(str(tmp_path / name))


@pytest.mark.parametrize(
    "data_dir, data_list, message",
    [
        ([], None, "No images given"),
        (["a", "absent"], None, "absent does not exist"),
        (["a", "b/3.png"], None, "is a file, expected a folder"),
        (["a", "b", "a/"], None, "images twice: a/ is a"),
        (["a/deep", "a"], None, "images twice: a/deep lies in a"),
        ("absent/*.png", None, "the folder absent does not exist"),
        (["a", "b"], "l.txt", "one folder that the list's names are relative to, got a b"),
        (None, "l.txt", "l.txt does not exist"),
    ],
)
def test_places_that_are_refused(images, data_dir, data_list, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        origins_of(data_dir, data_list)


def test_patterns_without_an_image(images):
    with pytest.raises(
        ValueError, match=r"b/\*.txt matches no image: 1 other file ignored: 1 .txt. Looked for .*\.png"
    ):
        create_source("b/*.txt")
    with pytest.raises(ValueError, match="--source-weights .* 1 .* 2"):
        create_source(["a", "b"], source_weights=[1])
    for paths, weights in ((ImagePaths.of(None, "x"), None), (None, [1]), (["a", "b"], None)):
        with pytest.raises(ValueError, match="embedded"):
            create_source(paths, DataSet("embedded"), source_weights=weights)


def test_missing_files_are_counted(images):
    (images / "l.txt").write_text("".join(f"{name}\n" for name in [*FILES[:4], "x.png", "y.png"]))
    told = []
    listing = find_images(None, "l.txt", max_missing=0.4, notify=told.append)
    assert len(listing.names) == 6
    assert told == ["2 of 6 listed images are missing, for example x.png, y.png; others stand in for them."]
    with pytest.raises(ValueError, match="2 of 6 .* x.png, y.png.*--max-bad-images .* 0.3"):
        find_images(None, "l.txt", max_missing=0.3)
    (images / "l.txt").write_text("gone.png\n" * 10_000)
    looked = []
    with pytest.raises(ValueError, match="4096 .*10000 "):  # not all are asked for
        find_images(None, "l.txt", max_missing=0.3, tick=looked.append)
    assert sum(looked) == 10_000 + 4096  # read, and looked for


def test_names_cost_their_length(images):
    (images / "l.txt").write_text("".join(f"{i:020d}.png\n" for i in range(100_000)))
    listing = find_images(None, "l.txt")
    assert len(pickle.dumps(listing)) < 100_000 * (24 + 8) + 10_000
    assert listing.names[77_777] == "00000000000000077777.png" and np.diff(listing.names.ends).max() == 24
