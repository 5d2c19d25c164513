"""Labelled images without a split of their own: class folders and a CSV are split once, for every command."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from folders import CLASSES, write_images
from helpers import run_python

from timm_convnextv2.commands import validate
from timm_convnextv2.commands.finetune import main
from timm_convnextv2.data.labelled import SPLIT_FILE, Row, kept_rows, read_labelled, write_split
from timm_convnextv2.features import open_labelled


@pytest.fixture
def flat(tmp_path):
    """CLASS/0.png to 7.png in the working folder of the commands."""
    write_images(tmp_path / "flat")
    return Path("flat")


def split_of(folder):
    """The lines of a run's split file: image (its real path), label, part."""
    with open(folder / SPLIT_FILE, newline="") as file:
        return [(os.path.realpath(folder / r["name"]), r["label"], r["split"]) for r in csv.DictReader(file)]


def write_table(path, rows, columns="name,label"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def labels(flat, more=lambda label, i: ""):
    return [f"{flat}/{label}/{i}.png,{label}{more(label, i)}" for label in CLASSES for i in range(8)]


def test_a_split_is_read_as_it_was_written(tmp_path):
    """Labels and names that look like formulas, and names of any bytes."""
    names = ["=1+1", "-x", "-1", "'=a", os.fsdecode(b"caf\xe9")]
    rows = [Row(str(tmp_path / f"{name}.png"), (f"{name[:-1]}y",)) for name in names]
    for row in rows:
        Path(row.path).touch()
    write_split(tmp_path / SPLIT_FILE, rows[:3], rows[3:])
    text = (tmp_path / SPLIT_FILE).read_text(errors="surrogateescape")
    assert not re.search(r"(^|,)[=+@-](?![\d.]+,)", text, flags=re.M)  # a spreadsheet runs nothing
    found = kept_rows(tmp_path / SPLIT_FILE, [row.path for row in rows])
    assert [row[:2] for row in found] == [row[:2] for row in rows]
    assert [row.part for row in found] == ["train"] * 3 + ["validation"] * 2


@pytest.mark.parametrize("kind", ["folder", "csv", "csv with split"])
def test_data_without_validation_images_is_split(run, flat, tmp_path, capsys, kind):
    place = flat
    if kind == "csv":
        place = write_table(tmp_path / "labels.csv", labels(flat))
    elif kind == "csv with split":
        rows = labels(flat, lambda label, i: f",{'val' if i < 2 else 'train'}")
        place = write_table(tmp_path / "labels.csv", rows, "name,label,split")
    assert run(data=place, experiment="x")["args"]["num_classes"] == 3
    out = capsys.readouterr().out
    assert f"{place} [train]: 18 images of 3 classes: a 6, b 6, c 6" in out
    assert f"{place} [validation]: 6 images of 3 classes: a 2, b 2, c 2" in out
    assert "The split is kept in out/x/split.csv." in out
    assert "Written to out/x: model/, split.csv, label_names.json" in out
    assert ("--seed 42 splits it" in out) == (kind != "csv with split")
    found = split_of(tmp_path / "out" / "x")
    assert len(found) == 24 and all(label == Path(path).parent.name for path, label, _ in found)
    if kind == "csv with split":
        assert {path for path, _, part in found if part == "validation"} == {
            str(tmp_path / flat / label / f"{i}.png") for label in CLASSES for i in range(2)
        }
    # the script gets exactly these images
    for name in ("train", "validation"):
        script = sys.modules["timm_train_script"]
        samples = script.create_dataset("", root=str(place), split=name, class_map="").reader.samples  # type: ignore
        assert [(os.path.realpath(p), CLASSES[i], name) for p, i in samples] == [r for r in found if r[2] == name]
    # `evaluate` makes the same split, and follows the file
    for other in (open_labelled(place, seed=42), open_labelled(tmp_path / "out" / "x" / SPLIT_FILE, seed=7)):
        for name, part in (("train", other.train), ("validation", other.test)):
            assert {os.path.realpath(p) for p in part.source.paths} == {path for path, _, side in found if side == name}


def test_a_dry_run_keeps_no_split(command, flat, tmp_path, capsys):
    assert main(command("--dry-run", data=flat)) == 0
    assert "The split would be kept in out/x/split.csv." in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_recipes_do_not_start_more_workers_than_cores(run, flat, monkeypatch):
    monkeypatch.setattr("timm_convnextv2.finetune.options.usable_cores", lambda: 2)
    assert run(data=flat, recipe="small-data")["args"]["workers"] == 2
    assert run("--workers", "3", data=flat, recipe="small-data", experiment="y")["args"]["workers"] == 3


def test_the_split_follows_seed_and_share(run, flat, tmp_path):
    for name, words in {"x": (), "same": (), "other": ("--seed", "1"), "half": ("--validation-share", "0.5")}.items():
        run(*words, data=flat, experiment=name)
    x, same, other, half = (split_of(tmp_path / "out" / name) for name in ("x", "same", "other", "half"))
    assert x == same != other and len(other) == 24
    assert [part for *_, part in half].count("validation") == 12


def test_groups_stay_together(run, tmp_path):
    for label in CLASSES:
        write_images(tmp_path / "data" / label, classes=[f"{label}{i}" for i in range(4)], n=3)
    run("--group-by", "parent-folder", data=Path("data"))
    found = split_of(tmp_path / "out" / "x")
    assert {label for _, label, _ in found} == {*CLASSES}
    groups = {side: {Path(p).parent.name for p, _, part in found if part == side} for side in ("train", "validation")}
    assert len(groups["train"]) == 9 and len(groups["validation"]) == 3 and not groups["train"] & groups["validation"]


def resumable(folder, encoder):
    """Gives the stand-in's checkpoint the weights of a model, so that it can be resumed."""
    content = torch.load(folder / "last.pth.tar", weights_only=False)
    content["state_dict"] = timm.create_model(f"local-dir:{encoder}", num_classes=3).state_dict()
    torch.save(content, folder / "last.pth.tar")
    shutil.rmtree(folder / "model")
    return ["--resume", str(folder / "last.pth.tar"), "--license", "mit"]


def test_a_resumed_run_keeps_its_split(run, refused, flat, tmp_path, encoder, capsys):
    run(data=flat)
    folder = tmp_path / "out" / "x"
    before = split_of(folder)
    words = resumable(folder, encoder)
    write_images(tmp_path / "new", n=1)
    for label in CLASSES:
        shutil.copy(tmp_path / "new" / label / "0.png", tmp_path / flat / label / "new.png")
    run(*words, "--seed", "1", data=flat)
    out = capsys.readouterr().out
    assert f"split as in {folder / SPLIT_FILE}; 3 other images left out" in out and "[train]: 18 images" in out
    assert split_of(folder) == before
    assert f"None of the 3 images of new is in {folder / SPLIT_FILE}" in refused(*words, data=Path("new"))


@pytest.mark.parametrize(
    "place, words, targets, said",
    [
        ("flat", (), [0, 0, 1, 1, 2, 2], "Measured: 6 validation images of {run}/split.csv; 18 other images of flat"),
        ("flat", ("--split", "train"), [0] * 6 + [1] * 6 + [2] * 6, "Measured: 18 training images of {run}/split.csv"),
        ("labels.csv", (), [0, 0, 1, 1, 2, 2], "Measured: 6 validation images of {run}/split.csv; 18 other images"),
        ("out/x/split.csv", (), [0, 0, 1, 1, 2, 2], "Measured: 6 validation images of out/x/split.csv"),
        ("other", (), [0, 1, 2], "None of the 3 images is in {run}/split.csv: all are measured."),
    ],
)
def test_validate_measures_the_validation_images_of_the_run(model, flat, capsys, place, words, targets, said):
    data = open_labelled(flat)
    sides = ([r for r in read_labelled(flat)[0] if r.path in part.source.paths] for part in (data.train, data.test))
    write_split(model.parent / SPLIT_FILE, *sides)
    write_table(Path("labels.csv"), labels(flat))
    write_images(Path("other"), n=1)
    assert validate.main([str(model), "--data-dir", place, "--device", "cpu", *words]) == 0
    assert json.loads(Path("seen.json").read_text())["targets"] == targets
    assert said.format(run=model.parent) in capsys.readouterr().out


def one_image(flat):
    for i in range(1, 8):
        (flat / "b" / f"{i}.png").unlink()
    return flat


def halves(flat):
    for name in ("train", "validation"):
        shutil.copytree(flat, Path("halves") / name)
    return Path("halves"), "--validation-share", "0.5"


def table(columns, *rows):
    return lambda flat: write_table(Path("l.csv"), [f"flat/{row}" for row in rows], columns)


PLAIN, SPLIT = "name,label", "name,label,split"
BAD = {
    "1 of 3 classes has 1 image: b. Each needs two or more": one_image,
    "1 image with several labels (flat/a/0.png has the labels a;b)": table(PLAIN, "a/0.png,a;b", "b/1.png,b"),
    "line 3: split is 'tst', expected train or validation": table(SPLIT, "a/0.png,a,train", "b/0.png,b,tst"),
    "only 'l.csv/train' has a (1); only 'l.csv/val' has b (1)": table(SPLIT, "a/0.png,a,train", "b/0.png,b,val"),
    "has two splits for 'flat/a/0.png': 'train' and 'val'": table(SPLIT, "a/0.png,a,train", "a/0.png,a,val"),
    "has two labels for 'flat/a/0.png'": table(PLAIN, "a/0.png,a", "a/0.png,b"),
    "'l.csv' has the columns ['file', 'label'], expected name and label": table("file,label", "a/0.png,a"),
    "'no.csv' do not exist; expected a folder or a CSV": lambda flat: Path("no.csv"),
    "has one class, a; expected at least two": lambda flat: shutil.rmtree("flat/b") or shutil.rmtree("flat/c") or flat,
    "flat has no --train-split 'train'; it has Test, a, b, c": lambda flat: (flat / "Test").mkdir() or flat,
    "split a folder of classes or a CSV; the data has a split of its own: halves": halves,
    "validation_share is 1.0, expected a fraction above 0": lambda flat: (flat, "--validation-share", "1"),
    "flat has no --train-split 'mine'": lambda flat: (flat, "--train-split", "mine"),
    "--groups patient is a column of a CSV": lambda flat: (flat, "--groups", "patient"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(refused, flat, message):
    place = BAD[message](flat)
    place, *words = place if isinstance(place, tuple) else (place,)
    assert message in refused(*words, data=place)


def test_other_processes_write_no_split(command, flat, monkeypatch, tmp_path):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(command(data=flat)) == 0 and not (tmp_path / "out").exists()


@pytest.mark.timm_train
def test_real_run_on_class_folders(timm_train, encoder, flat, tmp_path):
    words = ["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--output", "out", "--experiment", "x"]
    words += ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    result = run_python("-m", "timm_convnextv2", "finetune", *words, "--data-dir", "flat", cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Chance, always the most frequent class, is 33.3 %." in result.stdout
    with open(tmp_path / "out/x/summary.csv", newline="") as file:
        measured = [float(row["eval_top1"]) for row in csv.DictReader(file)]
    best, page = max(measured), (tmp_path / "out/x/report.html").read_text(encoding="utf-8")
    epoch = f"the best epoch, {measured.index(best) + 1} of 3, with {best:.1f} % top-1 on the validation images\n"
    assert f"Done: the finetuned model is in out/x/model: {epoch}" in result.stdout
    assert "flat: 18 images, 6 to validate; 3 of 3 epochs" in page
    assert "Chance, always the most frequent class, is 33.3 %." in page
    assert "warning: 12 updates may be too few to learn: raise --epochs (150 updates are --epochs 37)" in result.stderr
    words = ["out/x/model", "--data-dir", "flat", "--device", "cpu", "--workers", "0"]
    result = run_python("-m", "timm_convnextv2", "validate", *words, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Measured: 6 validation images of out/x/split.csv" in result.stdout
    assert json.loads(result.stdout.partition("--result\n")[2])["top1"] == pytest.approx(best, abs=0.01)
