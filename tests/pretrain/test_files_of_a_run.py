"""Runs on several folders and lists: weights, a stop in mid-epoch, an index, and what processes share."""

import os
import pickle
import signal
from pathlib import Path

import pytest
import yaml
from runs import ERROR, TINY, assert_same_end, image_folder, load, run, stop

from timm_convnextv2.data.config import ImagePaths
from timm_convnextv2.data.paths import find, listing
from timm_convnextv2.runs.group import Processes


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "a", 13)
    image_folder(tmp_path / "b", 3)
    return TINY + ["--data-dir", "a", "b"]


def test_weights_and_a_stop_in_mid_epoch(folders, tmp_path, no_images, capsys):
    data = [*folders, "--source-weights", "1", "3", "--holdout", "0.07", "--lr", "1e-2"]
    whole = run(tmp_path / "o/whole", epochs=2, data=data)
    printed = capsys.readouterr().out
    assert "15 images of 3 x 32 x 32" in printed  # one is held out
    assert "b: 3 images, 75.0% of an epoch, each drawn 3 times per epoch" in printed
    settings = yaml.safe_load((whole / "args.yaml").read_text())
    assert settings["data_dir"] == ["a", "b"] and settings["source_weights"] == [1, 3]
    for update in (1, 99):
        stop(tmp_path / "o/r", update, "--resume", "auto", number=signal.SIGUSR1, epochs=2, data=data)
        if update == 1:
            other = [word if word != "3" else "4" for word in data]
            run(tmp_path / "o/r", "--resume", "auto", epochs=2, data=other, status=2)
            assert "order of the images differs in source_weights: [1.0, 3.0] there" in capsys.readouterr().err
    assert_same_end(tmp_path / "o/r", whole)


def test_a_list_with_missing_files_and_an_index(folders, tmp_path, no_images, capsys):
    names = [f"a/{i:03d}.png" for i in range(13)] + ["a/gone.png", "b/000.png"]
    Path("l.txt").write_text("\n".join(names))
    data = [*TINY, "--data-list", "l.txt", "--index", "o/i"]
    Path("o").mkdir()
    run(tmp_path / "o/r", data=data, status=2)
    error = capsys.readouterr().err
    assert error.startswith(f"{ERROR}1 of 15 listed images are missing, for example a/gone.png; --max-bad-images")
    assert not Path("o/r").exists() and not Path("o/i").exists()
    out = run(tmp_path / "o/r", "--max-bad-images", "0.1", data=data)
    assert "Written: o/i, an index of 15 images." in capsys.readouterr().err
    assert "Data | l.txt, 15 images" in (out / "encoder/README.md").read_text()
    assert {*load(out)["progress"]["bad_images"]} <= {"a/gone.png"}
    Path("b").rename("c")
    other = [*TINY, "--data-dir", "a", "--index", "o/i"]
    run(tmp_path / "o/r", "--dry-run", "--resume", "auto", data=other, status=2)
    assert f"o/i is an index of {tmp_path}/l.txt, not of {tmp_path}/a" in capsys.readouterr().err
    run(tmp_path / "o/s", data=[*TINY, "--dataset", "demo", "--index", "o/i"], status=2)
    error = capsys.readouterr().err
    assert "--index" in error and "--dataset demo" in error


def test_names_that_are_not_utf8(tmp_path):
    """A run on such a folder, in such a folder, ends and can be resumed."""
    name = os.fsdecode(b"im\xffages")
    image_folder(tmp_path / name, 4)
    data = [*TINY, "--data-dir", str(tmp_path / name), "--holdout", "0.25", "--batch-size", "2"]
    out = run(tmp_path / os.fsdecode(b"o\xff/r\xff"), data=data)
    assert yaml.safe_load((out / "args.yaml").read_text())["data_dir"] == [str(tmp_path / name)]
    assert load(out)["progress"] and "im" in (out / "encoder/README.md").read_text()
    assert (out / "report.html").stat().st_size > 1000
    run(out, "--resume", "auto", epochs=2, data=data)


class Other:
    """A process that is not the first; it receives what the first one sends."""

    def __init__(self, received=None, others=()):
        self.primary, self.received, self.others = False, received, others

    def gather(self, items):
        return [*(self.others or items), *items]

    def share(self, value):
        assert value == (None, None)
        return pickle.loads(pickle.dumps(self.received))


def find_files(world, *data_dir, index=None):
    return find.find_files(ImagePaths(data_dir, index=index), "", 0.01, world)


def test_only_the_first_process_lists(folders, tmp_path, monkeypatch):
    found = listing.list_files(listing.origins_of(["a", "b"]))
    os.symlink("a", "a2")
    with monkeypatch.context() as patch:
        patch.setattr(find, "_find", dict)  # takes none of the arguments
        received = find_files(Other((found, None)), "a2", "b")
        assert [*map(list, received.names)] == [*map(list, found.names)]
        assert received.origins[0].root == "a2"  # as this process names it
        with pytest.raises(ValueError, match="^the first fails$"):
            find_files(Other((None, ValueError("the first fails"))), "a", "b")
    find_files(Processes(), "a", index="i")
    assert find_files(Other((None, None)), "a", index="i").count == 13
    elsewhere = find._identity(listing.origins_of("b"))  # a machine with a copy of its own
    assert find_files(Other(others=[elsewhere]), "a").count == 13
