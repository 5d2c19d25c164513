"""A disk that is full, read-only or gone in mid-run: one message, the last whole checkpoint, nothing left behind."""

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from runs import assert_same_end, at_update, load, rows, run

from timm_convnextv2 import files
from timm_convnextv2.files import WriteError, new_part, remove_leftovers, save_torch, whole_file
from timm_convnextv2.pretraining import loop, measures
from timm_convnextv2.runs.folder import RunFolder
from timm_convnextv2.runs.lock import LOCK
from timm_convnextv2.runs.logs import Logs


def hidden(folder: Path) -> list[Path]:
    """What must not be left."""
    return [*folder.rglob(".*"), *folder.rglob("*.part"), *folder.rglob("*.tmp")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all the space that is left."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


def test_full_disk(small_disk, no_images, monkeypatch, capsys, whole):
    expected, options = whole("plain")
    out = small_disk / "r"
    with monkeypatch.context() as patch:
        at_update(patch, 5, lambda: fill(small_disk))
        run(out, *options, epochs=2, status=1)
    message = capsys.readouterr().err
    assert message.count("timm-convnextv2 pretrain:") == 1 and "No space left on device" in message
    assert "milestone-2.pth.tar' cannot be written" in message
    assert f"last whole checkpoint is {out / 'last.pth.tar'} (after epoch 1)" in message
    assert re.search(r"Resume with\n  .*--experiment r --resume auto", message) and "Traceback" not in message
    assert not hidden(out) and load(out)["progress"]["epoch"] == 1
    (small_disk / "ballast").unlink()
    run(out, *options, "--resume", "auto", epochs=2)
    assert_same_end(out, expected)


def test_folder_that_is_gone(tmp_path, no_images, monkeypatch, capsys):
    at_update(monkeypatch, 5, lambda: shutil.rmtree(tmp_path / "r"))
    run(tmp_path / "r", epochs=2, status=1)
    assert "The lock" in capsys.readouterr().err


# Writes of a run of two epochs with checkpoint and milestone after each, by their number from its start.
WRITES = ["args.yaml", "collapse.csv", "summary.csv", "encoder", "milestone-1", "last"]
WRITES += ["collapse.csv", "summary.csv", "encoder", "milestone-2", "last"]


@pytest.fixture
def fail_at(monkeypatch):
    """Lets the n-th and all later files fail when they are brought to the disk."""

    def arrange(patch, number):
        made, sync, new = [], files.sync, files.new_part

        def counted(path):
            if Path(path).name != LOCK and not str(path).endswith(".png"):
                made.append(Path(path).name)
            return new(path)

        def full(path):
            if len(made) > number and not Path(path).is_dir():
                raise OSError(28, "No space left on device")
            return sync(path)

        from timm_convnextv2.checkpoint import export

        for module in (files, export):
            patch.setattr(module, "new_part", counted)
            patch.setattr(module, "sync", full)
        return made

    return arrange


# the second epoch's differ from the first's in the checkpoint that is there
AGAIN = [pytest.param(number, marks=pytest.mark.slow) for number in (6, 7, 9)]


@pytest.mark.parametrize("number", [*range(6), 8, 10, *AGAIN])
def test_disk_is_full_at_each_write(tmp_path, no_images, monkeypatch, capsys, whole, fail_at, number):
    expected, options = whole("plain")
    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        made = fail_at(patch, number)
        run(out, *options, epochs=2, status=1 if number else 2)
    assert made[number].startswith(WRITES[number])
    printed = capsys.readouterr()
    assert printed.err.count("timm-convnextv2 pretrain:") == 1 and "No space left on device" in printed.err
    assert "Traceback" not in printed.err and not hidden(out)
    saved = [name for name in WRITES[:number] if name.startswith(("milestone", "last"))]
    there = {path.name.partition(".")[0] for path in out.glob("*.pth.tar")}
    assert there == set(saved)
    for name in there:
        assert load(out, name)["progress"]["epoch"] in (1, 2)  # whole
    if number:
        last = f"last whole checkpoint is {out / saved[-1]}.pth.tar" if saved else "No checkpoint was saved before"
        assert last in printed.err
    run(out, *options, "--resume", "auto", epochs=2)
    assert_same_end(out, expected)


def refuse(*_, **__):
    """What a full disk says."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "place, name, error",
    [
        (loop, "save_loss_curve", None),
        (loop, "write_report", None),
        (loop, "write_report", ValueError("args.yaml is damaged")),
        (measures, "save_reconstructions", None),
        (RunFolder, "add_row", None),
        (Logs, "open", None),
        (loop, "export_encoder", None),
    ],
    ids=["loss curve", "report", "damaged", "reconstruction", "summary row", "log", "encoder in mid-run"],
)
def test_what_a_run_can_do_without_is_a_warning(tmp_path, no_images, monkeypatch, capsys, place, name, error):
    failures = iter([error or OSError(28, "No space left on device")])
    act = (lambda *_: None) if place is Logs else getattr(place, name)

    def once(*args, **kwargs):
        for failure in failures:
            raise failure
        return act(*args, **kwargs)

    monkeypatch.setattr(place, name, once if place is not Logs else lambda *_: [once])
    epochs = 2 if name == "export_encoder" else 1
    out = run(tmp_path / "r", epochs=epochs)
    printed = capsys.readouterr().out
    assert "Warning: " in printed and f"failed ({error or 'No space left on device'})" in printed and "Done" in printed
    assert load(out)["progress"]["epoch"] == epochs and (out / "encoder/model.safetensors").exists()


def test_no_done_without_the_encoder(tmp_path, no_images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "export_encoder", refuse)
        out = run(tmp_path / "r", status=1)
    printed = capsys.readouterr()
    assert "Done" not in printed.out and "was not exported" in printed.err
    run(out, "--resume", "auto")
    assert "Done" in capsys.readouterr().out and (out / "encoder/config.json").exists()


# ------------------------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("save", ["torch", "text", "other error"])
def test_old_file_stays_where_the_new_one_fails(tmp_path, monkeypatch, save):
    path = tmp_path / "x"
    save_torch({"a": 1}, path)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError if save != "other error" else KeyError) as error:
        if save == "torch":
            save_torch({"a": 2}, path)
        with whole_file(path) as part:
            part.write_text("new")
            if save == "other error":
                raise KeyError
    if save != "other error":
        assert f"'{path}' cannot be written: No space left on device." in str(error.value)
    assert torch.load(path) == {"a": 1} and [*tmp_path.iterdir()] == [path]


def test_file_and_folder_are_on_the_disk_before_anybody_sees_the_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.path.realpath(f"/proc/self/fd/{n}")), fsync(n))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    save_torch({"a": 1}, tmp_path / "x")
    assert ".x." in done[0] and done[1:] == ["rename", str(tmp_path)]


def test_left_overs(tmp_path):
    """Those of dead processes of this machine go; of the living, of other machines and of others' files, stay."""
    child = os.fork()
    if child == 0:
        for name in ("encoder", "last.pth.tar", "thesis.txt"):
            part = new_part(tmp_path / name)
            part.mkdir() if name == "encoder" else part.touch()
        os._exit(0)
    os.waitpid(child, 0)
    mine, far = new_part(tmp_path / "last.pth.tar"), tmp_path / ".last.pth.tar.far.1-2.abcd.part"
    mine.touch()
    far.touch()
    names = ("encoder", "*.pth.tar")
    assert sorted(path.name.split(".")[1] for path in remove_leftovers(tmp_path, names)) == ["encoder", "last"]
    assert mine.exists() and far.exists() and len(list(tmp_path.glob(".thesis*"))) == 1
    assert remove_leftovers(tmp_path, names, alone=True) == [far]


def test_start_removes_what_a_killed_run_left(tmp_path, no_images):
    out = run(tmp_path / "r")
    before = {path.name for path in out.iterdir()}
    (out / ".encoder.far.9-9.ab.part").mkdir()
    (out / ".encoder.far.9-9.ab.part/model.safetensors").write_text("large")
    for name in (".last.pth.tar.far.9-9.ab.part", ".loss.png.far.9-9.ab.part"):
        (out / name).touch()
    run(out, "--resume", "auto", epochs=2)
    assert {path.name for path in out.iterdir()} == before | {"milestone-2.pth.tar"}


# ------------------------------------------------------------------------------------------------------- summary.csv


@pytest.mark.parametrize("torn", ["1,0.5", "1", "1,0.5,0.25,1e-", "no number,1,2,3\r\n", "\0\0\0"])
def test_summary_with_a_torn_line(tmp_path, torn):
    folder = RunFolder(str(tmp_path), "r")
    folder.path.mkdir()
    folder.summary.write_text(f"epoch,train_loss,train_x,lr\r\n0,0.7,0.1,0.001\r\n{torn}")
    folder.add_row(1, {"loss": 0.6, "x": 0.2}, {}, 0.002)
    folder.add_row(2, {"loss": 0.5, "x": 0.3}, {"knn": 40.5}, 0.003)
    assert rows(folder.path) == [
        {"epoch": "0", "train_loss": "0.7", "train_x": "0.1", "eval_knn": "", "lr": "0.001"},
        {"epoch": "1", "train_loss": "0.6", "train_x": "0.2", "eval_knn": "", "lr": "0.002"},
        {"epoch": "2", "train_loss": "0.5", "train_x": "0.3", "eval_knn": "40.5", "lr": "0.003"},
    ]
    assert len(folder.notes) == 1 and "corrupt" in folder.notes[0]
    with open(folder.summary, newline="") as file:
        assert next(csv.reader(file)) == ["epoch", "train_loss", "train_x", "eval_knn", "lr"]


def test_resume_with_a_torn_summary_says_so(tmp_path, no_images, capsys):
    out = run(tmp_path / "r")
    with open(out / "summary.csv", "a") as file:
        file.write("1,0.")
    run(out, "--resume", "auto", epochs=2)
    assert "a corrupt line is left out: '1,0.'" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(out)] == ["0", "1"]
