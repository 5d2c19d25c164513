"""The promises of docs/reliability.md that every training keeps: pretrain, detect train and segment train."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_same, environment
from mutations import damage_content
from runs import DATA, SMALL, at_update, flip, load, snapshot
from safetensors.torch import load_file
from tiny import BACKBONE, DETECTOR, SEGMENTER, SHORT

from timm_convnextv2 import files
from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.files import CheckpointError
from timm_convnextv2.pretraining import loop as pretrain_loop
from timm_convnextv2.pretraining import measures
from timm_convnextv2.runs import lock
from timm_convnextv2.runs.checkpoints import Checkpoint
from timm_convnextv2.runs.folder import RunFolder
from timm_convnextv2.runs.lock import LOCK, Lock
from timm_convnextv2.runs.trainer import Trainer
from timm_convnextv2.transfer import loop as transfer_loop

TRANSFER = [*BACKBONE, *SHORT, "--shown-images", "0", "--eval-interval", "9"]
OPTIONS = {
    "pretrain": ["pretrain", *DATA, *SMALL, "--num-images", "16", "--epochs", "2"],
    "detect": ["detect", "train", *DETECTOR, "--boxes-only", *TRANSFER, "--warmup-updates", "0"],
    "segment": ["segment", "train", *SEGMENTER, *TRANSFER],
}
PER_EPOCH = 2  # updates


class Training:
    """One of the three commands, on 8 or 16 images for two epochs of two updates."""

    def __init__(self, name: str, data: list[str]) -> None:
        self.name, self.words = name, [*OPTIONS[name], *data]
        self.product = "encoder" if name == "pretrain" else "model"

    def __call__(self, out, *more, status=0):
        where = ["--output", str(out.parent), "--experiment", out.name]
        assert main([*self.words, *where, *map(str, more)]) == status
        return out

    def weights(self, out):
        return load_file(out / self.product / "model.safetensors")


@pytest.fixture(scope="module", params=OPTIONS)
def training(request, tmp_path_factory):
    if request.param == "detect":
        pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")
    if request.param == "pretrain":
        return Training(request.param, [])
    place = tmp_path_factory.getbasetemp() / "labelled"
    if not place.exists():
        write_folder(place, size=32, train=8, validation=8, coco=True, masks=True)
    return Training(request.param, ["--data-dir", str(place)])


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch):
    for module in (pretrain_loop, transfer_loop):
        monkeypatch.setattr(module, "write_report", lambda *_: None)
    monkeypatch.setattr(pretrain_loop, "save_loss_curve", lambda *_: None)
    monkeypatch.setattr(measures, "save_reconstructions", lambda *_: None)


@pytest.fixture(scope="module")
def finished(training, tmp_path_factory):
    """A whole run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pretrain_loop, transfer_loop):
            patch.setattr(module, "write_report", lambda *_: None)
        return training(tmp_path_factory.mktemp(training.name) / "r")


def killed(training, out, update, *more):
    """A run that ends at once after an update, counted from the start of this process."""

    def die():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_update(patch, update, die)
        training(out, *more)


# ------------------------------------------------------------------------------------------------------- kills, signals


def test_a_run_killed_before_its_first_checkpoint_starts_anew(training, finished, tmp_path):
    killed(training, tmp_path / "r", 0)
    assert (tmp_path / "r/args.yaml").exists() and not (tmp_path / "r/last.pth.tar").exists()
    training(tmp_path / "r", "--resume", "auto")
    assert_same(load(tmp_path / "r")["state_dict"], load(finished)["state_dict"])


def test_a_signal_stops_after_the_update_and_saves(training, finished, tmp_path, capsys):
    """One code handles all signals: each training gets two of the four, in turn."""
    signals = {
        "pretrain": ("SIGTERM", "SIGINT"), "detect": ("SIGHUP", "SIGINT"), "segment": ("SIGUSR1", "SIGTERM"),
    }  # fmt: skip
    for done, name in enumerate(signals[training.name], start=1):
        with pytest.MonkeyPatch.context() as patch:
            at_update(patch, 0, lambda name=name: os.kill(os.getpid(), signal.Signals[name]))
            training(tmp_path / "r", "--resume", "auto", status=130 if name == "SIGINT" else 0)
        where = "in epoch 1 of 2, update 1 of 2" if done == 1 else "after epoch 1 of 2"
        assert f"Stopped by {name} {where}" in capsys.readouterr().out
    training(tmp_path / "r", "--resume", "auto")
    assert_same(load(tmp_path / "r")["state_dict"], load(finished)["state_dict"])


