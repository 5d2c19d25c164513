"""Where image files are: folders, patterns, tar files and lists as one source, and the index of their names."""

import multiprocessing
import os
import pickle
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import write_numbered
from PIL import Image
from safetensors.numpy import load_file

from timm_convnextv2.data import DataSet, FolderSource, ImagePaths, create_source, hold_out
from timm_convnextv2.data.paths.find import file_sizes, find_files
from timm_convnextv2.data.paths.index import Index
from timm_convnextv2.data.paths.listing import list_files, origins_of
from timm_convnextv2.data.paths.lists import read_list
from timm_convnextv2.files import WriteError
from timm_convnextv2.runs.group import Processes

FILES = ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png", "b/notes.txt", "c/1.png"]


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    """In the folder we are in."""
    write_numbered(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(data_dir=None, data_list=None, index=None, most_missing=1.0, **more):
    return find_files(replace(ImagePaths.of(data_dir, data_list), index=index), "", most_missing, Processes(), **more)


def rows(source):
    return [source.row_name(i) for i in range(len(source))]


def values(source):
    return [int(source[i][0, 0, 0]) for i in range(len(source))]


# ------------------------------------------------------------------------------------------- folders, patterns, tars


def test_several_folders():
    source = create_source(["b", "a"], in_chans=1)
    assert rows(source) == ["b/3.png", "b/4.png", "a/1.png", "a/deep/2.png"]  # unique: with the folder
    assert values(source) == [30, 40, 10, 20]
    assert [source.path(i) for i in range(4)] == rows(source) == [source.name(i) for i in range(4)]
    assert str(source.left) == "1 other file ignored: 1 .txt"
    train, apart = hold_out(source, 0.25, 1)
    assert sorted(values(train) + values(apart)) == [10, 20, 30, 40]
    again = pickle.loads(pickle.dumps(source))
    assert values(again) == values(source) and rows(again) == rows(source)
    rgb = source.reading(3, source.pixels)
    assert rgb[3].shape == rgb.read(3, lambda size: 1).shape == (3, 4, 4) and source[3].shape == (1, 4, 4)
    with pytest.raises(IndexError):
        source[4]
    one = create_source(["a"], in_chans=1)
    assert type(one) is FolderSource and rows(one) == ["1.png", "deep/2.png"] and one.groups is None


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*/*.png", ["a/1.png", "b/3.png", "b/4.png", "c/1.png"]),
        ("**/*.png", ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png", "c/1.png"]),
        ("[ab]", ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png"]),  # folders: the images below them
        ("?/[!1].*", ["b/3.png", "b/4.png"]),
        ("a/**", ["1.png", "deep/2.png"]),  # names begin where the pattern does
    ],
)
def test_patterns(images, pattern, expected):
    assert rows(create_source(pattern, in_chans=1)) == expected
    absolute = create_source(os.path.join(images, pattern), in_chans=1)
    assert rows(absolute) == expected and values(absolute) == values(create_source(pattern, in_chans=1))


def test_a_folder_whose_name_looks_like_a_pattern(images):
    (images / "a").rename("[ab]")
    assert rows(create_source("[ab]")) == ["1.png", "deep/2.png"]


def test_a_tar_beside_a_folder():
    with tarfile.open("t.tar", "w") as tar:
        tar.add("b/3.png", "3.png")
    source = create_source(["t.tar", "c"], in_chans=1)
    assert rows(source) == ["t.tar/3.png", "c/1.png"] and values(source) == [30, 11]
    assert not source.has_files
    with pytest.raises(ValueError, match="--index .*tar file .t.tar"):
        find(["t.tar", "c"], index="x")


@pytest.mark.parametrize(
    "data_dir, data_list, message",
    [
        ([], None, "No images given"),
        (["a", "absent"], None, "absent does not exist"),
        (["a", "b/3.png"], None, "b/3.png is a file"),
        (["a", "b", "a/"], None, "images twice: a/ is a"),
        (["a/deep", "a"], None, "images twice: a/deep lies in a"),
        ("absent/*.png", None, "the folder absent does not exist"),
        (["a", "b"], "l.txt", "one folder that the list's names are relative to, got a b"),
        (None, "l.txt", "l.txt does not exist"),
    ],
)
def test_origins_that_are_refused(data_dir, data_list, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        origins_of(data_dir, data_list)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"b/\*.txt .*: 1 other file ignored: 1 .txt. .*\.png"):
        create_source("b/*.txt")
    with pytest.raises(ValueError, match="--source-weights .* 1 .* 2"):
        create_source(["a", "b"], source_weights=[1])
    for paths, weights in ((ImagePaths.of(None, "x"), None), (None, [1]), (["a", "b"], None)):
        with pytest.raises(ValueError, match="demo"):
            create_source(paths, DataSet("demo"), source_weights=weights)


