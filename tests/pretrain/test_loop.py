"""What a run leaves behind, and the kinds of data it takes."""

import math
import re
import shlex
import sys
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import assert_same, shell
from PIL import Image
from runs import BANDS, DATA, TIMES, at_update, command, image_folder, load, rows, run, steady

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.pretraining import loop, measures
from timm_convnextv2.report.run import read_run
from timm_convnextv2.runs import loop as runs_loop
from timm_convnextv2.runs.trainer import Trainer


def test_files_of_a_run(atto):
    out, printed = atto
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    encoder = {f"encoder/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    assert files == encoder | {
        "args.yaml", "summary.csv", "collapse.csv", "last.pth.tar", "milestone-1.pth.tar", "loss.png", "report.html",
        "reconstructions/epoch-0001.png",
    }  # fmt: skip
    assert not list(out.rglob("*.part")) and not list(out.rglob(".*"))
    assert f"Writing to {out}" in printed and "Done: the encoder is in" in printed
    settings = yaml.safe_load((out / "args.yaml").read_text())
    assert settings["dataset"] == "demo" and settings["input_size"] == [3, 64, 64]
    assert "the demo data of timm_convnextv2, 32 images" in (out / "encoder/README.md").read_text()

    (row,) = rows(out)
    assert row["epoch"] == "0" and math.isfinite(float(row["train_loss"])) and row["train_bad_images"] == "0"
    assert TIMES < row.keys() and all(float(row[name]) >= 0 for name in TIMES)
    for name in ("last", "milestone-1"):
        checkpoint = load(out, name)
        assert checkpoint.keys() >= {"epoch", "arch", "state_dict", "optimizer", "version", "args"}
        assert (checkpoint["epoch"], checkpoint["arch"], checkpoint["version"]) == (0, "fcmae_convnextv2_atto", 2)
        assert checkpoint["args"] == settings
    assert_same(load(out), load(out, "milestone-1"))
    for name, width, height in (("loss.png", 800, 400), ("reconstructions/epoch-0001.png", 900, 1200)):
        image = Image.open(out / name)
        assert image.width >= width and image.height >= height
        assert len(np.unique(np.asarray(image.convert("L")))) > 30  # not blank


