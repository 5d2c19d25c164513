"""The folder of a run: whose it is, what resumes there, and what is refused."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from runs import (
    DATA,
    SMALL,
    at_update,
    command,
    image_folder,
    load,
    refused,
    rows,
    run,
    snapshot,
)

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.data import EpochBatchSampler


class Evil:
    """Asks a pickle to run code when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_folder_that_is_not_empty(tmp_path, no_images, capsys):
    out = run(tmp_path / "r", epochs=2)
    before = snapshot(tmp_path)
    run(out, status=2)
    message = capsys.readouterr().err
    assert all(words in message for words in ("not empty", "--resume auto", "--overwrite"))
    assert snapshot(tmp_path) == before

    (out / "milestone-9.pth.tar").write_text("")
    run(out, "--overwrite")
    assert not (out / "milestone-9.pth.tar").exists() and len(rows(out)) == 1 and load(out)["epoch"] == 0


def test_overwrite_spares_the_run_that_goes_on(tmp_path, no_images):
    out = run(tmp_path / "r", epochs=1)
    run(out, "--resume", "auto", "--overwrite", epochs=2)
    assert len(rows(out)) == 2 and (out / "milestone-1.pth.tar").exists()


def test_resuming_elsewhere_spares_another_run(tmp_path, no_images, capsys):
    first, second = run(tmp_path / "a", epochs=1), run(tmp_path / "b", "--seed", "1")
    before = snapshot(tmp_path)
    run(second, "--resume", str(first / "last.pth.tar"), status=2, epochs=2)
    assert "not empty" in capsys.readouterr().err and snapshot(tmp_path) == before
    third = run(tmp_path / "c", "--resume", str(first / "last.pth.tar"), epochs=2)
    assert [row["epoch"] for row in rows(third)] == ["1"]


def test_resume_auto(tmp_path, no_images, capsys):
    out = run(tmp_path / "new", "--resume", "auto")
    assert "Resumed" not in capsys.readouterr().out
    before = load(out)
    for epochs in (1, 1):
        run(out, "--resume", "auto", epochs=epochs)
        printed = capsys.readouterr().out
        assert "Resumed from" in printed and "Done: the encoder is in" in printed and "step" not in printed
    assert_same(load(out), before)
    assert len(rows(out)) == 1


def test_resume_auto_needs_a_name(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path), "--resume", "auto", "--device", "cpu"]) == 2
    image_folder(tmp_path / "x")
    assert main([*DATA, "--data-dir", str(tmp_path), "--resume", "auto"]) == 2
    assert "--experiment" in capsys.readouterr().err


def test_lost_checkpoint_starts_the_summary_again(tmp_path, no_images):
    out = run(tmp_path / "r", epochs=1)
    (out / "last.pth.tar").unlink()
    run(out, "--resume", "auto", epochs=1)
    assert [row["epoch"] for row in rows(out)] == ["0"]


def test_default_name_has_time_model_and_size(tmp_path, no_images):
    folder = image_folder(tmp_path / "data")
    args = [*DATA, *SMALL, "--data-dir", str(folder), "--epochs", "1", "--output", str(tmp_path / "o")]
    assert main(args) == 0
    (out,) = (tmp_path / "o").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-fcmae_convnextv2_atto-64x64", out.name)


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    refused(tmp_path / "r", capsys, ["missing", "does not exist"], "--data-dir", str(tmp_path / "missing"))
    refused(tmp_path / "r", capsys, "empty", "--data-dir", str(tmp_path / "empty"))
    refused(tmp_path / "r", capsys, ["None of 3", "0.png"], "--data-dir", str(tmp_path / "broken"))


@pytest.mark.parametrize("below", [[], ["sub"]])
def test_folder_that_cannot_be_written(tmp_path, capsys, below):
    (tmp_path / "file").write_text("precious")
    refused(tmp_path.joinpath("file", *below, "r"), capsys, "cannot be written", data=DATA) if below else None
    assert main(command(tmp_path / "file", "--overwrite")) == 2
    assert main(command(tmp_path / "file")) == 2
    assert capsys.readouterr().err.count("is a file") == 2
    assert (tmp_path / "file").read_text() == "precious"


