"""Fixtures of the tests of pretraining."""

import pytest
from helpers import run_python
from runs import CASES, DATA, SCRIPT, run

from timm_convnextv2.pretraining import loop, measures, probe
from timm_convnextv2.runs.trainer import Trainer


@pytest.fixture
def no_images(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(loop, "save_loss_curve", lambda *_: None)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(measures, "save_reconstructions", lambda *_: None)
    monkeypatch.setattr(probe, "save_neighbours", lambda *_: None)


@pytest.fixture
def updates(monkeypatch):
    """Learning rate and trainer of every update."""
    seen, update = [], Trainer.update

    def wrapped(self, *args):
        result = update(self, *args)
        seen.append((self.lr, self))
        return result

    monkeypatch.setattr(Trainer, "update", wrapped)
    return seen


@pytest.fixture(scope="session")
def atto(tmp_path_factory):
    """A run of the default model without any data option, in a folder with a space; and what it printed."""
    out = tmp_path_factory.mktemp("a run") / "first"
    result = run_python(SCRIPT, *DATA, "--epochs", "1", "--output", out.parent, "--experiment", out.name)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Uninterrupted runs of two epochs."""
    done = {}

    def of(case):
        if case not in done:
            options = CASES["plain"] + (CASES[case] if case != "plain" else [])
            done[case] = run(tmp_path_factory.mktemp(case) / "whole", *options, epochs=2), options
        return done[case]

    return of


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """One epoch, nothing special."""
    return run(tmp_path_factory.mktemp("plain") / "r")


@pytest.fixture
def late(monkeypatch):
    """Losses are read as on a GPU: after the updates that they belong to."""
    init = Trainer.__init__

    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.late = True

    monkeypatch.setattr(Trainer, "__init__", wrapped)