# ------------------------------------------------------------------------------------------------------------- lists


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
        lines = [f'{i},"{name}",{weight}' for i, (name, weight) in enumerate(zip(listed, weights, strict=True))]
        path.write_text("\n".join(["id,file_name,weight", *lines]))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"label": [1, 2, 3], "path": listed, "weight": weights}), path)
    source = create_source(ImagePaths.of(base, path), in_chans=1)
    assert rows(source) == listed and values(source) == [40, 10, 11]
    assert (source.groups is None) == (kind == "txt")
    if weights:
        assert [group.tolist() for group in source.groups.members] == [[0], [2], [1]]
        assert source.groups.weights == [1, 1.5, 2]
    both = create_source(ImagePaths.of(base, [path, path]), in_chans=1, source_weights=(3, 1))
    assert len(both) == 6 and both.groups.shares[: len(both.groups.shares) // 2].sum() == 0.75


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    "name, content", [("l.txt", "b/3.png\r\na/1.png\r\n"), ("l.csv", "name\r\nb/3.png\r\na/1.png\r\n")]
)
def test_lists_in_utf16_as_a_shell_writes_them(name, content, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    Path(name).write_bytes((mark + content).encode(encoding))
    assert values(create_source(ImagePaths.of(None, name), in_chans=1)) == [30, 10]


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
        ("l.txt", "a\0b\n", "NUL.*UTF-8"),
        ("l.parquet", "no", "cannot be read"),
    ],
)
def test_lists_that_are_refused(name, content, message):
    Path(name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_list(name)


def test_missing_files_are_counted(capsys):
    Path("l.txt").write_text("".join(f"{name}\n" for name in [*FILES[:4], "x.png", "y.png"]))
    assert find(None, "l.txt", most_missing=0.4).count == 6
    assert capsys.readouterr().err == "2 of 6 listed images are missing, for example x.png, y.png.\n"
    with pytest.raises(ValueError, match="2 of 6 .* x.png, y.png.*--max-bad-images .* 0.3"):
        find(None, "l.txt", most_missing=0.3)
    looked, many = [], list_files(origins_of(None, "l.txt"))
    many.names[0] = type(many.names[0]).collect([b"gone.png"] * 10_000)
    assert len(file_sizes(many, looked.append, 3000)) == sum(looked) == 4096  # stops early


def test_names_cost_their_length():
    Path("l.txt").write_text("".join(f"{i:020d}.png\n" for i in range(100_000)))
    listing = list_files(origins_of(None, "l.txt"))
    assert len(pickle.dumps(listing)) < 100_000 * (24 + 8) + 10_000
    assert listing.names[0][77_777] == "00000000000000077777.png" == listing.path(77_777)


# ------------------------------------------------------------------------------------------------------------- index


@pytest.fixture
def weighted(images):
    (images / "l.csv").write_text("path,weight\nb/3.png,2\na/1.png,1\n")


ORIGINS = [(["a", "b"], None), ("*/*.png", None), (None, "l.csv"), ("a", None)]


@pytest.mark.parametrize("data_dir, data_list", ORIGINS)
def test_an_index_gives_the_files_of_a_listing(weighted, data_dir, data_list, capsys):
    scanned, written = find(data_dir, data_list), find(data_dir, data_list, index="i")
    assert capsys.readouterr().err == f"Written: i, an index of {scanned.count} images.\n"
    opened = find(data_dir, data_list, index="i")
    assert capsys.readouterr().err == ""  # it is fresh
    for listing in (written, opened):
        assert [*map(list, listing.names)] == [*map(list, scanned.names)] and str(listing.left) == str(scanned.left)
        assert [*listing.paths()] == [listing.path(i) for i in range(listing.count)] == [*scanned.paths()]
        assert (listing.weights is None) == (scanned.weights is None)
        assert data_list is None or listing.weights.tolist() == [2, 1]
    content = load_file("i")  # other programs can read it
    assert content["sizes"].tolist() == file_sizes(scanned).tolist()
    assert content["names"].tobytes() == b"".join(os.fsencode(name) for names in scanned.names for name in names)
    sources = [create_source(ImagePaths.of(data_dir, data_list), in_chans=1, listing=x) for x in (scanned, opened)]
    first, second = ([(s.path(i), s.name(i), s[i].tolist()) for i in range(len(s))] for s in sources)
    assert first == second


def put_values(source, queue):
    queue.put(values(source))


def test_workers_read_it_and_copy_nothing(images):
    (images / "l.txt").write_text("".join(f"{'x' * 100}{i}\n" for i in range(2000)))
    (names,) = find(None, "l.txt", index="big").names
    assert len(pickle.dumps(names)) < 500 and pickle.loads(pickle.dumps(names))[7] == f"{'x' * 100}7"
    source = create_source(["b", "a"], in_chans=1, listing=find(["b", "a"], index="i"))
    context = multiprocessing.get_context("fork")  # spawn is the pickle above
    queue = context.Queue()
    worker = context.Process(target=put_values, args=(source, queue))
    worker.start()
    assert queue.get(timeout=60) == [30, 40, 10, 20]
    worker.join()


def test_stale(images, capsys):
    find(["a", "b"], index="i")
    assert Index("i").changes() == ""
    Image.new("L", (4, 4), 9).save("a/deep/9.png")
    os.utime("a/deep", ns=(1, 1))  # a clock that is coarse
    capsys.readouterr()
    assert find(["a", "b"], index="i").count == 4  # as it was written
    text = capsys.readouterr().err
    assert f"1 of 3 folders and lists have changed, for example {images}/a/deep" in text
    assert text.startswith("--index i is stale") and "remove it" in text
    Path("i").unlink()
    assert find(["a", "b"], index="i").count == 5


@pytest.mark.parametrize("data_dir, data_list", ORIGINS)
def test_changes_that_make_it_stale(weighted, monkeypatch, data_dir, data_list):
    find(data_dir, data_list, index="a/i")
    assert Index("a/i").changes() == ""  # though it is in a folder of images itself
    changed = Path(data_list or "a")
    time = changed.stat().st_mtime_ns
    os.utime(changed, ns=(time, time + 10**6))
    assert "have changed" in Index("a/i").changes()
    os.utime(changed, ns=(time, time))
    assert Index("a/i").changes() == ""
    monkeypatch.setattr("timm_convnextv2.data.paths.index.image_extensions", lambda: (".png", ".new"))
    assert ".new" in Index("a/i").changes()


def test_an_index_that_is_refused(images, weighted):
    names = pickle.dumps(find("a", index="i").names)
    for origins in (("b", None), (["a", "b"], None), (None, "l.csv")):
        with pytest.raises(ValueError, match=f"i .*{images}/a.* not .*{images}/"):
            find(*origins, index="i")
    content = Path("i").read_bytes()
    for damaged in (content[:-3], content[:5], b"", b"x" * 300, content + b"0"):
        Path("i").write_bytes(damaged)
        with pytest.raises(ValueError, match="--index i "):
            find("a", index="i")
    with pytest.raises(ValueError, match="--index a "):
        find("a", index="a")
    with pytest.raises(WriteError, match="'absent/i'"):
        find("a", index="absent/i")
    Path("i").unlink()
    with pytest.raises(ValueError, match="--index i .*No such file"):
        pickle.loads(names)
    find("a", index="i")
    with pytest.raises(ValueError, match="i was replaced"):
        pickle.loads(names)


def test_missing_files_are_remembered(weighted, capsys):
    with open("l.csv", "a") as file:
        file.write("gone.png,1\n")
    with pytest.raises(ValueError, match="1 of 3 .*gone.png"):
        find(None, "l.csv", index="i", most_missing=0.1)
    assert not Path("i").exists()
    find(None, "l.csv", index="i")
    find(None, "l.csv", index="i", most_missing=0.5)
    assert capsys.readouterr().err.count("1 of 3") == 2 and load_file("i")["sizes"][2] == -1
    with pytest.raises(ValueError, match="0.1"):
        find(None, "l.csv", index="i", most_missing=0.1)


def test_nothing_is_left_of_an_index_that_fails(monkeypatch):
    def fail(*args):
        Path(args[1]).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_convnextv2.data.paths.index.save_file", fail)
    with pytest.raises(WriteError, match="'i'.*No space left on device"):
        find("a", index="i")
    assert not Path("i").exists() and not [*Path(".").glob(".i*")]


def test_a_mutated_index_is_refused(weighted):
    """Whatever changes, it is one documented error: 200 seeded mutations of bits, stretches, cuts and insertions."""
    find(["a", "b"], index="i")
    content, rng = Path("i").read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for kind in range(200):
        changed = bytearray(content)
        at = int(rng.integers(header if kind % 2 else len(content)))
        if kind % 8 < 4:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind % 8 < 6:
            changed[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(9)))
        else:
            changed = changed[:at]
        if changed == content:
            continue
        Path("i").write_bytes(changed)
        with pytest.raises(ValueError, match="--index i "):
            find(["a", "b"], index="i")
