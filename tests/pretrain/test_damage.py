"""Damaged checkpoints: one kind of error, or the content as it was saved; and what resumes in spite of one."""

import contextlib
import random
import warnings

import pytest
import torch
from helpers import assert_same
from mutations import damage_bytes, damage_content, within
from runs import command, flip, load, refused, run

from timm_convnextv2.checkpoint import CheckpointError, load_checkpoint
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.config import flat
from timm_convnextv2.pretraining import setup
from timm_convnextv2.pretraining.plan import make_plan, resume_progress
from timm_convnextv2.pretraining.start import create_model
from timm_convnextv2.pretraining.trainer import create_trainer
from timm_convnextv2.runs.checkpoints import Checkpoint
from timm_convnextv2.runs.folder import RunFolder
from timm_convnextv2.runs.trainer import Learning
from timm_convnextv2.runs.world import World

SIZES = [pytest.param(100, id="100"), pytest.param(1700, id="1700", marks=pytest.mark.slow)]
TINY = ["--decoder-dim", "8", "--model-kwargs", "depths=[1,1,1,1]", "dims=[8,12,16,20]"]


def same(a, b) -> bool:
    """Whether nested content is equal, NaN or not."""
    try:
        assert_same(a, b)
    except (AssertionError, AttributeError, TypeError, RuntimeError):
        return False
    return True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of two epochs with the smallest model, float16 with its scaler, and a moving average."""
    options = [*TINY, "--img-size", "32", "--patch-size", "1", "--batch-size", "8", "--num-images", "8"]
    options += ["--model-ema", "--amp", "--amp-dtype", "float16"]
    return run(tmp_path_factory.mktemp("tiny") / "r", *options, epochs=2), options


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("form", ["torch.save", "legacy"])
def test_mutated_files(tmp_path, tiny, count, form):
    """A file that is read has the content that was saved: checksums tell. Without them (legacy), nothing breaks."""
    content, path = load(tiny[0]), tmp_path / "x.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    data, silent = path.read_bytes(), 0
    for seed in range(count):
        path.write_bytes(damage_bytes(data, random.Random(seed)))
        try:
            with within(20), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load_checkpoint(path)
        except CheckpointError as e:
            assert str(path) in str(e), seed
        else:
            silent += not same(found, content)
    assert form == "legacy" or silent == 0


@pytest.fixture(scope="module")
def resume(tmp_path_factory, tiny):
    """Reads and takes a checkpoint as a run does that resumes, without the seconds of its start."""
    folder = tmp_path_factory.mktemp("resume")
    config, start = parse_options(command(folder / "r", *tiny[1], "--device", "cpu", epochs=3))
    world = World("cpu")
    model = create_model(config.network, config.crops, seed=config.seed, start=start)
    batches = setup.open_data(config, model, None, world)
    plan = make_plan(config.schedule, batches.per_epoch, batches.num_images, 1)
    trainer = create_trainer(model, plan, world, config.optimizer, Learning(config.seed))

    def act(path):
        run_folder = RunFolder(str(folder), "r", str(path))
        resume_progress(run_folder, flat(config), batches, 1)
        run_folder.restore(trainer, plan.updates_per_epoch)
        trainer.model.zero_grad()
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()  # what it took can be worked with

    return act


@pytest.mark.parametrize("count", [pytest.param(50, id="50"), SIZES[1]])
def test_mutated_content(tmp_path, tiny, resume, count):
    """Parts that are missing, or of another type or shape."""
    content, path = load(tiny[0]), tmp_path / "x.pth.tar"
    resume(tiny[0] / "last.pth.tar")
    refusals = 0
    for seed in range(count):
        changed, what = damage_content(content, random.Random(seed))
        torch.save(changed, path)
        try:
            with within(20):
                resume(path)
        except ValueError as e:  # CheckpointError, or settings that differ
            refusals += 1
            assert str(path) in str(e), f"{seed}, {what}: {e}"
        except Exception as e:
            raise AssertionError(f"{seed}, {what}: {type(e).__name__}: {e}") from e
    assert refusals > count / 2


@pytest.mark.parametrize("part", ["args", "progress", "state_dict", "state_dict_ema", "optimizer"])
def test_missing_parts(tmp_path, capsys, tiny, part):
    content = load(tiny[0])
    del content[part]
    torch.save(content, tmp_path / "x.pth.tar")
    refused(tmp_path / "r", capsys, "x.pth.tar", *tiny[1], "--resume", str(tmp_path / "x.pth.tar"))


@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_checkpoint_of_a_whole_epoch_counts_as_the_next_epoch(tmp_path, tiny, update):
    """An epoch of two updates: a checkpoint inside it lies before the second, never after it."""
    content = load(tiny[0])
    content["progress"]["update"] = update
    torch.save(content, tmp_path / "x.pth.tar")
    checkpoint = Checkpoint.read(tmp_path / "x.pth.tar")
    states = checkpoint.state.optimizer["state"]
    shapes = [states[i]["exp_avg"].shape for i in sorted(states)]
    with contextlib.nullcontext() if update == 1 else pytest.raises(CheckpointError, match=f"update {update} of an"):
        checkpoint.check_fits(checkpoint.state, shapes, 2)


def test_explicit_path_names_the_whole_ones(tmp_path, no_images, capsys):
    out = run(tmp_path / "r", epochs=2)
    flip(out / "milestone-2.pth.tar")
    run(out, "--resume", str(out / "milestone-2.pth.tar"), epochs=3, status=2)
    assert "Whole checkpoints beside it: last.pth.tar, milestone-1.pth.tar." in capsys.readouterr().err


def test_nothing_whole(tmp_path, no_images, capsys):
    out = run(tmp_path / "r")
    for path in out.glob("*.pth.tar"):
        flip(path)
    run(out, "--resume", "auto", epochs=2, status=2)
    message = capsys.readouterr().err
    assert "No other checkpoint beside it is whole" in message and "--overwrite" in message