def test_more_processes_than_images():
    with pytest.raises(ValueError, match="5 processes cannot share 4 images"):
        EpochBatchSampler(4, 1, world_size=5)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "fcmae_convnextv2_femto"], ["model: 'fcmae_convnextv2_atto' there, 'fcmae_"]),
        (["--decoder-dim", "24"], ["decoder_dim: 16 there, 24 here"]),
        (["--patch-size", "2", "--decoder-depth", "2"], ["patch_size: 4 there, 2 here", "decoder_depth: 1 there, 2"]),
        (["--model-kwargs", "dims=[8,8,8,8]"], ["model_kwargs", "[8, 8, 8, 8]"]),
        (["--model-ema"], ["--model-ema"]),
    ],
)
def test_resume_with_another_model(tmp_path, capsys, plain, options, words):
    resume = ["--resume", str(plain / "last.pth.tar")]
    refused(tmp_path / "r", capsys, ["Cannot resume", "last.pth.tar", *words], *resume, *options)


def test_resume_with_another_optimizer(tmp_path, capsys, plain):
    words = ["opt: 'adamw' there, 'sgd' here"]
    refused(tmp_path / "r", capsys, words, "--resume", str(plain / "last.pth.tar"), "--opt", "sgd")


def test_resume_takes_new_settings_of_the_optimizer(tmp_path, no_images, updates, plain):
    more = ["--weight-decay", "0.3", "--opt-betas", "0.5", "0.6", "--lr", "2", "--warmup-epochs", "0"]
    run(tmp_path / "r", "--resume", str(plain / "last.pth.tar"), *more, epochs=2)
    groups = updates[0][1].optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0, 0.3} and groups[0]["betas"] == (0.5, 0.6)
    assert updates[0][0] == pytest.approx(1)  # half-way down the cosine


ANOTHER_ORDER = [("seed", 1, "seed"), ("batch_size", 4, "images per update: 8 there, 4 here")]
ANOTHER_ORDER += [("grad_accum_steps", 2, "images per update: 8 there, 16 here")]


@pytest.mark.parametrize("option, value, words", ANOTHER_ORDER)
def test_resume_in_mid_epoch_with_another_order(tmp_path, capsys, no_images, monkeypatch, option, value, words):
    with monkeypatch.context() as patch:
        at_update(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = run(tmp_path / "stopped", epochs=2)
    flag = f"--{option.replace('_', '-')}"
    resume = ["--resume", str(stopped / "last.pth.tar"), flag, str(value)]
    refused(tmp_path / "r", capsys, ["middle of an epoch", words], *resume)
    assert main(command(tmp_path / "whole", flag, str(value))) == 0


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "evil", "evil pickle", "timm", "safetensors", "list"])
def test_resume_from_a_file_that_is_none(tmp_path, capsys, plain, kind):
    path, canary = tmp_path / "x.pth.tar", tmp_path / "canary"
    whole = (plain / "last.pth.tar").read_bytes()
    words = ["x.pth.tar"]
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "evil":
        torch.save({**load(plain), "extra": Evil(canary)}, path)
        words.append("not executed")
    elif kind == "evil pickle":
        import pickle

        path.write_bytes(pickle.dumps({"args": {}, "progress": Evil(canary)}))
    elif kind == "timm":
        state = load(plain)
        torch.save({k: v for k, v in state.items() if k != "progress"}, path)
        words.append("not a checkpoint of a run")
    elif kind == "list":
        torch.save([1], path)
    else:
        path = plain / "encoder/model.safetensors"
        words = ["model.safetensors is not a checkpoint of a run"]
    refused(tmp_path / "r", capsys, words, "--resume", str(path))
    assert not canary.exists()


def test_overwrite_removes_what_a_run_wrote(tmp_path, no_images):
    out = run(tmp_path / "r")
    (out / "notes.txt").write_text("mine")
    (out / "milestone-99.pth.tar").write_text("old")
    run(out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and not (out / "milestone-99.pth.tar").exists()
    assert len(rows(out)) == 1


@pytest.mark.parametrize("place", ["is the data", "contains the data", "lies in the data", "is the start", "no run"])
def test_overwrite_spares_what_is_not_a_run(tmp_path, capsys, no_images, place):
    """Nothing that the user put there, or that the run reads, is removed."""
    out, data = tmp_path / "photos", image_folder(tmp_path / "elsewhere")
    options = ["--overwrite", "--data-dir", str(data)]
    if place == "no run":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif place == "is the start":
        run(out)
        options += ["--model", f"local-dir:{out / 'encoder'}", "--pretrained"]
    else:
        data = {"is the data": out, "contains the data": out / "below", "lies in the data": tmp_path}[place]
        source = image_folder(tmp_path / "images")
        run(out)
        data.mkdir(exist_ok=True)
        for path in source.iterdir():
            shutil.copy(path, data)
        options = ["--overwrite", "--data-dir", str(data)]
    before = snapshot(tmp_path)
    capsys.readouterr()
    run(out, *options, status=2)
    assert "nothing in it is removed" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