def test_printed_command_loads_the_encoder_in_stock_timm(atto, tmp_path):
    """Word for word, and with what it made looked at: all weights are those of the checkpoint."""
    line = re.search(r"  (\S+ -c .*)", atto[1])[1]
    program, _, code = shlex.split(line)
    code = code.replace("print(timm", "print(model := timm", 1)
    code += """
import sys, torch
assert "timm_convnextv2" not in sys.modules
trained = torch.load(sys.argv[1], weights_only=True)["state_dict"]
own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.fc")}
assert len(own) > 60 and all(torch.equal(v, trained["encoder." + k]) for k, v in own.items())
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
"""
    result = shell(shlex.join([program, "-c", code, str(atto[0] / "last.pth.tar")]), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ConvNeXt(") and "out_features=10" in result.stdout


def test_args_yaml_repeats_the_run(tmp_path, no_images):
    first = run(tmp_path / "a", "--mask-ratio", "0.5", "--no-norm-pix-loss", "--clip-grad", "1", "--hflip", "0")
    assert main(["--config", str(first / "args.yaml"), "--experiment", "b"]) == 0
    settings = [yaml.safe_load((tmp_path / name / "args.yaml").read_text()) for name in "ab"]
    assert settings[0]["norm_pix_loss"] is False and settings[0]["model_kwargs"]["depths"] == [1, 1, 2, 1]
    assert settings[0] == {**settings[1], "experiment": "a"}
    assert_same(load(first)["state_dict"], load(tmp_path / "b")["state_dict"])


def test_summary_grows_during_the_run(tmp_path, no_images, monkeypatch):
    seen, losses, update = [], [], Trainer.update

    def wrapped(*args):
        result = update(*args)
        losses.append(float(args[0].loss))
        return result

    monkeypatch.setattr(Trainer, "update", wrapped)
    at_update(monkeypatch, 5, lambda: seen.append(steady(tmp_path / "r")))
    out = run(tmp_path / "r", epochs=2)
    means = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert [float(row["train_loss"]) for row in rows(out)] == pytest.approx(means)
    assert len(seen[0]) == 1 and seen[0] == steady(out)[:1]
    assert [row["epoch"] for row in steady(out)] == ["0", "1"]


def test_milestones_and_reconstructions_follow_their_intervals(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "save_loss_curve", lambda *_: None)
    monkeypatch.setattr(measures, "save_reconstructions", lambda path, *_: drawn.append(path.stem))
    out = run(tmp_path / "r", "--milestone-interval", "2", "--recon-interval", "3", epochs=4)
    assert {p.name for p in out.glob("milestone*")} == {"milestone-2.pth.tar", "milestone-4.pth.tar"}
    assert drawn == ["epoch-0001", "epoch-0003", "epoch-0004"]


@pytest.mark.parametrize(
    "shape, options, input_size",
    [
        ((48, 56, 5), ["--in-chans", "5", *BANDS], [5, 64, 64]),
        ((5, 40, 40), ["--input-size", "5", "64", "96", *BANDS], [5, 64, 96]),
        (None, ["--in-chans", "1"], [1, 64, 64]),
        (None, ["--patch-size", "1", "--img-size", "32"], [3, 32, 32]),
    ],
)
def test_kinds_of_images(tmp_path, capsys, shape, options, input_size):
    data = image_folder(tmp_path / "data", shape=shape)
    out = run(tmp_path / "r", "--data-dir", str(data), *options)
    model = timm.create_model(f"local-dir:{out / 'encoder'}", pretrained=True, num_classes=2)
    config = timm.data.resolve_model_data_config(model)
    assert list(config["input_size"]) == input_size and len(config["mean"]) == input_size[0]
    assert model(torch.zeros(1, *input_size)).shape == (1, 2)
    image = Image.open(out / "reconstructions/epoch-0001.png")
    assert len(np.unique(np.asarray(image.convert("L")))) > 30
    finetune = re.search(r"finetune --recipe .*", capsys.readouterr().out)[0]
    if input_size[0] == 3 and input_size[1] == input_size[2]:
        assert f"--img-size {input_size[1]} " in finetune
    else:
        assert f"--input-size {' '.join(map(str, input_size))} " in finetune
    assert load(out)["progress"]["num_images"] == 16


def test_logs_get_the_numbers_of_the_summary(tmp_path, no_images, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, fake = [], type(sys)("wandb")
    fake.init = lambda **kwargs: seen.append(kwargs)
    fake.log = lambda metrics: seen.append((metrics["epoch"], metrics["loss"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = run(tmp_path / "r", "--log-tensorboard", "--log-wandb", "--wandb-project", "p", epochs=2)
    losses = [pytest.approx(float(row["train_loss"])) for row in rows(out)]
    events = EventAccumulator(str(out)).Reload()
    assert [e.value for e in events.Scalars("loss")] == losses
    assert seen[0]["project"] == "p" and seen[0]["config"]["epochs"] == 2
    assert seen[1:] == [*enumerate(losses)]


def test_too_many_bad_images_at_the_last_update(tmp_path, capsys):
    """The list is told even where the run had nothing left to do."""
    for i in range(8):
        Image.effect_noise((64, 64), 80).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"junk")
    line = ["--data-dir", str(tmp_path), *DATA[2:], "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main([*line, "--experiment", "x"]) == 1
    assert "after epoch 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "out/x/encoder/model.safetensors").exists()


@pytest.mark.parametrize(("pause", "expected"), [(0, [1, 2, 3]), (1e9, [1, 3])])
def test_report_is_refreshed_as_often_as_it_is_cheap(tmp_path, no_images, monkeypatch, pause, expected):
    """At every checkpoint where it costs little, and always at the end; by then the checkpoint is there."""
    seen = []

    def write(runs, path):
        time.sleep(0.001)
        seen.append(load(runs[0])["progress"]["epoch"])
        assert path == tmp_path / "r/report.html"

    monkeypatch.setattr(runs_loop, "REPORT_PAUSE", pause)
    monkeypatch.setattr(loop, "write_report", write)
    run(tmp_path / "r", epochs=3)
    assert seen == expected


def test_args_yaml_records_the_command(tmp_path, no_images):
    run(tmp_path / "a run", "--seed", "7")
    record, expected = read_run(tmp_path / "a run"), command(tmp_path / "a run", "--seed", "7")
    assert shlex.split(record.command)[-len(expected) :] == expected
    assert "pretrain" in record.command and "timm_convnextv2 " in record.versions