def test_ctrl_c_before_training_is_one_message(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunFolder, "progress", lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    training(tmp_path / "r", status=130)
    assert capsys.readouterr().err.endswith("Stopped before training.\n") and not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------- output


class Gone(io.StringIO):
    """A closed pipe, or a log on a full disk, until something else takes its place."""

    error: OSError | None = None

    def write(self, text):
        if Gone.error:
            raise Gone.error
        return len(text)

    def flush(self):
        self.write("")

    def fileno(self):
        return 99


@pytest.fixture
def gone(monkeypatch):
    """Lets both streams fail with an error."""

    def act(error):
        monkeypatch.setattr(Gone, "error", error)
        monkeypatch.setattr(os, "dup2", lambda *_: setattr(Gone, "error", None))
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Gone())

    return act


def test_output_that_cannot_be_written_does_not_stop_a_run(training, finished, tmp_path, gone):
    closed, full = BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")
    gone(closed if training.name == "detect" else full)
    training(tmp_path / "r")
    assert_same(load(tmp_path / "r")["state_dict"], load(finished)["state_dict"])


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--dry-run", *DATA, *SMALL]])
def test_a_closed_pipe_ends_no_command(gone, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without the run of an earlier command
    gone(BrokenPipeError(32, "Broken pipe"))
    assert main(words) == 0


def test_a_closed_pipe_leaves_no_message():
    words = f"{sys.executable} -m timm_convnextv2 --version | true"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, env=environment(), timeout=60)
    assert not done.stderr


# ------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("options", [[], ["--resume", "auto"], ["--overwrite"]])
def test_a_second_process_is_refused(training, finished, capsys, options):
    held, before = Lock(finished), snapshot(finished)
    training(finished, *options, status=2)
    held.release()
    assert "is in use by process" in capsys.readouterr().err
    assert {path: seen for path, seen in snapshot(finished).items() if path.name != lock.LOCK}.items() <= before.items()


def test_a_run_that_saved_between_reading_and_locking_is_not_repeated(
    training, finished, tmp_path, monkeypatch, capsys
):
    out, take = shutil.copytree(finished, tmp_path / "r"), lock._take
    monkeypatch.setattr(lock, "_take", lambda *args: (os.utime(out / "last.pth.tar", (1, 1)), take(*args)))
    training(out, "--resume", "auto", status=2)
    assert "Start again" in capsys.readouterr().err and not (out / lock.LOCK).exists()


@pytest.mark.parametrize(
    "there", [{"task": "detection"}, {"task": "segmentation"}, {"mask_ratio": 0.6}, {"model": "x"}]
)
def test_overwrite_spares_the_run_of_another_task(training, tmp_path, capsys, there):
    own = {"pretrain": "mask_ratio", "detect": "detection", "segment": "segmentation"}[training.name]
    if own in (*there, *there.values()):
        pytest.skip("its own task")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/args.yaml").write_text(yaml.safe_dump(there))
    (tmp_path / "r/last.pth.tar").write_text("precious")
    before = snapshot(tmp_path)
    for option in ("--overwrite", "--resume=auto"):
        training(tmp_path / "r", option, status=2)
        assert capsys.readouterr().err.count("error:") == 1 and snapshot(tmp_path) == before


def test_a_run_stays_below_its_output(training, tmp_path, capsys):
    where = ["--output", str(tmp_path / "runs"), "--experiment", "../x"]
    assert main([*training.words, *where]) == 2
    assert "--experiment ../x is not a folder below" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_finished_run_resumed_into_a_new_folder_exports_there(training, finished, tmp_path, capsys):
    out = training(tmp_path / "other", "--resume", finished / "last.pth.tar")
    printed = capsys.readouterr().out
    assert f"Done: the {training.product} is in {out / training.product}" in printed
    assert all(Path(path).exists() for path in re.findall(r"^  (/\S+)$", printed, flags=re.M))
    assert_same(training.weights(out), training.weights(finished))
    assert_same(load(out)["state_dict"], load(finished)["state_dict"])


