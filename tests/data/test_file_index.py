"""The index of image files: written whole, shared, found stale, refused for other places."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from drawn import write_numbered
from PIL import Image
from safetensors.numpy import load_file

from timm_convnextv2.data import ImagePaths, create_source
from timm_convnextv2.data.paths.index import file_sizes, find_images, stale
from timm_convnextv2.data.paths.walk import LeftOut
from timm_convnextv2.files import WriteError


@pytest.fixture
def images(tmp_path, monkeypatch):
    write_numbered(tmp_path, "a/1.png", "a/deep/2.png", "b/3.png", "b/notes.txt")
    (tmp_path / "l.csv").write_text("path,weight\nb/3.png,2\na/1.png,1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PLACES = [(["a", "b"], None), ("*/*.png", None), (None, "l.csv"), ("a", None)]


@pytest.mark.parametrize("data_dir, data_list", PLACES)
def test_an_index_is_what_a_scan_gives(images, data_dir, data_list):
    scanned = find_images(data_dir, data_list)
    told = []
    written = find_images(data_dir, data_list, index="i", notify=told.append)
    assert told == [f"Written: i, an index of {len(scanned.names)} images."]
    opened = find_images(data_dir, data_list, index="i", notify=told.append)
    assert len(told) == 1  # it is fresh
    for listing in (written, opened):
        assert [*listing.names] == [*scanned.names] and listing.counts == scanned.counts
        assert str(listing.left) == str(scanned.left)
        assert (listing.weights is None) == (scanned.weights is None)
        assert data_list is None or listing.weights.tolist() == [2, 1]
    content = load_file("i")  # others can read it
    assert content["sizes"].tolist() == file_sizes(scanned).tolist()
    assert content["names"].tobytes() == b"".join(os.fsencode(name) for name in scanned.names)
    sources = [create_source(ImagePaths.of(data_dir, data_list), in_chans=1, listing=x) for x in (scanned, opened)]
    first, second = ([(s.path(i), s.name(i), s[i].tolist()) for i in range(len(s))] for s in sources)
    assert first == second


def values(source, queue):
    queue.put([int(source[i].max()) for i in range(len(source))])


def test_workers_read_it_and_copy_nothing(images):
    (images / "l.txt").write_text("".join(f"{'x' * 100}{i}\n" for i in range(2000)))
    listing = find_images(None, "l.txt", index="big")
    assert len(pickle.dumps(listing.names)) < 500 and len(pickle.dumps(listing)) < 1500
    again = pickle.loads(pickle.dumps(listing.names.part(5, 10)))
    assert [*again] == [f"{'x' * 100}{i}" for i in range(5, 15)]
    source = create_source(["b", "a"], in_chans=1, listing=find_images(["b", "a"], index="i"))
    context = multiprocessing.get_context("fork")  # spawn is the pickle above
    queue = context.Queue()
    worker = context.Process(target=values, args=(source, queue))
    worker.start()
    assert queue.get(timeout=60) == [30, 10, 20]
    worker.join()


def test_stale(images):
    told = []
    find_images(["a", "b"], index="i")
    assert stale("i") == ""
    Image.new("L", (4, 4), 9).save("a/deep/9.png")
    os.utime("a/deep", ns=(1, 1))  # a clock that is coarse
    listing = find_images(["a", "b"], index="i", notify=told.append)
    assert len(listing.names) == 3  # as it was written
    (text,) = told
    assert f"1 of 3 folders and lists have changed, for example {images}/a/deep" in text
    assert text.startswith("--index i is stale") and "remove it" in text
    Path("i").unlink()
    assert len(find_images(["a", "b"], index="i").names) == 4


@pytest.mark.parametrize("data_dir, data_list", PLACES)
def test_what_makes_it_stale(images, monkeypatch, data_dir, data_list):
    find_images(data_dir, data_list, index="a/i")
    assert stale("a/i") == ""  # though it is in a folder of images itself
    changed = Path(data_list or "a")
    time = changed.stat().st_mtime_ns
    os.utime(changed, ns=(time, time + 10**6))
    assert "have changed" in stale("a/i")
    os.utime(changed, ns=(time, time))
    assert stale("a/i") == ""
    monkeypatch.setattr("timm_convnextv2.data.paths.index.image_extensions", lambda: (".png", ".new"))
    assert "other extensions count as images now: " in stale("a/i") and ".new" in stale("a/i")


def test_refused(images):
    find_images("a", index="i")
    for places in (("b", None), (["a", "b"], None), (None, "l.csv")):
        with pytest.raises(ValueError, match=f"i .*{images}/a.* not .*{images}/"):
            find_images(*places, index="i")
    content = Path("i").read_bytes()
    for damaged in (content[:-3], content[:5], b"", b"x" * 300, content + b"0"):
        Path("i").write_bytes(damaged)
        with pytest.raises(ValueError, match="--index i "):
            find_images("a", index="i")
    with pytest.raises(ValueError, match="--index a "):
        find_images("a", index="a")
    with pytest.raises(WriteError, match="'absent/i'"):
        find_images("a", index="absent/i")


def test_replaced_while_in_use(images):
    names = pickle.dumps(find_images("a", index="i").names)
    Path("i").unlink()
    with pytest.raises(ValueError, match="--index i .*No such file"):
        pickle.loads(names)
    find_images("a", index="i")
    with pytest.raises(ValueError, match="i was replaced"):
        pickle.loads(names)


def test_missing_files_are_remembered(images):
    with open("l.csv", "a") as file:
        file.write("gone.png,1\n")
    with pytest.raises(ValueError, match="1 of 3 .*gone.png"):
        find_images(None, "l.csv", index="i", max_missing=0.1)
    assert not Path("i").exists()
    find_images(None, "l.csv", index="i")
    told = []
    find_images(None, "l.csv", index="i", max_missing=0.5, notify=told.append)
    assert "1 of 3" in told[0] and load_file("i")["sizes"][2] == -1
    with pytest.raises(ValueError, match="0.1"):
        find_images(None, "l.csv", index="i", max_missing=0.1)


def test_nothing_is_left_of_an_index_that_fails(images, monkeypatch):
    def fail(*args):
        Path(args[1]).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_convnextv2.data.paths.index.save_file", fail)
    with pytest.raises(WriteError, match="'i'.*No space left on device"):
        find_images("a", index="i")
    assert not Path("i").exists() and not [*Path(".").glob(".i*")]


def test_left_out_is_merged():
    left, other = LeftOut(), LeftOut()
    left.ignored[".txt"], other.ignored[".txt"] = 2, 3
    other.add_special("x", "FIFO")
    left.merge(other)
    assert str(left) == "5 other files ignored: 5 .txt; 1 not opened, no regular file: x (FIFO)"
    assert np.iinfo(np.int64).max > left.num_special == 1
