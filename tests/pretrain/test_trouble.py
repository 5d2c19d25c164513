"""What goes wrong in the middle of a run."""

import math
import re

import pytest
import torch
from helpers import assert_same, run_python
from runs import assert_same_end, command, load, patched, rows, run, spoil, stop

from timm_convnextv2.data import DemoSource
from timm_convnextv2.runs.trainer import Trainer


def test_bad_images_are_skipped_counted_and_named(tmp_path, capsys, no_images, monkeypatch):
    spoil(monkeypatch, {0, 7, 20})  # 0 is tried at the start
    out = run(tmp_path / "r", "--max-bad-images", "0.1", epochs=2)
    printed = capsys.readouterr().out
    names = [DemoSource(32).name(i) for i in (0, 7, 20)]
    for name in names:
        assert len(re.findall(rf"Skipped .*: {re.escape(name)}: is spoiled\n", printed)) == 1
        assert printed.count(f"{name}:") == 1
    assert [row["train_bad_images"] for row in rows(out)] == ["3", "3"] and "(3 so far)" in printed
    assert set(load(out)["progress"]["bad_images"]) == set(names)


def test_too_many_bad_images_stop_the_run(tmp_path, capsys, no_images, monkeypatch, plain):
    with monkeypatch.context() as patch:
        spoil(patch, {0, 7, 20})
        out = run(tmp_path / "r", "--max-bad-images", "0.05", epochs=2, status=1)
    printed = capsys.readouterr().out
    done = load(out)["progress"]
    assert done["epoch"] == 0 and len(done["bad_images"]) > 0.05 * 32
    assert "cannot be decoded, more than --max-bad-images 0.05" in printed and "--resume auto" in printed
    listed = printed.partition("more than --max-bad-images")[2]
    assert all(f"  {name}: is spoiled" in listed for name in done["bad_images"])
    run(out, "--max-bad-images", "0.5", "--resume", "auto", epochs=2)
    assert len(rows(out)) == 2


@pytest.mark.parametrize("options", [[], ["--grad-accum-steps", "2", "--clip-grad", "0.1"]], ids=str)
def test_loss_read_late_is_the_same_run(tmp_path, no_images, request, options):
    """Values, images that cannot be decoded, a stop and a resume: all as with a loss that is read at once."""
    out = run(tmp_path / "at-once", *options, epochs=2)
    request.getfixturevalue("late")
    other = stop(tmp_path / "late", 1, *options, epochs=2)
    assert load(other)["progress"]["epoch"] < 2
    run(other, *options, "--resume", "auto", epochs=2)
    assert_same_end(other, out)


def test_nothing_is_learnt_between_a_bad_loss_and_its_reading(tmp_path, capsys, no_images, monkeypatch, late):
    weights, update = [], Trainer.update

    def wrapped(self, batches, number):
        images, *more = next(batches)
        if len(weights) == 2:
            images = images * math.nan
        result = update(self, iter([(images, *more)]), number)
        weights.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return result

    monkeypatch.setattr(Trainer, "update", wrapped)
    run(tmp_path / "r", epochs=2, status=1)
    assert "loss is nan" in capsys.readouterr().err
    assert len(weights) == 4  # the update after the bad one was on its way
    assert_same(weights[1], weights[2])
    assert_same(weights[1], weights[3])
    assert any(not torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_update_does_not_wait_for_the_gpu(tmp_path, no_images, monkeypatch):
    update = Trainer.update

    def wrapped(self, *args):
        torch.cuda.set_sync_debug_mode("error" if self.late else "default")
        try:
            return update(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "update", wrapped)
    run(tmp_path / "r", "--device", "cuda", "--clip-grad", "1", "--amp", epochs=2)


@pytest.mark.parametrize(
    "act, words",
    [
        ("raise RuntimeError('a bug')", "a bug"),
        ("[os.kill(w.pid, signal.SIGKILL) for w in multiprocessing.active_children()]", "worker"),
    ],
)
def test_ends_with_workers(tmp_path, act, words):
    """Data workers ignore SIGTERM; they do not keep a process from ending within seconds."""
    result = run_python(patched(tmp_path, act), *command(tmp_path / "r", "--workers", "2", epochs=99))
    assert result.returncode not in (0, None) and words in result.stderr
