"""The arithmetic of an update."""

import json
import math
import re

import pytest
from helpers import ROOT, assert_same, torchrun
from runs import SCRIPT, SGD, command, differs, load, patched, rows, run, stop

import timm_convnextv2
from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.pretraining.plan import split_batch


def test_workers_do_not_change_the_weights(tmp_path, no_images):
    options = ["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.3"]
    runs = [run(tmp_path / str(n), *options, "--workers", str(n), epochs=2) for n in (0, 2)]
    for key in ("state_dict", "optimizer", "progress"):
        assert_same(load(runs[0])[key], load(runs[1])[key])


def test_seed_changes_the_run(tmp_path, no_images, plain):
    assert_same(load(plain)["state_dict"], load(run(tmp_path / "same"))["state_dict"])
    assert differs(load(plain)["state_dict"], load(run(tmp_path / "other", "--seed", "1"))["state_dict"])


def test_accumulated_batches_equal_the_joint_one(tmp_path, no_images):
    joint = run(tmp_path / "joint", *SGD)
    split = run(tmp_path / "split", *SGD, "--batch-size", "4", "--grad-accum-steps", "2")
    assert_same(load(joint)["state_dict"], load(split)["state_dict"], atol=2e-6)
    assert math.isclose(float(rows(joint)[0]["train_loss"]), float(rows(split)[0]["train_loss"]), rel_tol=1e-6)
    alone = run(tmp_path / "alone", *SGD, "--batch-size", "4")
    off = max((load(joint)["state_dict"][k] - v).abs().max().item() for k, v in load(alone)["state_dict"].items())
    assert off > 1e-4  # what a wrong sum would show


def test_a_global_batch_is_shared_by_steps(tmp_path, no_images, capsys):
    split = run(tmp_path / "split", "--batch-size", "4", "--grad-accum-steps", "2")
    shared = run(tmp_path / "shared", "--batch-size", "5", "--global-batch-size", "8")
    assert_same(load(split)["state_dict"], load(shared)["state_dict"])
    assert [load(shared)["args"][name] for name in ("batch_size", "grad_accum_steps")] == [4, 2]
    run(tmp_path / "r", "--global-batch-size", "8", "--grad-accum-steps", "2", status=2)
    assert "follows from --global-batch-size" in capsys.readouterr().err


def test_resume_in_mid_epoch_with_the_images_of_an_update_shared_otherwise(tmp_path, no_images, capsys):
    whole = run(tmp_path / "whole", *SGD)
    stop(tmp_path / "r", 1, *SGD)
    assert load(tmp_path / "r")["progress"]["update"] == 2
    resumed = run(tmp_path / "r", *SGD, "--batch-size", "2", "--global-batch-size", "8", "--resume", "auto")
    assert "Resumed from" in capsys.readouterr().out
    assert_same(load(whole)["state_dict"], load(resumed)["state_dict"], atol=2e-6)


def test_channel_dropout_is_the_same_however_an_update_is_shared(tmp_path, no_images, capsys):
    joint = run(tmp_path / "joint", *SGD, "--channel-dropout", "0.4")
    split = run(tmp_path / "split", *SGD, "--channel-dropout", "0.4", "--batch-size", "2", "--global-batch-size", "8")
    assert_same(load(joint)["state_dict"], load(split)["state_dict"], atol=2e-6)
    without = run(tmp_path / "without", *SGD)
    assert differs(load(without)["state_dict"], load(joint)["state_dict"])
    assert "channels removed with probability 0.4" in (joint / "encoder/README.md").read_text()
    run(tmp_path / "r", "--channel-dropout", "0.4", "--in-chans", "1", status=2)
    assert "--channel-dropout 0.4: Channels can be removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wanted, most, processes, shared",
    [(4096, 64, 8, (64, 8)), (4096, 64, 64, (64, 1)), (96, 64, 1, (48, 2)), (8, 64, 8, (1, 1)), (100, 60, 1, (50, 2))],
)
def test_shares_of_a_global_batch(wanted, most, processes, shared):
    assert split_batch(wanted, most, processes) == shared


@pytest.mark.parametrize("wanted, most, processes, near", [(100, 64, 3, "192"), (127, 64, 1, "64 or 128")])
def test_a_global_batch_that_cannot_be_shared(wanted, most, processes, near):
    with pytest.raises(ValueError, match=f"cannot be split between {processes} process.*{near}"):
        split_batch(wanted, most, processes)


def test_two_processes_equal_one_with_the_joint_batch(tmp_path, no_images):
    both = ["--model-ema", "--channel-dropout", "0.3"]
    result = torchrun(
        patched(tmp_path), *command(tmp_path / "two", *SGD, *both, "--batch-size", "4", "--log-interval", "1")
    )
    assert result.returncode == 0, result.stderr
    for line in ("Done: the encoder", "Writing to", "epoch 1/1  loss", "step 3/4"):
        assert result.stdout.count(line) == 1
    joint = run(tmp_path / "joint", *SGD, *both)
    for key in ("state_dict", "state_dict_ema"):
        assert_same(load(joint)[key], load(tmp_path / "two")[key], atol=2e-6)
    losses = [float(rows(tmp_path / name)[0]["train_loss"]) for name in ("joint", "two")]
    assert math.isclose(*losses, rel_tol=1e-6)
    assert load(tmp_path / "two")["progress"]["world_size"] == 2


