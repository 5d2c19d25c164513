"""`timm-convnextv2 check`: every kind of fault is found, a sound folder has none, and what is there is counted."""

import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from timm_convnextv2.commands import check
from timm_convnextv2.commands import main as cli
from timm_convnextv2.data import DemoSource

SIZE = 48


@pytest.fixture()
def folder(tmp_path):
    """A folder of sound images."""
    path = tmp_path / "data"
    path.mkdir()
    source = DemoSource(6, SIZE)
    for i in range(6):
        Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    return path


def run(folder, capsys, status, *more):
    words = ["--img-size", "40", "-j", "0", "--output", str(folder.parent / "c.json"), "--overwrite", *more]
    assert cli.main(["check", str(folder), *words]) == status
    printed = capsys.readouterr()
    content = json.loads((folder.parent / "c.json").read_text()) if status < 2 else None
    return content, printed


# what makes the file x, the kind of the finding, and what is printed of it
BANDS, NAN = np.random.default_rng(0).random((5, SIZE, SIZE), np.float32), np.full((3, SIZE, SIZE), np.nan, np.float32)
FAULTS = {
    "flat": (lambda f: Image.new("RGB", (SIZE, SIZE), (9, 8, 7)).save(f / "x.png"), "flat", "same value"),
    "small": (lambda f: Image.open(f / "1.png").crop((0, 0, 39, 44)).save(f / "x.png"), "small", "44 x 39 .* 40"),
    "double": (lambda f: shutil.copy(f / "1.png", f / "x.png"), "duplicate", "1.png"),
    "cut": (lambda f: (f / "x.png").write_bytes((f / "1.png").read_bytes()[:700]), "unreadable", "truncated"),
    "text": (lambda f: (f / "x.png").write_text("no image"), "unreadable", "no format"),
    "NaN": (lambda f: np.save(f / "x.npy", NAN), "unreadable", "NaN"),
    "bands": (lambda f: np.save(f / "x.npy", BANDS), "differs", "5 channels of float32, .* 3 of uint8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_nothing_else(folder, capsys, fault):
    make, kind, words = FAULTS[fault]
    make(folder)
    content, printed = run(folder, capsys, 1)
    names = [f["file"] for f in content["findings"] if f["kind"] == kind]
    assert [name.rpartition("/")[2].partition(".")[0] for name in names] == ["x"]
    others = {f["kind"] for f in content["findings"]} - {kind}
    assert others <= ({"differs"} if fault == "NaN" else set())
    assert content["found"][kind] == 1 and content["files"] == 7
    assert re.search(f"{kind}: .*x.*{words}", printed.out), printed.out
    assert Image.open(folder.parent / "c.png").size[0] > 300


def test_rare_findings_are_shown_among_many(folder, capsys, monkeypatch):
    """Sixty small images hide neither the corrupt one nor the duplicate, which stands beside its partner."""
    for i in range(60):
        Image.new("L", (20, 20), i).resize((20, 21)).save(folder / f"small{i}.png")
    (folder / "z.png").write_text("no image")
    shutil.copy(folder / "1.png", folder / "zz.png")
    drawn = []
    monkeypatch.setattr(check, "save_contact_sheet", lambda sheet, path, title: drawn.extend([*sheet, title]))
    content, printed = run(folder, capsys, 1)
    kinds = [line.partition(": ")[0] for line in printed.out.splitlines()]
    assert kinds.count("unreadable") == kinds.count("duplicate") == 1
    assert f"and {len(content['findings']) - 10} more" in printed.out
    labels = [text.split("\n") for _, text in drawn[:-1]]
    at = labels.index(["duplicate", "zz.png"])
    assert labels[at + 1] == ["the same as", "1.png"] and np.array_equal(drawn[at][0], drawn[at + 1][0])
    assert ["unreadable", "z.png"] in labels and len(labels) == 48 + 1
    assert drawn[-1].startswith(f"48 of {len(content['findings'])} findings")


def test_a_sound_folder_has_no_findings(folder, capsys):
    (folder / "notes.txt").write_text("x")
    content, printed = run(folder, capsys, 0, "-j", "2")
    assert content["findings"] == [] and content["formats"] == {"PNG": 6} and content["types"] == {"uint8": 6}
    assert content["height"] == [SIZE, SIZE, SIZE] and content["ignored"] == {".txt": 1}
    assert "Found: none" in printed.out and not (folder.parent / "c.png").exists()


def test_near_duplicates_where_imagehash_is_installed(folder, capsys, monkeypatch):
    """With a stand-in for the package: a hash of the mean colour, coarse."""
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert "pip install imagehash" in run(folder, capsys, 0)[1].out
    stand_in = types.SimpleNamespace(phash=lambda image: np.asarray(image).mean((0, 1)).round(-1).tolist())
    monkeypatch.setitem(sys.modules, "imagehash", stand_in)
    array = np.asarray(Image.open(folder / "2.png")).copy()
    array[0, 0] ^= 1
    Image.fromarray(array).save(folder / "x.png")
    drawn = []
    draw = check.save_contact_sheet
    monkeypatch.setattr(check, "save_contact_sheet", lambda sheet, *rest: drawn.extend(sheet) or draw(sheet, *rest))
    content, printed = run(folder, capsys, 1)
    assert [text.split("\n") for _, text in drawn] == [["near duplicate", "x.png"], ["looks like", "2.png"]]
    (folder / "x.png").unlink()  # the figure of an earlier check does not stay
    assert (folder.parent / "c.png").exists() and run(folder, capsys, 0) and not (folder.parent / "c.png").exists()
    assert content["found"] == {"near duplicate": 1} and "looks like" in content["findings"][0]["why"]
    assert "pip install" not in printed.out


def test_mistakes_are_one_message(folder, capsys, tmp_path):
    for words in (["check"], ["check", str(tmp_path / "none")], ["check", str(folder), "--output", "x.txt"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("error:") == 1
    assert cli.main(["check", str(folder), "--output", str(folder / "c.json")]) == 2
    assert "would lie among the images" in capsys.readouterr().err
