"""The training loop: schedules, resume bit for bit, signals, the folder."""

import math
import os
import signal

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.utils.data import Dataset

from timm_convnextv2.runs.end import NotFiniteError
from timm_convnextv2.runs.folder import TransferFolder
from timm_convnextv2.runs.summary import read_rows
from timm_convnextv2.runs.world import World
from timm_convnextv2.transfer.loop import Run, Schedule, Training, create_loader, train


class Points(Dataset):
    """x and 2 x; the same for the same (epoch, index)."""

    def __len__(self):
        return 12

    def __getitem__(self, key):
        epoch, index = key
        x = torch.tensor([math.sin(7.0 * index + epoch)])
        return x, {"y": 2 * x}


def collate(samples):
    return [x for x, _ in samples], [target for _, target in samples]


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(0.3)  # random, as drop path is

    def forward(self, images, targets):
        found = self.drop(torch.stack(images) @ self.weight) + self.bias
        error = found - torch.stack([t["y"] for t in targets])
        return {"square": error.square().mean(), "offset": self.bias.abs().sum()}


def make_run(folder, epochs=3, resume=False, accum=1, evaluate=lambda *_: {}, **more):
    world = World("cpu")
    torch.manual_seed(0)
    model = Line()
    groups = [
        dict(params=[model.weight], lr_scale=0.5, weight_decay=0.1, names=["weight"]),
        dict(params=[model.bias], lr_scale=1.0, weight_decay=0.0, names=["bias"]),
    ]
    loader = create_loader(Points(), collate, world, batch_size=2)
    schedule = Schedule(0.1, epochs * 6 // accum, warmup=3)
    training = Training(model, groups, schedule, world, ema_decay=0.9, grad_accum_steps=accum, clip_grad=1.0)
    place = TransferFolder(folder, resume=resume)
    run = Run(training, loader, place, {"epochs": epochs}, evaluate, **more)
    if place.checkpoint is not None:
        run.load(place.checkpoint)
    place.claim(run.settings, epoch=run.training.update_number // run.updates_per_epoch)
    return run, world


def go(*args, **kwargs):
    run, world = make_run(*args, **kwargs)
    try:
        train(run, world)
    finally:
        run.folder.release()
        world.close()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    return run


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(1.0, 100, "cosine", warmup=0), {0: 1, 50: 0.5, 100: 0}),
        (Schedule(1.0, 100, "poly", min_lr=0.2), {0: 1, 50: 0.6, 100: 0.2}),
        # the paper's detector: 36 epochs, a tenth after the 27th and the 33rd
        (Schedule(1.0, 360, "step", steps=(27 / 36, 33 / 36)), {0: 1, 269: 1, 270: 0.1, 329: 0.1, 330: 0.01}),
        (Schedule(1.0, 360, "step", warmup=100), {0: 0.001, 50: 0.5005, 100: 1}),
    ],
    ids=["cosine", "poly", "step", "warmup"],
)
def test_schedules(schedule, expected):
    assert {update: schedule.at(update) for update in expected} == pytest.approx(expected)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosin', expected 'cosine', 'poly' or 'step'"):
        Schedule(1.0, 10, "cosin").at(0)


@pytest.mark.parametrize("accum", [1, 2])
def test_resume_is_bit_identical_in_the_middle_of_an_epoch(tmp_path, accum, monkeypatch):
    whole = go(tmp_path / "whole", accum=accum)
    original = Training.update

    def killed(self, batches):
        found = original(self, batches)
        if self.update_number == 8 // accum:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Training, "update", killed)
    first = go(tmp_path / "parts", accum=accum)
    assert (first.stop, first.training.update_number) == ("SIGTERM", 8 // accum)
    monkeypatch.undo()
    second = go(tmp_path / "parts", accum=accum, resume=True)
    assert second.stop == "" and not torch.equal(whole.training.model.weight, torch.zeros(1, 1))
    assert_same(whole.training.state_dict(), second.training.state_dict())
    rows = [
        [(row["train_loss"], row["train_square"], row["lr"]) for row in read_rows(tmp_path / name / "summary.csv")[0]]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_evaluation_logs_and_what_is_evaluated(tmp_path):
    seen, logged = [], []

    def evaluate(epoch, model, last):
        seen.append((epoch, last, model.training))
        return {"ap": 0.25 * epoch}

    log = [lambda epoch, metrics: logged.append((epoch, metrics.get("eval_ap")))]
    run = go(tmp_path / "run", evaluate=evaluate, eval_interval=2, logs=log)
    assert seen == [(2, False, False), (3, True, False)]
    assert logged == [(0, None), (1, 0.5), (2, 0.75)] and run.measured == {"ap": 0.75}
    assert [row["eval_ap"] for row in read_rows(tmp_path / "run/summary.csv")[0]] == ["", "0.5", "0.75"]
    assert run.training.best_model is run.training.ema.module
    assert not torch.equal(run.training.best_model.weight, run.training.model.weight)


def test_rates_of_the_groups(tmp_path):
    run, world = make_run(tmp_path / "run")
    run.loader.batch_sampler.set_epoch(0)
    run.training.update(iter(run.loader))
    rates = [group["lr"] for group in run.training.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * 0.1 * 0.001, 0.1 * 0.001], rel=0.01)
    run.folder.release()


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, monkeypatch):
    run, world = make_run(tmp_path / "run")
    monkeypatch.setattr(Line, "forward", lambda self, *_: {"square": self.weight.sum() * float("nan")})
    with pytest.raises(NotFiniteError):
        train(run, world)
    assert run.training.model.weight.item() == 0
    run.folder.release()
    world.close()


def test_the_folder_is_one_runs(tmp_path):
    run = go(tmp_path / "run")
    with pytest.raises(ValueError, match="is not empty. Continue the run in it: --resume auto"):
        TransferFolder(tmp_path / "run")
    folder = TransferFolder(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="differs in epochs: 3 there, 4 here"):
        folder.check_same({"epochs": 4}, ["epochs"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not the folder of a run"):
        TransferFolder(tmp_path / "mine", overwrite=True)
    again = TransferFolder(tmp_path / "run", overwrite=True)
    again.claim(run.settings)
    assert not (tmp_path / "run/last.pth.tar").exists()
    with pytest.raises(ValueError, match="is in use by"):
        TransferFolder(tmp_path / "run", resume=True)
    again.release()
    (tmp_path / "run/last.pth.tar").write_bytes(b"torn")
    with pytest.raises(ValueError, match="last.pth.tar' cannot be read"):
        TransferFolder(tmp_path / "run", resume=True)
