"""The training loop: schedules, resume bit for bit, signals, the folder."""

import math
import os
import signal
from dataclasses import asdict

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.utils.data import Dataset

from timm_convnextv2.runs.errors import NotFiniteError
from timm_convnextv2.runs.folder import RunFolder
from timm_convnextv2.runs.logs import Logs
from timm_convnextv2.runs.loop import Limits, train
from timm_convnextv2.runs.plan import Plan
from timm_convnextv2.runs.summary import read_rows
from timm_convnextv2.runs.trainer import Learning, Trainer
from timm_convnextv2.runs.world import World
from timm_convnextv2.transfer.loop import Schedule, TransferRun, create_loader, create_trainer, plan_updates


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


def make_run(path, epochs=3, resume=False, accum=1, evaluate=lambda *_: {}, logs=(), **more):
    world = World("cpu")
    torch.manual_seed(0)
    model = Line()
    groups = [
        dict(params=[model.weight], lr_scale=0.5, weight_decay=0.1, names=["weight"]),
        dict(params=[model.bias], lr_scale=1.0, weight_decay=0.0, names=["bias"]),
    ]
    loader = create_loader(Points(), collate, world, batch_size=2)
    plan = plan_updates(loader, world, accum, 0.1, epochs=epochs, warmup_updates=3)
    learning = Learning(ema_decay=0.9, ema_warmup=True, grad_accum_steps=accum, clip_grad=1.0)
    trainer = create_trainer(model, groups, plan, Schedule(), world, learning)
    folder = RunFolder(path.parent, path.name, "auto" if resume else "")
    run = TransferRun(
        trainer, plan, folder, {"epochs": epochs}, folder.progress(1, 12), Limits(), world, loader=loader,
        evaluate=evaluate, **more,
    )  # fmt: skip
    run.begin("", Logs())
    run.logs = list(logs)
    return run


def go(*args, **kwargs):
    run = make_run(*args, **kwargs)
    try:
        train(run)
    finally:
        end(run)
    return run


def end(run):
    run.folder.release()
    run.world.close()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.mark.parametrize(
    "kind, updates, warmup, expected",
    [
        ("cosine", 100, 0, {0: 1, 50: 0.5, 100: 0}),
        ("poly", 100, 0, {0: 1, 50: 0.5, 100: 0}),
        # the paper's detector: 36 epochs, a tenth after the 27th and the 33rd
        ("step", 360, 0, {0: 1, 269: 1, 270: 0.1, 329: 0.1, 330: 0.01}),
        ("step", 360, 100, {0: 0.001, 50: 0.5005, 100: 1}),
    ],
    ids=["cosine", "poly", "step", "warmup"],
)
def test_schedules(kind, updates, warmup, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(kind, steps=(27 / 36, 33 / 36))
    scheduler = schedule.create(optimizer, Plan(updates, updates, 1, 1.0, warmup))
    found = {}
    for update in expected:
        scheduler.step_update(update)
        found[update] = optimizer.param_groups[0]["lr"]
    assert found == pytest.approx(expected)


def test_an_unknown_schedule_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="'cosin', expected 'cosine', 'poly' or 'step'"):
        Schedule("cosin").create(optimizer, Plan(10, 10, 1, 1.0))


@pytest.mark.parametrize("accum", [1, 2])
def test_resume_is_bit_identical_in_the_middle_of_an_epoch(tmp_path, accum, monkeypatch):
    whole = go(tmp_path / "whole", accum=accum)
    original = Trainer.update

    def killed(self, batches, number):
        found = original(self, batches, number)
        if number + 1 == 8 // accum:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Trainer, "update", killed)
    first = go(tmp_path / "parts", accum=accum)
    assert (first.stop, first.progress.epoch, first.progress.update) == ("SIGTERM", 1, 2 // accum)
    monkeypatch.undo()
    second = go(tmp_path / "parts", accum=accum, resume=True)
    assert second.stop == "" and not torch.equal(whole.trainer.model.weight, torch.zeros(1, 1))
    assert_same(asdict(whole.trainer.state()), asdict(second.trainer.state()))
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
    assert not torch.equal(run.trainer.averaged.weight, run.trainer.model.weight)


def test_rates_of_the_groups(tmp_path):
    run = make_run(tmp_path / "run")
    run.trainer.update(run.batches(0, 0), 0)
    rates = [group["lr"] for group in run.trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * 0.1 * 0.001, 0.1 * 0.001], rel=0.01)
    assert run.trainer.lr == rates[1]
    end(run)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(Line, "forward", lambda self, *_: {"square": self.weight.sum() * float("nan")})
    with pytest.raises(NotFiniteError):
        train(run)
    assert run.trainer.model.weight.item() == 0
    end(run)


def test_another_setting_is_refused(tmp_path):
    go(tmp_path / "run")
    folder = RunFolder(tmp_path, "run", "auto")
    with pytest.raises(ValueError, match="differs in epochs: 3 there, 4 here"):
        folder.check_same({"epochs": 4}, ["epochs"])