def test_a_resumed_run_says_which_settings_are_others(training, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        training(tmp_path / "r")
    capsys.readouterr()
    training(tmp_path / "r", "--resume", "auto", "--lr", "3e-5", "--workers", "1")
    said = "the run was resumed with other settings: lr: "
    assert f"warning: {said}" in (printed := capsys.readouterr().out) and "3e-05 here" in printed
    assert "workers:" not in printed and said in (tmp_path / "r" / "args.yaml").read_text()
    # what has finished stays as it is
    before = snapshot(tmp_path / "r")
    training(tmp_path / "r", "--resume", "auto", "--lr", "4e-5")
    printed = capsys.readouterr().out
    assert "has finished (epoch 2). Nothing is trained with other settings: lr: 3e-05 there, 4e-05 here" in printed
    after = snapshot(tmp_path / "r")
    assert {k: v for k, v in after.items() if LOCK not in k.name} == {
        k: v for k, v in before.items() if LOCK not in k.name
    }


def test_names_may_be_any_bytes(training, tmp_path):
    """Of the data set, and of the run."""
    name = os.fsdecode(b"caf\xe9")
    data = write_folder(tmp_path / name, size=32, train=8, validation=8, coco=True, masks=True)
    place = data / "train/images" if training.name == "pretrain" else data
    out = Training(training.name, ["--data-dir", str(place)])(tmp_path / f"r{name}")
    assert load(out)["progress"]["epoch"] == 2
    assert (out / training.product / "model.safetensors").stat().st_size  # safetensors itself opens no such path


def test_exported_weights_have_the_mode_of_other_files(training, finished):
    modes = {
        stat.S_IMODE((finished / training.product / name).stat().st_mode)
        for name in ("model.safetensors", "config.json")
    }
    assert len(modes) == 1


def test_a_full_disk_is_one_message_and_the_run_resumes(training, finished, tmp_path, monkeypatch, capsys):
    sync = files.sync

    def full(path):
        if ".milestone-2." in str(path):
            raise OSError(28, "No space left on device")
        return sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        training(tmp_path / "r", status=1)
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "No space left on device" in message and "after epoch 1" in message
    training(tmp_path / "r", "--resume", "auto")
    assert_same(load(tmp_path / "r")["state_dict"], load(finished)["state_dict"])


def test_a_dead_data_worker_is_one_message(training, tmp_path, monkeypatch, capsys):
    def died(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(Trainer, "update", died)
    training(tmp_path / "r", status=1)
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "lower --workers" in message and "--resume auto" in message


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_resume_auto_takes_the_newest_whole_checkpoint(training, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "r")
    for name in ("last", "milestone-2"):
        flip(out / f"{name}.pth.tar")
    (out / "milestone-x.pth.tar").write_text("not of a run")
    training(out, "--resume", "auto")
    assert "newest whole checkpoint beside it: milestone-1.pth.tar" in capsys.readouterr().out
    assert_same(load(out)["state_dict"], load(finished)["state_dict"])


def test_checkpoints_with_other_parts_are_refused(finished, tmp_path):
    content, path, refused = load(finished), tmp_path / "x.pth.tar", 0
    own = Checkpoint.read(finished / "last.pth.tar").state
    shapes = [entry["exp_avg"].shape for _, entry in sorted(own.optimizer["state"].items())]
    for seed in range(16):
        changed, what = damage_content(content, random.Random(seed))
        torch.save(changed, path)
        try:
            Checkpoint.read(path).check_fits(own, shapes, PER_EPOCH)
        except CheckpointError as e:
            refused += 1
            assert str(path) in str(e), what
        except Exception as e:
            raise AssertionError(f"{seed}, {what}: {type(e).__name__}: {e}") from e
    assert refused > 8


def test_weights_that_are_not_finite_never_replace_good_ones(training, tmp_path, monkeypatch, capsys):
    update = Trainer.update

    def spoiled(self, batches, number):
        result = update(self, batches, number)
        if number == 2 * PER_EPOCH - 1:
            next(self.model.parameters()).data.fill_(math.nan)
        return result

    monkeypatch.setattr(Trainer, "update", spoiled)
    out = training(tmp_path / "r", *(["--eval-interval", "1"] if training.name != "pretrain" else []), status=1)
    message = capsys.readouterr().err
    assert "is not finite" in message and "after epoch 1" in message
    for weights in (load(out)["state_dict"], training.weights(out)):
        assert all(value.isfinite().all() for value in weights.values())
    assert json.loads((out / training.product / "config.json").read_text())


def test_after_a_divergence_the_run_resumes_with_a_lower_rate(training, tmp_path, monkeypatch, capsys):
    mean, count = Trainer._note, iter(range(99))

    def diverged(self, total, names, number):
        return mean(self, total * math.nan if next(count) == PER_EPOCH + 1 else total, names, number)

    monkeypatch.setattr(Trainer, "_note", diverged)
    out = training(tmp_path / "r", status=1)
    assert "The loss is nan" in capsys.readouterr().err and load(out)["progress"]["epoch"] == 1
    kept = load(out, "milestone-1")
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training(out, "--lr", "1e-5", "--resume", "auto")
    assert load(out)["progress"]["epoch"] == 2