@pytest.mark.slow
def test_what_only_the_first_process_notices_is_one_message(tmp_path):
    result = torchrun(patched(tmp_path), *command(tmp_path / "r", "--output", str(SCRIPT)))
    assert result.returncode and result.stderr.count("Traceback") <= 1  # torchrun's own
    (message,) = re.findall(r"timm-convnextv2 pretrain: error: .*", result.stderr)
    assert "cannot be written" in message and "Writing to" not in result.stdout


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_complains(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    for options in (["--epochs", "0"], ["--config", "missing"], ["--device", "nonsense"]):
        run(tmp_path / "r", *options, status=2)
        assert capsys.readouterr().err.count("timm-convnextv2 pretrain: error: ") == (rank == "0")


@pytest.mark.parametrize("warmup, epochs", [(1.5, 4), (0, 2), (1, 4)])
def test_learning_rate_is_the_official_schedule(tmp_path, no_images, updates, warmup, epochs):
    out = run(
        tmp_path / "r", "--lr-base", "0.064", "--lr-base-scale", "linear", "--min-lr", "1e-4",
        "--warmup-epochs", str(warmup), "--grad-accum-steps", "2", epochs=epochs,
    )  # fmt: skip
    peak, rates = 0.064 * 8 * 2 / 256, []
    for iteration in range(2 * epochs):
        epoch = iteration / 2  # adjust_learning_rate(optimizer, data_iter_step / len(data_loader) + epoch, args)
        if epoch < warmup:
            rates.append(peak * epoch / warmup)
        else:
            share = (epoch - warmup) / (epochs - warmup)
            rates.append(1e-4 + (peak - 1e-4) * 0.5 * (1.0 + math.cos(math.pi * share)))
    assert [lr for lr, _ in updates] == pytest.approx(rates, rel=1e-9)
    assert [float(row["lr"]) for row in rows(out)] == pytest.approx(rates[1::2])


def test_no_weight_decay_on_vectors(tmp_path, no_images, updates):
    run(tmp_path / "r", "--weight-decay", "0.07", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-7")
    trainer = updates[0][1]
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert decays.keys() == set(trained.values()) and set(decays.values()) == {0, 0.07}
    assert {n for n in trained if not n.startswith("encoder.head")} == trained.keys()
    for name, p in trained.items():
        assert decays[p] == (0 if p.ndim == 1 else 0.07), name
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize(
    "options, changes",
    [
        (["--amp"], True),
        (["--amp", "--amp-dtype", "float16"], True),
        (["--torchcompile", "aot_eager"], None),
        (["--grad-checkpointing"], False),
        (["--clip-grad", "1e-4", *SGD], True),
        (["--no-norm-pix-loss"], True),
        (["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.5"], True),
    ],
)
def test_options_of_the_update(tmp_path, no_images, updates, plain, options, changes):
    out = run(tmp_path / "r", *options)
    trainer = updates[0][1]
    assert trainer.model.encoder.stages[0].grad_checkpointing == ("--grad-checkpointing" in options)
    assert isinstance(trainer.task.trainable_module, timm_convnextv2.FCMAE) != ("aot_eager" in options)
    reference = load(plain if "sgd" not in options else run(tmp_path / "sgd", *SGD))["state_dict"]
    weights = load(out)["state_dict"]
    if changes is None:
        assert_same(weights, reference, atol=1e-4)
    else:
        assert differs(weights, reference) == changes
    assert math.isfinite(float(rows(out)[0]["train_loss"]))
    assert ("amp_scaler" in load(out)) == ("float16" in options)


def test_same_losses(tmp_path, no_images, monkeypatch):
    """The losses of 50 updates stay: crops, masks, initial weights, drop path, schedule and numerics."""
    losses, forward = [], timm_convnextv2.FCMAETask.forward

    def noted(self, *args):
        output = forward(self, *args)
        losses.append(output["loss"].item())
        return output

    monkeypatch.setattr(timm_convnextv2.FCMAETask, "forward", noted)
    options = "--num-images 40 --batch-size 4 --img-size 40 --patch-size 1 --epochs 5 --lr 7.8125e-4 --workers 0"
    options += " --decoder-dim 32 --warmup-epochs 1 --recon-interval 100 --device cpu --experiment r"
    options += " --scale 0.2 1 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    kwargs = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(16,24,32,40)", "drop_path_rate=0.1"]
    assert main([*options.split(), *kwargs, "--output", str(tmp_path)]) == 0
    expected = json.loads((ROOT / "tests/fixtures/losses.json").read_text())
    assert len(losses) == 50 and max(expected) - min(expected) > 0.1
    assert losses == pytest.approx(expected, rel=2e-5)  # other processors add in another order
