"""Updates whose loss is not finite: skipped or not, kept, and repeated."""

import json
import math

import pytest
import torch
from helpers import assert_same
from runs import kill, load, rows, run

import timm_convnextv2
from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.data import DemoSource
from timm_convnextv2.runs.trainer import Trainer


@pytest.fixture
def spoil_loss(monkeypatch):
    """Makes the losses of some forwards NaN, counted from the start of the process; returns all of them."""

    def spoil(*bad):
        forward, losses = timm_convnextv2.FCMAETask.forward, []

        def spoiled(self, *args):
            output = forward(self, *args)
            losses.append(math.nan if len(losses) in bad else float(output["loss"].detach()))
            return {**output, "loss": output["loss"] * math.nan} if len(losses) - 1 in bad else output

        monkeypatch.setattr(timm_convnextv2.FCMAETask, "forward", spoiled)
        return losses

    return spoil


@pytest.mark.parametrize("options, bad", [([], {1, 6}), (["--grad-accum-steps", "2", "--model-ema"], {2, 5})])
def test_skipped(tmp_path, capsys, no_images, spoil_loss, options, bad):
    losses, accum = spoil_loss(*bad), 2 if options else 1
    out = run(tmp_path / "r", "--max-bad-steps", "2", *options, epochs=2)
    printed = capsys.readouterr().out
    assert printed.count("Skipped an update whose loss is nan") == 2 and "(2 so far)" in printed
    per_epoch = 4 // accum
    means = [sum(losses[i : i + accum]) / accum for i in range(0, len(losses), accum)]
    for epoch, row in enumerate(rows(out)):
        finite = [x for x in means[epoch * per_epoch : (epoch + 1) * per_epoch] if math.isfinite(x)]
        assert float(row["train_loss"]) == pytest.approx(sum(finite) / len(finite), rel=1e-6)
    state = load(out)
    assert (state["progress"]["bad_steps"], state["progress"]["skipped"]) == (2, 0)
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())
    assert len(list(out.glob("bad-step-*.json"))) == 2 and len(list(out.glob("bad-step-*.pt"))) == 1


def test_skipped_before_a_stop(tmp_path, no_images, spoil_loss):
    """The count and the mean of the epoch survive a stop in its middle."""
    spoil_loss(1)
    whole = run(tmp_path / "whole", "--max-bad-steps", "1")
    spoil_loss(1)
    kill(tmp_path / "r", 3, "--max-bad-steps", "1", "--recovery-interval", "1")
    progress = load(tmp_path / "r")["progress"]
    assert (progress["update"], progress["bad_steps"], progress["skipped"]) == (3, 1, 1)
    spoil_loss()
    run(tmp_path / "r", "--max-bad-steps", "1", "--resume", "auto")
    assert rows(tmp_path / "r")[0]["train_loss"] == rows(whole)[0]["train_loss"]
    assert_same(load(tmp_path / "r")["state_dict"], load(whole)["state_dict"])


@pytest.mark.parametrize("limit", ["0", "1"])
def test_one_too_many(tmp_path, capsys, no_images, spoil_loss, limit):
    spoil_loss(1, 3)
    out = run(tmp_path / "r", "--max-bad-steps", limit, epochs=2, status=1)
    message = capsys.readouterr().err
    update = 4 if limit == "1" else 2
    assert all(words in message for words in ("The loss is nan", "--amp-dtype bfloat16", "--clip-grad", "--lr-base"))
    assert f"--replay {out / f'bad-step-1-{update}.json'}" in message
    assert ("More than --max-bad-steps 1" in message) == (limit == "1")
    assert (out / f"bad-step-1-{update}.pt").exists()


def test_record(tmp_path, capsys, no_images, spoil_loss, monkeypatch, late):
    """Images, seeds and place of the update, also where the loss is read late; and how it is repeated."""
    spoil_loss(5)
    taken, read = [], DemoSource.read
    out = run(tmp_path / "r", "--log-interval", "4", epochs=2, status=1)
    record = json.loads((out / "bad-step-2-2.json").read_text())
    assert (record["epoch"], record["update"], record["number"], record["loss"]) == (1, 1, 5, "nan")
    assert record["masks_seed"] == 42 and len(record["rng_seeds"]) == 1 and record["weights"] == "bad-step-2-2.pt"

    def noting(self, i, *args, **kwargs):
        taken.append((i, self.name(i)))
        return read(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(DemoSource, "read", noting)
        capsys.readouterr()
        assert main(["--replay", str(out / "bad-step-2-2.json")]) == 0
    assert [tuple(entry) for entry in record["images"][0]] == taken[-8:]
    printed = capsys.readouterr().out
    assert "everything is finite" in printed and "those of that update" in printed and "The loss was nan" in printed
    (out / "bad-step-2-2.pt").unlink()
    assert main(["--replay", str(out / "bad-step-2-2.json")]) == 0
    printed = capsys.readouterr().out
    assert "last.pth.tar, saved after update 0 of epoch 2: not those of that update" in printed


def test_replay_names_the_module(tmp_path, capsys, no_images, monkeypatch):
    update = Trainer.update

    def spoiled(self, batches, number):
        if number == 2:
            self.model.encoder.stages[1].blocks[0].norm.weight.data.fill_(3e38)
        return update(self, batches, number)

    monkeypatch.setattr(Trainer, "update", spoiled)
    out = run(tmp_path / "r", "--device", "cpu", status=1)
    capsys.readouterr()
    assert main(["--replay", str(out / "bad-step-1-3.json")]) == 0
    printed = capsys.readouterr().out
    assert "Process 0, batch 1: loss nan; the output of encoder.stages.1.blocks.0.norm" in printed
    weights = torch.load(out / "bad-step-1-3.pt", weights_only=True)
    weights["encoder.stem.0.weight"][0] = math.inf
    torch.save(weights, out / "bad-step-1-3.pt")
    assert main(["--replay", str(out / "bad-step-1-3.json")]) == 0
    assert "the parameter encoder.stem.0.weight is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"epoch": 1}'])
def test_other_files_are_refused(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert main(["--replay", str(path)]) == 2
    assert capsys.readouterr().err.count("error: --replay") == 1
