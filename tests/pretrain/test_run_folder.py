"""The folder of a run: whose it is, what resumes there, and what is refused."""

import re
import shutil

import pytest
import torch
from helpers import Runs, assert_same
from runs import DATA, SMALL, image_folder, load, refused, rows, run, snapshot, stop

from timm_convnextv2.commands.pretrain import main


def test_folder_that_is_not_empty(tmp_path, no_images, capsys):
    out = run(tmp_path / "r", epochs=2)
    before = snapshot(tmp_path)
    run(out, status=2)
    message = capsys.readouterr().err
    assert all(words in message for words in ("not empty", "--resume auto", "--overwrite"))
    assert snapshot(tmp_path) == before

    (out / "milestone-9.pth.tar").write_text("")
    (out / "notes.txt").write_text("mine")
    run(out, "--overwrite")
    assert not (out / "milestone-9.pth.tar").exists() and len(rows(out)) == 1 and load(out)["epoch"] == 0
    assert (out / "notes.txt").read_text() == "mine"


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
        assert "has finished (epoch 1)." in printed and "Done: the encoder is in" in printed and "step" not in printed
    assert_same(load(out), before)
    assert len(rows(out)) == 1


def test_resume_auto_needs_a_name(tmp_path, capsys):
    assert main([*DATA, "--data-dir", str(image_folder(tmp_path / "x")), "--resume", "auto"]) == 2
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
    for name, content, words in (
        ("missing", None, ["missing", "does not exist"]),
        ("empty", [], "empty"),
        ("broken", range(3), ["None of 3", "0.png"]),
    ):
        if content is not None:
            (tmp_path / name).mkdir()
            for i in content:
                (tmp_path / name / f"{i}.png").write_bytes(b"no picture")
        refused(tmp_path / "r", capsys, words, "--data-dir", str(tmp_path / name))


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    refused(tmp_path / "file" / "sub" / "r", capsys, "cannot be written")
    for options in ([], ["--overwrite"]):
        run(tmp_path / "file", *options, status=2)
        assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "fcmae_convnextv2_femto"], ["model: 'fcmae_convnextv2_atto' there, 'fcmae_"]),
        (["--decoder-dim", "24"], ["decoder_dim: 16 there, 24 here"]),
        (["--patch-size", "2", "--decoder-depth", "2"], ["patch_size: 4 there, 2 here", "decoder_depth: 1 there, 2"]),
        (["--model-kwargs", "dims=[8,8,8,8]"], ["model_kwargs", "[8, 8, 8, 8]"]),
        (["--model-ema"], ["--model-ema"]),
        (["--opt", "sgd"], ["opt: 'adamw' there, 'sgd' here"]),
    ],
)
def test_resume_with_another_model(tmp_path, capsys, plain, options, words):
    resume = ["--resume", str(plain / "last.pth.tar")]
    refused(tmp_path / "r", capsys, ["Cannot resume", "last.pth.tar", *words], *resume, *options)


def test_resume_takes_new_settings_of_the_optimizer(tmp_path, no_images, updates, plain):
    more = ["--weight-decay", "0.3", "--opt-betas", "0.5", "0.6", "--lr", "2", "--warmup-epochs", "0"]
    run(tmp_path / "r", "--resume", str(plain / "last.pth.tar"), *more, epochs=2)
    groups = updates[0][1].optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0, 0.3} and groups[0]["betas"] == (0.5, 0.6)
    assert updates[0][0] == pytest.approx(1)  # half-way down the cosine


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended within an epoch."""
    return stop(tmp_path_factory.mktemp("stopped") / "r", 1, epochs=2)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--seed", "1", "seed"),
        ("--batch-size", "4", "images per update: 8 there, 4 here"),
        ("--grad-accum-steps", "2", "images per update: 8 there, 16 here"),
    ],
)
def test_resume_in_mid_epoch_with_another_order(tmp_path, capsys, stopped, option, value, words):
    resume = ["--resume", str(stopped / "last.pth.tar"), option, value]
    refused(tmp_path / "r", capsys, ["middle of an epoch", words], *resume)


def test_resume_from_a_file_that_is_none(tmp_path, capsys, plain):
    """Of a file that cannot be read: test_damage.py, checkpoint/test_official.py."""
    state, path, canary = load(plain), tmp_path / "x.pth.tar", tmp_path / "canary"
    timm = {key: value for key, value in state.items() if key != "progress"}
    for content, words in (({**state, "extra": Runs(canary)}, "not executed"), (timm, "not a checkpoint of a run")):
        torch.save(content, path)
        refused(tmp_path / "r", capsys, ["x.pth.tar", words], "--resume", str(path))
    assert not canary.exists()
    path = str(plain / "encoder/model.safetensors")
    refused(tmp_path / "r", capsys, "model.safetensors is not a checkpoint of a run", "--resume", path)


@pytest.mark.parametrize("place", ["is the data", "contains the data", "lies in the data", "is the start", "no run"])
def test_overwrite_spares_what_is_not_a_run(tmp_path, capsys, no_images, place):
    """Nothing that the user put there, or that the run reads, is removed."""
    out, options = tmp_path / "photos", ["--overwrite"]
    data = {"is the data": out, "contains the data": out / "below", "lies in the data": tmp_path}.get(place)
    if place == "no run":
        image_folder(out)
    else:
        run(out)
    if place == "is the start":
        options += ["--model", f"local-dir:{out / 'encoder'}", "--pretrained"]
    elif data is not None:
        shutil.copytree(image_folder(tmp_path / "images"), data, dirs_exist_ok=True)
        options += ["--data-dir", str(data)]
    before = snapshot(tmp_path)
    capsys.readouterr()
    run(out, *options, status=2)
    assert "nothing in it is removed" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
