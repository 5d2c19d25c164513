import csv
import importlib.util
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from timm_convnextv2.data import EmbeddedSource, EpochBatchSampler, ImageError

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "pretrain.py"
spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)

# a model of milliseconds, and one epoch of four updates of eight images
SMALL = ["--decoder-dim", "16", "--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]"]
DATA = ["--train-num-samples", "32", "--img-size", "64", "--patch-size", "4", "--batch-size", "8", "--workers", "0"]
DATA += ["--device", "cpu"]
TIMES = {"train_images_per_s", "train_data_wait", "train_seconds", "train_memory_gib"}


@pytest.fixture(autouse=True)
def _signals():
    """A run leaves its handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(pretrain, "save_loss_curve", lambda *_: None)
    monkeypatch.setattr(pretrain, "save_reconstructions", lambda *_: None)


def command(out, *more, epochs=1, data=DATA):
    """Command line of a tiny run into `out`."""
    return [*data, *SMALL, "--epochs", str(epochs), "--output", str(out.parent), "--experiment", out.name, *more]


def run(out, *more, status=0, **kwargs):
    assert pretrain.cli(command(out, *more, **kwargs)) == status
    return out


def load(out, name="last"):
    return torch.load(out / f"{name}.pth.tar", weights_only=True)


def rows(out):
    with open(out / "summary.csv", newline="") as f:
        return list(csv.DictReader(f))


def steady(out):
    """The summary without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(out)]


def assert_same(a, b, where="", **tolerance):
    """Nested containers of tensors are equal, bit for bit where no tolerance is given."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", **tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}", **tolerance)
    elif isinstance(a, torch.Tensor):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b), where
    else:
        assert a == b, where


def differs(a, b):
    return any(not torch.equal(a[k], b[k]) for k in a)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def picture_folder(path, n=16, size=48, shape=None):
    """A folder of PNGs, or of .npy files of a shape."""
    path.mkdir(parents=True)
    source = EmbeddedSource(n, size)
    for i in range(n):
        if shape is None:
            Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
        else:
            np.save(path / f"{i:03d}.npy", np.random.default_rng(i).random(shape, dtype=np.float32))
    return path


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def shell(text, tmp_path):
    """Runs what was printed, with `python` meaning this one."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    env = environment(PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(text, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)


def at_update(monkeypatch, index, act):
    """Calls `act` after the forward and backward of an update, counted from the start of the process."""
    train_update, count = pretrain.train_update, iter(range(10**6))

    def wrapped(task, optimizer, *rest):
        result = train_update(task, optimizer, *rest)
        if next(count) == index:
            act()
        return result

    monkeypatch.setattr(pretrain, "train_update", wrapped)


@pytest.fixture
def updates(monkeypatch):
    """Learning rate and optimizer of every update."""
    seen, train_update = [], pretrain.train_update

    def wrapped(task, optimizer, *rest):
        seen.append((optimizer.param_groups[0]["lr"], optimizer, task))
        return train_update(task, optimizer, *rest)

    monkeypatch.setattr(pretrain, "train_update", wrapped)
    return seen


# -------------------------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def atto(tmp_path_factory):
    """A run of the default model without any data option, in a folder with a space; and what it printed."""
    out = tmp_path_factory.mktemp("a run") / "first"
    result = subprocess.run(
        [sys.executable, SCRIPT, *DATA, "--epochs", "1", "--output", out.parent, "--experiment", out.name],
        capture_output=True, text=True, timeout=100, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_files_of_a_run(atto):
    out, printed = atto
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    encoder = {f"encoder/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    assert files == encoder | {
        "args.yaml", "summary.csv", "last.pth.tar", "milestone-1.pth.tar", "loss.png", "reconstructions/epoch-0001.png"
    }  # fmt: skip
    assert not list(out.rglob("*.part")) and not list(out.rglob(".*"))
    assert f"Writing to {out}" in printed and "Done: the encoder is in" in printed
    settings = yaml.safe_load((out / "args.yaml").read_text())
    assert settings["dataset"] == "embedded" and settings["input_size"] == [3, 64, 64]
    assert "the embedded data set of timm_convnextv2, 32 images" in (out / "encoder/README.md").read_text()

    (row,) = rows(out)
    assert row["epoch"] == "0" and math.isfinite(float(row["train_loss"])) and row["train_bad_images"] == "0"
    assert TIMES < row.keys() and all(float(row[name]) >= 0 for name in TIMES)
    for name in ("last", "milestone-1"):
        checkpoint = load(out, name)
        assert checkpoint.keys() >= {"epoch", "arch", "state_dict", "optimizer", "version", "args"}
        assert (checkpoint["epoch"], checkpoint["arch"], checkpoint["version"]) == (0, "fcmae_convnextv2_atto", 2)
        assert checkpoint["args"] == settings
    assert_same(load(out), load(out, "milestone-1"))


@pytest.mark.parametrize("name, width, height", [("loss.png", 800, 400), ("reconstructions/epoch-0001.png", 900, 1200)])
def test_pictures_are_not_blank(atto, name, width, height):
    image = Image.open(atto[0] / name)
    image.load()
    assert image.format == "PNG" and image.width >= width and image.height >= height
    assert len(np.unique(np.asarray(image.convert("L")))) > 30


def test_stock_timm_opens_the_encoder(atto):
    code = """
import sys, timm, torch
model = timm.create_model(f"local-dir:{sys.argv[1]}/encoder", pretrained=True, num_classes=5)
assert "timm_convnextv2" not in sys.modules
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
trained = torch.load(f"{sys.argv[1]}/last.pth.tar", weights_only=True)["state_dict"]
own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.fc")}
assert len(own) > 100 and all(torch.equal(v, trained["encoder." + k]) for k, v in own.items())
print(timm.data.resolve_model_data_config(model)["input_size"])
"""
    result = subprocess.run([sys.executable, "-c", code, atto[0]], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(3, 64, 64)"


def test_printed_command_loads_the_encoder(atto, tmp_path):
    line = re.search(r"  (python -c .*)", atto[1])[1]
    result = shell(line, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ConvNeXt(") and "out_features=10" in result.stdout


@pytest.mark.timm_train
def test_timm_finetunes_the_encoder(atto, tmp_path):
    if not os.environ.get("TIMM_TRAIN"):
        pytest.skip("TIMM_TRAIN=/path/to/timm's/train.py is not set")
    for split in ("train", "validation"):
        for label in ("a", "b"):
            picture_folder(tmp_path / "data" / split / label, 4)
    line = re.search(r"  python (.*finetune.py .*) --data-dir DATA", atto[1])[1]
    result = shell(
        f"python {line} --data-dir data --epochs 1 -b 4 --workers 1 --output tuned --experiment x --warmup-epochs 0 "
        "--lr-base 1e-6",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tuned = torch.load(tmp_path / "tuned/x/last.pth.tar", weights_only=False, map_location="cpu")["state_dict"]
    start = load_file(atto[0] / "encoder/model.safetensors")
    assert tuned["head.fc.weight"].shape[0] == 2
    assert (tuned["stem.0.weight"] - start["stem.0.weight"]).abs().max() < 0.1 * start["stem.0.weight"].std()


def test_args_yaml_repeats_the_run(tmp_path, no_pictures):
    first = run(tmp_path / "a", "--mask-ratio", "0.5", "--no-norm-pix-loss", "--clip-grad", "1", "--hflip", "0")
    assert pretrain.cli(["--config", str(first / "args.yaml"), "--experiment", "b"]) == 0
    settings = [yaml.safe_load((tmp_path / name / "args.yaml").read_text()) for name in "ab"]
    assert settings[0]["norm_pix_loss"] is False and settings[0]["model_kwargs"]["depths"] == [1, 1, 2, 1]
    assert settings[0] == {**settings[1], "experiment": "a"}
    assert_same(load(first)["state_dict"], load(tmp_path / "b")["state_dict"])


def test_summary_grows_during_the_run(tmp_path, no_pictures, monkeypatch):
    seen, losses, train_update = [], [], pretrain.train_update

    def wrapped(*args):
        result = train_update(*args)
        losses.append(result[0])
        return result

    monkeypatch.setattr(pretrain, "train_update", wrapped)
    at_update(monkeypatch, 5, lambda: seen.append(steady(tmp_path / "r")))
    out = run(tmp_path / "r", epochs=2)
    means = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert [float(row["train_loss"]) for row in rows(out)] == pytest.approx(means)
    assert len(seen[0]) == 1 and seen[0] == steady(out)[:1]
    assert [row["epoch"] for row in steady(out)] == ["0", "1"]


def test_loss_falls(tmp_path, no_pictures):
    losses = [float(row["train_loss"]) for row in rows(run(tmp_path / "r", "--lr", "2e-2", epochs=10))]
    assert losses[-1] < 0.985 * losses[0]


@pytest.mark.parametrize("interval", [1, 2])
def test_milestones_and_pictures_follow_their_intervals(tmp_path, monkeypatch, interval):
    drawn = []
    monkeypatch.setattr(pretrain, "save_loss_curve", lambda *_: None)
    monkeypatch.setattr(pretrain, "save_reconstructions", lambda path, *_: drawn.append(path.stem))
    out = run(tmp_path / "r", "--milestone-interval", str(interval), "--recon-interval", str(interval + 1), epochs=4)
    assert {p.name for p in out.glob("milestone*")} == {f"milestone-{n}.pth.tar" for n in range(interval, 5, interval)}
    assert drawn == [f"epoch-000{n}" for n in ((1, 2, 4) if interval == 1 else (1, 3, 4))]


# ----------------------------------------------------------------------------------------------------- output folder


def test_folder_that_is_not_empty(tmp_path, no_pictures, capsys):
    out = run(tmp_path / "r", epochs=2)
    before = snapshot(tmp_path)
    run(out, status=2)
    message = capsys.readouterr().err
    assert all(words in message for words in ("not empty", "--resume auto", "--overwrite"))
    assert snapshot(tmp_path) == before

    (out / "stale").write_text("")
    run(out, "--overwrite")
    assert not (out / "stale").exists() and len(rows(out)) == 1 and load(out)["epoch"] == 0


def test_overwrite_spares_the_run_that_goes_on(tmp_path, no_pictures):
    out = run(tmp_path / "r", epochs=1)
    run(out, "--resume", "auto", "--overwrite", epochs=2)
    assert len(rows(out)) == 2 and (out / "milestone-1.pth.tar").exists()


def test_resuming_elsewhere_spares_another_run(tmp_path, no_pictures, capsys):
    first, second = run(tmp_path / "a", epochs=1), run(tmp_path / "b", "--seed", "1")
    before = snapshot(tmp_path)
    run(second, "--resume", str(first / "last.pth.tar"), status=2, epochs=2)
    assert "not empty" in capsys.readouterr().err and snapshot(tmp_path) == before
    third = run(tmp_path / "c", "--resume", str(first / "last.pth.tar"), epochs=2)
    assert [row["epoch"] for row in rows(third)] == ["1"]


def test_resume_auto(tmp_path, no_pictures, capsys):
    out = run(tmp_path / "new", "--resume", "auto")
    assert "Resumed" not in capsys.readouterr().out
    before = load(out)
    for epochs in (1, 1):
        run(out, "--resume", "auto", epochs=epochs)
        printed = capsys.readouterr().out
        assert "Resumed from" in printed and "Done: the encoder is in" in printed and "step" not in printed
    assert_same(load(out), before)
    assert len(rows(out)) == 1


def test_resume_auto_needs_a_name(tmp_path, capsys):
    assert pretrain.cli(["--data-dir", str(tmp_path), "--resume", "auto", "--device", "cpu"]) == 2
    picture_folder(tmp_path / "x")
    assert pretrain.cli([*DATA, "--data-dir", str(tmp_path), "--resume", "auto"]) == 2
    assert "--experiment" in capsys.readouterr().err


def test_lost_checkpoint_starts_the_summary_again(tmp_path, no_pictures):
    out = run(tmp_path / "r", epochs=1)
    (out / "last.pth.tar").unlink()
    run(out, "--resume", "auto", epochs=1)
    assert [row["epoch"] for row in rows(out)] == ["0"]


def test_default_name_has_time_model_and_size(tmp_path, no_pictures):
    folder = picture_folder(tmp_path / "data")
    args = [*DATA, *SMALL, "--data-dir", str(folder), "--epochs", "1", "--output", str(tmp_path / "o")]
    assert pretrain.cli(args) == 0
    (out,) = (tmp_path / "o").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-fcmae_convnextv2_atto-64x64", out.name)


# ------------------------------------------------------------------------------------------------ stopping and resuming

CASES = {
    "plain": ["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.3", "--lr", "1e-2"],
    "ema": ["--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"],
    "accum": ["--batch-size", "4", "--grad-accum-steps", "2", "--clip-grad", "0.5"],
    "float16": ["--amp", "--amp-dtype", "float16"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of two epochs."""
    done = {}

    def of(case):
        if case not in done:
            options = CASES["plain"] + (CASES[case] if case != "plain" else [])
            done[case] = run(tmp_path_factory.mktemp(case) / "whole", *options, epochs=2), options
        return done[case]

    return of


@pytest.mark.parametrize(
    "case, stops",
    [
        ("plain", [0]),
        ("plain", [3]),  # the last of an epoch
        ("plain", [1, 0, 2]),  # again and again
        ("ema", [5]),
        ("accum", [1, 3]),
        ("float16", [2]),
    ],
)
def test_stopped_run_ends_as_an_uninterrupted_one(tmp_path, no_pictures, monkeypatch, capsys, whole, case, stops):
    expected, options = whole(case)
    capsys.readouterr()
    out, done = tmp_path / "r", 0
    for i, stop in enumerate(stops):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        with monkeypatch.context() as patch:
            at_update(patch, stop, lambda number=number: os.kill(os.getpid(), number))
            run(out, *options, "--resume", "auto", epochs=2)
        done += stop + 1
        printed = capsys.readouterr().out
        inside, after = f"in epoch {done // 4 + 1} of 2, update {done % 4} of 4", f"after epoch {done // 4} of 2"
        where = inside if done % 4 else after
        assert f"Stopped by {number.name} {where}" in printed and "--resume auto" in printed
        assert load(out)["progress"]["epoch"] == done // 4 and load(out)["progress"]["update"] == done % 4
        assert (out / "encoder/config.json").exists()
    run(out, *options, "--resume", "auto", epochs=2)
    here, there = load(out), load(expected)
    for state in (here, there):
        state["args"] = {k: v for k, v in state["args"].items() if k not in ("output", "experiment")}
    assert ("state_dict_ema" in here) == (case == "ema" or "--model-ema" in options)
    assert_same(here, there)
    assert steady(out) == steady(expected)
    assert_same(load_file(out / "encoder/model.safetensors"), load_file(expected / "encoder/model.safetensors"))


def test_stopped_between_epochs(tmp_path, no_pictures, monkeypatch, whole):
    expected, options = whole("plain")
    with monkeypatch.context() as patch:
        update_summary = pretrain.update_summary

        def interrupted(*args, **kwargs):
            update_summary(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(pretrain, "update_summary", interrupted)
        out = run(tmp_path / "r", *options, epochs=2)
    assert load(out)["progress"]["epoch"] == 1
    run(out, *options, "--resume", "auto", epochs=2)
    for key in ("state_dict", "optimizer", "progress"):
        assert_same(load(out)[key], load(expected)[key])
    assert steady(out) == steady(expected)


def test_killed_run_resumes_from_its_checkpoint(tmp_path, no_pictures, monkeypatch, whole):
    """An epoch that was not saved leaves no trace in the summary."""
    expected, options = whole("plain")

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_update(patch, 6, die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "r", *options, epochs=2)
    run(tmp_path / "r", *options, "--resume", "auto", epochs=2)
    assert_same(load(tmp_path / "r")["state_dict"], load(expected)["state_dict"])
    assert steady(tmp_path / "r") == steady(expected)


def test_printed_command_finishes_the_run(tmp_path, no_pictures, monkeypatch, capsys, whole):
    expected, options = whole("plain")
    args = [*command(tmp_path / "a run", *options, epochs=2), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *args])
        at_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert pretrain.cli(args) == 0
    line = re.search(r"Go on with\n  (.*)\n", capsys.readouterr().out)[1]
    assert line.startswith("python ") and line.endswith("--experiment 'a run' --resume auto")
    result = shell(line, tmp_path)
    assert result.returncode == 0 and "Done" in result.stdout, result.stderr
    assert_same(load(tmp_path / "a run")["state_dict"], load(expected)["state_dict"])
    assert len(rows(tmp_path / "a run")) == 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["p.py", "--data-dir", "a b", "--overwrite"], "python p.py --data-dir 'a b' --experiment x --resume auto"),
        (["p.py", "--resume", "auto", "--experiment=x"], "python p.py --experiment x --resume auto"),
        (["p.py", "--resume=q", "--experiment", "x", "--amp"], "python p.py --amp --experiment x --resume auto"),
    ],
)
def test_resume_command(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    args = pretrain.argparse.Namespace(experiment="x")
    assert pretrain.resume_command(args) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pretrain.resume_command(args) == expected.replace("python", "torchrun --nproc-per-node 2")


def test_ctrl_c_in_a_terminal(tmp_path):
    """SIGINT for the whole process group, workers too, as a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command(tmp_path / "r", "--log-interval", "1", "--workers", "2", epochs=999)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
    )  # fmt: skip
    for line in process.stdout:
        if " step 2/" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Stopped by SIGINT " in out and not err
    progress = load(tmp_path / "r")["progress"]
    inside = f"in epoch {progress['epoch'] + 1} of 999, update {progress['update']} of 4"
    assert (inside if progress["update"] else f"after epoch {progress['epoch']} of 999") in out
    assert progress["epoch"] * 4 + progress["update"] >= 2


def test_second_signal_stops_at_once():
    watcher = pretrain.Run(pretrain.argparse.Namespace(device="cpu"))
    watcher.watch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    assert watcher.stop == "SIGTERM" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # whichever of the two comes second


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One epoch, nothing special."""
    return run(tmp_path_factory.mktemp("plain") / "r")


def test_workers_do_not_change_the_weights(tmp_path, no_pictures):
    options = ["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.3"]
    runs = [run(tmp_path / str(n), *options, "--workers", str(n), epochs=2) for n in (0, 2)]
    for key in ("state_dict", "optimizer", "progress"):
        assert_same(load(runs[0])[key], load(runs[1])[key])


def test_seed_changes_the_run(tmp_path, no_pictures, plain):
    assert_same(load(plain)["state_dict"], load(run(tmp_path / "same"))["state_dict"])
    assert differs(load(plain)["state_dict"], load(run(tmp_path / "other", "--seed", "1"))["state_dict"])


# AdamW turns rounding of gradients near zero into whole steps; SGD keeps it rounding
SGD = ["--opt", "sgd", "--lr-base", "1.6"]


def test_accumulated_batches_equal_the_joint_one(tmp_path, no_pictures):
    joint = run(tmp_path / "joint", *SGD)
    split = run(tmp_path / "split", *SGD, "--batch-size", "4", "--grad-accum-steps", "2")
    assert_same(load(joint)["state_dict"], load(split)["state_dict"], atol=2e-6)
    assert math.isclose(float(rows(joint)[0]["train_loss"]), float(rows(split)[0]["train_loss"]), rel_tol=1e-6)
    alone = run(tmp_path / "alone", *SGD, "--batch-size", "4")
    off = max((load(joint)["state_dict"][k] - v).abs().max().item() for k, v in load(alone)["state_dict"].items())
    assert off > 1e-4  # what a wrong sum would show


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment())


def test_two_processes_equal_one_with_the_joint_batch(tmp_path, no_pictures):
    result = torchrun(*command(tmp_path / "two", *SGD, "--batch-size", "4", "--model-ema", "--log-interval", "1"))
    assert result.returncode == 0, result.stderr
    for line in ("Done: the encoder", "Writing to", "epoch 1/1  loss", "step 3/4"):
        assert result.stdout.count(line) == 1
    joint = run(tmp_path / "joint", *SGD, "--model-ema")
    for key in ("state_dict", "state_dict_ema"):
        assert_same(load(joint)[key], load(tmp_path / "two")[key], atol=2e-6)
    losses = [float(rows(tmp_path / name)[0]["train_loss"]) for name in ("joint", "two")]
    assert math.isclose(*losses, rel_tol=1e-6)
    assert load(tmp_path / "two")["progress"]["world_size"] == 2


def test_what_only_the_first_process_notices_is_one_message(tmp_path):
    result = torchrun(*command(tmp_path / "r", "--output", str(SCRIPT)))
    assert result.returncode and result.stderr.count("Traceback") <= 1  # torchrun's own
    (message,) = re.findall(r"pretrain.py: error: .*", result.stderr)
    assert "cannot be written" in message and "Writing to" not in result.stdout


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("options", [["--epochs", "0"], ["--config", "missing"], ["--device", "nonsense"]])
def test_only_the_first_process_complains(tmp_path, monkeypatch, capsys, rank, options):
    monkeypatch.setenv("RANK", rank)
    run(tmp_path / "r", *options, status=2)
    assert capsys.readouterr().err.count("pretrain.py: error: ") == (rank == "0")


@pytest.mark.parametrize("warmup, epochs", [(1.5, 4), (0, 2), (1, 4)])
def test_learning_rate_is_the_official_schedule(tmp_path, no_pictures, updates, warmup, epochs):
    out = run(
        tmp_path / "r", "--lr-base", "0.064", "--min-lr", "1e-4", "--warmup-epochs", str(warmup),
        "--grad-accum-steps", "2", epochs=epochs,
    )  # fmt: skip
    peak, rates = 0.064 * 8 * 2 / 256, []
    for iteration in range(2 * epochs):
        epoch = iteration / 2  # adjust_learning_rate(optimizer, data_iter_step / len(data_loader) + epoch, args)
        if epoch < warmup:
            rates.append(peak * epoch / warmup)
        else:
            share = (epoch - warmup) / (epochs - warmup)
            rates.append(1e-4 + (peak - 1e-4) * 0.5 * (1.0 + math.cos(math.pi * share)))
    assert [lr for lr, _, _ in updates] == pytest.approx(rates, rel=1e-9)
    assert [float(row["lr"]) for row in rows(out)] == pytest.approx(rates[1::2])


def test_lr_replaces_lr_base(tmp_path, no_pictures, updates):
    run(tmp_path / "r", "--lr", "0.5", "--lr-base", "3", "--warmup-epochs", "0")
    assert updates[0][0] == 0.5


def test_no_weight_decay_on_vectors(tmp_path, no_pictures, updates):
    run(tmp_path / "r", "--weight-decay", "0.07", "--opt-betas", "0.8", "0.9", "--opt-eps", "1e-7")
    _, optimizer, task = updates[0]
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in task.trainable_module.named_parameters() if p.requires_grad}
    assert decays.keys() == set(trained.values()) and set(decays.values()) == {0, 0.07}
    assert {n for n in trained if not n.startswith("encoder.head")} == trained.keys()
    for name, p in trained.items():
        assert decays[p] == (0 if p.ndim == 1 else 0.07), name
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "options, changes",
    [
        (["--amp"], True),
        (["--amp", "--amp-dtype", "float16"], True),
        (["--torchcompile", "aot_eager"], None),
        (["--grad-checkpointing"], False),
        (["--clip-grad", "0.01", "--opt", "sgd"], True),
        (["--no-norm-pix-loss"], True),
        (["--model-kwargs", "depths=[1,1,2,1]", "dims=[8,8,16,16]", "drop_path_rate=0.5"], True),
    ],
)
def test_options_of_the_update(tmp_path, no_pictures, updates, plain, options, changes):
    out = run(tmp_path / "r", *options)
    model = pretrain.unwrap_model(updates[0][2].trainable_module)
    assert model.encoder.stages[0].grad_checkpointing == ("--grad-checkpointing" in options)
    assert isinstance(updates[0][2].trainable_module, pretrain.timm_convnextv2.FCMAE) != ("aot_eager" in options)
    reference = load(plain if "sgd" not in options else run(tmp_path / "sgd", "--opt", "sgd"))["state_dict"]
    weights = load(out)["state_dict"]
    if changes is None:
        assert_same(weights, reference, atol=1e-4)
    else:
        assert differs(weights, reference) == changes
    assert math.isfinite(float(rows(out)[0]["train_loss"]))
    assert ("amp_scaler" in load(out)) == ("float16" in options)


def test_ema_is_exported(tmp_path, no_pictures):
    out = run(tmp_path / "r", "--model-ema", "--model-ema-decay", "0.5", "--lr", "1e-2")
    state, exported = load(out), load_file(out / "encoder/model.safetensors")
    average = {k: state["state_dict_ema"][f"encoder.{k}"] for k in exported}
    assert_same(exported, average)
    assert differs(average, {k: state["state_dict"][f"encoder.{k}"] for k in exported})
    assert "moving average (0.5)" in (out / "encoder/README.md").read_text()


# ------------------------------------------------------------------------------------------------------------ settings


def config(tmp_path, **settings):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_config_sets_options_and_the_command_line_wins(tmp_path):
    path = config(
        tmp_path, epochs=5, norm_pix_loss=False, model_ema=True, amp=False, lr_base="3e-3", clip_grad=None,
        model="fcmae_convnextv2_nano", model_kwargs=dict(depths=[1, 1, 1, 1], drop_path_rate=0.1),
        scale=[0.5, 0.9], torchcompile=True, **{"img-size": 96},
    )  # fmt: skip
    args = pretrain.parse_args(["--model", "fcmae_convnextv2_pico", "--config", path])
    assert (args.epochs, args.img_size, args.lr_base, args.clip_grad) == (5, 96, 3e-3, None)
    assert (args.norm_pix_loss, args.model_ema, args.amp, args.torchcompile) == (False, True, False, "inductor")
    assert args.model_kwargs == dict(depths=[1, 1, 1, 1], drop_path_rate=0.1) and args.scale == [0.5, 0.9]
    assert args.model == "fcmae_convnextv2_pico" and args.lr_base_size == 256
    args = pretrain.parse_args(["--config", path, "--norm-pix-loss", "--img-size", "64", "--clip-grad", "1"])
    assert args.norm_pix_loss is True and args.input_size == [3, 64, 64] and args.clip_grad == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        ([], [3, 64, 96]),
        (["--img-size", "128"], [3, 128, 128]),
        (["--input-size", "1", "32", "32"], [1, 32, 32]),
        (["--in-chans=1"], [1, 64, 96]),
    ],
)
def test_command_line_wins_over_input_size_of_a_config(tmp_path, line, expected):
    args = pretrain.parse_args(["--config", config(tmp_path, input_size=[3, 64, 96]), *line])
    assert args.input_size == expected and args.in_chans == expected[0]


def test_args_yaml_leaves_the_rate_to_the_batch_size(tmp_path, no_pictures, updates):
    run(tmp_path / "a", "--warmup-epochs", "0", "--lr-base", "0.1")
    start = ["--config", str(tmp_path / "a/args.yaml"), "--experiment", "b", "--batch-size", "16"]
    assert pretrain.cli(start) == 0
    assert [updates[i][0] for i in (0, 4)] == pytest.approx([0.1 * 8 / 256, 0.1 * 16 / 256])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(epoch=3), "unknown key 'epoch'; did you mean 'epochs'?"),
        (dict(batchsize=3), "did you mean 'batch_size'?"),
        (dict(qqq=3), "unknown key 'qqq'."),
        (dict(config="x"), "unknown key 'config'"),
        (dict(epochs="many"), "--epochs: invalid int value: 'many'"),
        (dict(epochs=[1, 2]), "unrecognized arguments: 2"),
        (dict(lr_base="fast"), "--lr-base: invalid float value: 'fast'"),
        (dict(norm_pix_loss="no"), "'norm_pix_loss' takes true or false, got 'no'"),
        (dict(amp=1), "'amp' takes true or false, got 1"),
        (dict(scale=[0.1]), "--scale: expected 2 arguments"),
        (dict(amp_dtype="int8"), "invalid choice: 'int8'"),
    ],
)
def test_config_errors(tmp_path, capsys, settings, words):
    refused(tmp_path / "r", capsys, words, "--config", config(tmp_path, **settings))


@pytest.mark.parametrize("text, words", [("- a\n- b\n", "holds a list"), ("a: [", "cannot be read")])
def test_config_that_is_none(tmp_path, capsys, text, words):
    (tmp_path / "x.yaml").write_text(text)
    refused(tmp_path / "r", capsys, words, "--config", str(tmp_path / "x.yaml"))
    refused(tmp_path / "r", capsys, "cannot be read", "--config", str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    "line, warmup",
    [
        (["--epochs", "800"], 40), (["--epochs", "1600"], 40), (["--epochs", "100"], 5),
        (["--epochs", "10", "--warmup-epochs", "3"], 3), ([], 40),
    ],
)  # fmt: skip
def test_default_warmup(line, warmup):
    assert pretrain.parse_args(["--data-dir", "x", *line]).warmup_epochs == warmup


def test_embedded_defaults_give_way():
    args = pretrain.parse_args([])
    assert (args.dataset, args.epochs, args.img_size, args.warmup_epochs) == ("embedded", 6, 56, 0.5)
    assert pretrain.parse_args(["--epochs", "3", "--batch-size", "16"]).batch_size == 16
    args = pretrain.parse_args(["--data-dir", "x"])
    assert (args.dataset, args.epochs, args.img_size, args.workers) == ("", 800, 224, 4)


@pytest.mark.parametrize("options", [[], ["--amp"], ["--model-ema"], ["--grad-checkpointing"]])
def test_dry_run(tmp_path, capsys, options):
    assert pretrain.cli(command(tmp_path / "r", "--dry-run", *options)) == 0
    printed = capsys.readouterr().out
    head, _, tail = printed.partition("fcmae_convnextv2_atto: ")
    settings = yaml.safe_load(head)
    assert settings["input_size"] == [3, 64, 64] and settings["epochs"] == 1 and "dry_run" not in settings
    assert "32 images of 3 x 64 x 64 in 2 x 2 patches of 32 px; 4 updates of 8 images" in tail
    assert re.search(r"Memory per process: about [\d.]+ GiB", tail)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(out, capsys, words, *more, data=DATA):
    """Exit status 2, one message on stderr that has the words, nothing written."""
    before = snapshot(out.parent)
    capsys.readouterr()
    run(out, *more, status=2, data=data)
    printed = capsys.readouterr()
    assert printed.err.count("pretrain.py: error: ") == 1 and printed.err.startswith("pretrain.py: error: ")
    for word in [words] if isinstance(words, str) else words:
        assert word in printed.err
    assert "Writing to" not in printed.out
    assert snapshot(out.parent) == before and not out.exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--img-size", "100"], ["96x96", "128x128"]),
        (["--input-size", "3", "64", "100"], ["64x100", "64x96"]),
        (["--mask-ratio", "0"], "mask"),
        (["--mask-ratio", "1"], "mask"),
        (["--mask-ratio", "1.5"], "1.5"),
        (["--mask-ratio", "0.9"], ["0 of 4 patches", "up to 0.75"]),  # leaves nothing of four patches
        (["--img-size", "32"], "1x1 grid"),
        (["--model", "convnextv2_atto"], "did you mean fcmae_convnextv2_atto?"),
        (["--model", "resnet50"], "not an FCMAE model"),
        (["--model", "fcmae_convnextv2_ato"], "did you mean fcmae_convnextv2_atto?"),
        (["--model-kwargs", "nonsense=1"], "nonsense"),
        (["--batch-size", "33"], ["33", "32"]),
        (["--batch-size", "8", "--grad-accum-steps", "5"], ["40 images", "32"]),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--in-chans", "5"], ["--mean", "--std", "5 values"]),
        (["--in-chans", "0"], "--in-chans must be at least 1"),
        (["--mean", "0.5", "0.5", "--std", "1", "1", "1"], "--mean has 2 values for 3 channels"),
        (["--mean", "0.5", "0.5", "0.5"], "--std has 0 values"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "x"], "invalid int value: 'x'"),
        (["--warmup-epochs", "1"], "--warmup-epochs 1 must lie below --epochs 1"),
        (["--warmup-epochs", "2"], "--warmup-epochs 2"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--max-bad-images", "3"], "--max-bad-images"),
        (["--opt", "nonsense"], "nonsense"),
        (["--resume", "missing.pth"], "'missing.pth' does not exist"),
        (["--nonsense", "1"], "--nonsense"),
        (["--dataset", "nonsense"], "nonsense"),
        (["--patch-size", "3"], "patch"),
        (["--decoder-depth", "0"], "decoder_depth"),
        (["--workers", "-1"], "num_workers"),
        (["--lr", "-1"], "learning rate"),
        (["--scale", "0", "2"], "scale"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_settings(tmp_path, capsys, options, words):
    refused(tmp_path / "r", capsys, words, *options)


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    refused(tmp_path / "r", capsys, ["missing", "does not exist"], "--data-dir", str(tmp_path / "missing"))
    refused(tmp_path / "r", capsys, "empty", "--data-dir", str(tmp_path / "empty"))
    refused(tmp_path / "r", capsys, ["None of 3", "0.png"], "--data-dir", str(tmp_path / "broken"))


@pytest.mark.parametrize("below", [[], ["sub"]])
def test_folder_that_cannot_be_written(tmp_path, capsys, below):
    (tmp_path / "file").write_text("precious")
    refused(tmp_path.joinpath("file", *below, "r"), capsys, "cannot be written", data=DATA) if below else None
    assert pretrain.cli(command(tmp_path / "file", "--overwrite")) == 2
    assert pretrain.cli(command(tmp_path / "file")) == 2
    assert capsys.readouterr().err.count("cannot be written") == 2
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("option, module", [("--log-wandb", "wandb"), ("--log-tensorboard", "tensorboard")])
def test_missing_log_package(tmp_path, capsys, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    refused(tmp_path / "r", capsys, f"pip install {module}", option)


def test_more_processes_than_images():
    with pytest.raises(ValueError, match="5 processes cannot share 4 images"):
        EpochBatchSampler(4, 1, world_size=5)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "fcmae_convnextv2_femto"], ["model: 'fcmae_convnextv2_atto' there, 'fcmae_"]),
        (["--decoder-dim", "24"], ["decoder_dim: 16 there, 24 here"]),
        (["--patch-size", "2", "--decoder-depth", "2"], ["patch_size: 4 there, 2 here", "decoder_depth: 1 there, 2"]),
        (["--model-kwargs", "dims=[8,8,8,8]"], ["model_kwargs", "[8, 8, 8, 8]"]),
        (["--model-ema"], ["--model-ema"]),
    ],
)
def test_resume_with_another_model(tmp_path, capsys, plain, options, words):
    resume = ["--resume", str(plain / "last.pth.tar")]
    refused(tmp_path / "r", capsys, ["Cannot resume", "last.pth.tar", *words], *resume, *options)


def test_resume_with_another_optimizer(tmp_path, capsys, plain):
    words = ["opt: 'adamw' there, 'sgd' here"]
    refused(tmp_path / "r", capsys, words, "--resume", str(plain / "last.pth.tar"), "--opt", "sgd")


def test_resume_takes_new_settings_of_the_optimizer(tmp_path, no_pictures, updates, plain):
    more = ["--weight-decay", "0.3", "--opt-betas", "0.5", "0.6", "--lr", "2", "--warmup-epochs", "0"]
    run(tmp_path / "r", "--resume", str(plain / "last.pth.tar"), *more, epochs=2)
    groups = updates[0][1].param_groups
    assert {group["weight_decay"] for group in groups} == {0, 0.3} and groups[0]["betas"] == (0.5, 0.6)
    assert updates[0][0] == pytest.approx(1)  # half-way down the cosine


@pytest.mark.parametrize("option, value", [("seed", 1), ("batch_size", 4), ("grad_accum_steps", 2)])
def test_resume_in_mid_epoch_with_another_order(tmp_path, capsys, no_pictures, monkeypatch, option, value):
    with monkeypatch.context() as patch:
        at_update(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = run(tmp_path / "stopped", epochs=2)
    flag = f"--{option.replace('_', '-')}"
    resume = ["--resume", str(stopped / "last.pth.tar"), flag, str(value)]
    refused(tmp_path / "r", capsys, ["middle of an epoch", option], *resume)
    assert pretrain.cli(command(tmp_path / "whole", flag, str(value))) == 0


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "evil", "evil pickle", "timm", "safetensors", "list"])
def test_resume_from_a_file_that_is_none(tmp_path, capsys, plain, kind):
    path, canary = tmp_path / "x.pth.tar", tmp_path / "canary"
    whole = (plain / "last.pth.tar").read_bytes()
    words = ["x.pth.tar"]
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "evil":
        torch.save({**load(plain), "extra": Evil(canary)}, path)
        words.append("not executed")
    elif kind == "evil pickle":
        import pickle

        path.write_bytes(pickle.dumps({"args": {}, "progress": Evil(canary)}))
    elif kind == "timm":
        state = load(plain)
        torch.save({k: v for k, v in state.items() if k != "progress"}, path)
        words.append("not a checkpoint of this script")
    elif kind == "list":
        torch.save([1], path)
    else:
        path = plain / "encoder/model.safetensors"
        words = ["model.safetensors is not a checkpoint of this script"]
    refused(tmp_path / "r", capsys, words, "--resume", str(path))
    assert not canary.exists()


# ----------------------------------------------------------------------------------------------- what goes wrong later


def spoil(monkeypatch, bad):
    """Images of the embedded set that cannot be decoded from now on."""
    get = EmbeddedSource.__getitem__

    def spoiled(self, i):
        if i in bad:
            raise ImageError(f"{self.name(i)}: is spoiled")
        return get(self, i)

    monkeypatch.setattr(EmbeddedSource, "__getitem__", spoiled)


def test_bad_images_are_skipped_counted_and_named(tmp_path, capsys, no_pictures, monkeypatch):
    spoil(monkeypatch, {0, 7, 20})  # 0 is tried at the start
    out = run(tmp_path / "r", "--max-bad-images", "0.1", epochs=2)
    printed = capsys.readouterr().out
    names = [EmbeddedSource(32).name(i) for i in (0, 7, 20)]
    for name in names:
        assert len(re.findall(rf"Skipped .*: {re.escape(name)}: is spoiled\n", printed)) == 1
        assert printed.count(f"{name}:") == 1
    assert [row["train_bad_images"] for row in rows(out)] == ["3", "3"] and "(3 so far)" in printed
    assert set(load(out)["progress"]["bad_images"]) == set(names)


def test_too_many_bad_images_stop_the_run(tmp_path, capsys, no_pictures, monkeypatch, plain):
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


@pytest.fixture
def late(monkeypatch):
    """Reads losses as on a GPU, an update late."""
    monkeypatch.setattr(pretrain, "reads_late", lambda *_: True)


@pytest.mark.parametrize("options", [[], ["--grad-accum-steps", "2"], ["--clip-grad", "0.1"]], ids=str)
def test_loss_read_late_is_the_same_run(tmp_path, no_pictures, monkeypatch, options):
    """Values, images that cannot be decoded, a stop and a resume: all as with a loss that is read at once."""
    out = run(tmp_path / "at-once", *options, epochs=2)
    monkeypatch.setattr(pretrain, "reads_late", lambda *_: True)
    with monkeypatch.context() as patch:
        at_update(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        other = run(tmp_path / "late", *options, epochs=2)
    assert load(other)["progress"]["epoch"] < 2
    run(other, *options, "--resume", "auto", epochs=2)
    assert steady(other) == steady(out)
    assert_same(load(other)["state_dict"], load(out)["state_dict"])


def test_nothing_is_learnt_between_a_bad_loss_and_its_reading(tmp_path, capsys, no_pictures, monkeypatch, late):
    weights, train_update = [], pretrain.train_update

    def wrapped(task, optimizer, scaler, batches, *rest):
        images, *more = next(batches)
        if len(weights) == 2:
            images = images * math.nan
        result = train_update(task, optimizer, scaler, iter([(images, *more)]), *rest)
        weights.append({k: v.clone() for k, v in task.trainable_module.state_dict().items()})
        return result

    monkeypatch.setattr(pretrain, "train_update", wrapped)
    run(tmp_path / "r", epochs=2, status=1)
    assert "loss is nan" in capsys.readouterr().err
    assert len(weights) == 4  # the update after the bad one was on its way
    assert_same(weights[1], weights[2])
    assert_same(weights[1], weights[3])
    assert any(not torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_update_does_not_wait_for_the_gpu(tmp_path, no_pictures, monkeypatch):
    train_update = pretrain.train_update

    def wrapped(*args):
        torch.cuda.set_sync_debug_mode("error" if args[-1] else "default")
        try:
            return train_update(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(pretrain, "train_update", wrapped)
    run(tmp_path / "r", "--device", "cuda", "--clip-grad", "1", "--amp", epochs=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(tmp_path, capsys, no_pictures, monkeypatch, whole, value):
    expected, options = whole("plain")
    with monkeypatch.context() as patch:
        forward, count = pretrain.FCMAETask.forward, iter(range(100))

        def spoiled(self, *args):
            output = forward(self, *args)
            return {**output, "loss": output["loss"] * value} if next(count) == 5 else output

        patch.setattr(pretrain.FCMAETask, "forward", spoiled)
        out = run(tmp_path / "r", *options, epochs=2, status=1)
    message = capsys.readouterr().err
    assert all(words in message for words in ("loss is", "--amp-dtype bfloat16", "--clip-grad", "--lr-base"))
    assert load(out)["progress"]["epoch"] == 1
    run(out, *options, "--resume", "auto", epochs=2)
    assert_same(load(out)["state_dict"], load(expected)["state_dict"])
    assert steady(out) == steady(expected)


def test_errors_of_training_are_not_hidden(tmp_path, no_pictures, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pretrain, "train_update", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path / "r")


# ----------------------------------------------------------------------------------------------------------------- data

BANDS = ["--mean", *["0.5"] * 5, "--std", *["0.3"] * 5]


@pytest.mark.parametrize(
    "shape, options, input_size",
    [
        ((48, 56, 5), ["--in-chans", "5", *BANDS], [5, 64, 64]),
        ((5, 40, 40), ["--input-size", "5", "64", "96", *BANDS], [5, 64, 96]),
        (None, ["--in-chans", "1"], [1, 64, 64]),
        (None, ["--input-size", "3", "64", "96"], [3, 64, 96]),
        (None, ["--patch-size", "1", "--img-size", "32"], [3, 32, 32]),
        (None, ["--patch-size", "2", "--img-size", "64"], [3, 64, 64]),
    ],
)
def test_kinds_of_images(tmp_path, capsys, shape, options, input_size):
    data = picture_folder(tmp_path / "data", shape=shape)
    out = run(tmp_path / "r", "--data-dir", str(data), *options)
    model = timm.create_model(f"local-dir:{out / 'encoder'}", pretrained=True, num_classes=2)
    config = timm.data.resolve_model_data_config(model)
    assert list(config["input_size"]) == input_size and len(config["mean"]) == input_size[0]
    assert model(torch.zeros(1, *input_size)).shape == (1, 2)
    picture = Image.open(out / "reconstructions/epoch-0001.png")
    assert len(np.unique(np.asarray(picture.convert("L")))) > 30
    finetune = re.search(r"finetune.py .*", capsys.readouterr().out)[0]
    if input_size[0] == 3 and input_size[1] == input_size[2]:
        assert f"--img-size {input_size[1]} " in finetune
    else:
        assert f"--input-size {' '.join(map(str, input_size))} " in finetune
    assert load(out)["progress"]["num_images"] == 16


def test_tensorboard(tmp_path, no_pictures):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(tmp_path / "r", "--log-tensorboard", epochs=2)
    events = EventAccumulator(str(out))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([float(r["train_loss"]) for r in rows(out)])


def test_wandb(tmp_path, no_pictures, monkeypatch):
    seen = []
    fake = type(sys)("wandb")
    fake.init = lambda **kwargs: seen.append(kwargs)
    fake.log = lambda metrics: seen.append((metrics["epoch"], metrics["loss"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = run(tmp_path / "r", "--log-wandb", "--wandb-project", "p", epochs=2)
    assert seen[0]["project"] == "p" and seen[0]["config"]["epochs"] == 2
    assert seen[1:] == [(i, pytest.approx(float(row["train_loss"]))) for i, row in enumerate(rows(out))]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.cli(["--help"])
    assert stop.value.code == 0 and "--mask-ratio" in capsys.readouterr().out


def test_program_refuses(tmp_path):
    """As a program: status 2 and a message, no traceback."""
    result = subprocess.run([sys.executable, SCRIPT, "--epochs", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr == "pretrain.py: error: --epochs must be at least 1, got 0.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_streamed_data_set(tmp_path, capsys, workers):
    """Shards without labels, one picture broken; whether the pictures come once each is tested with the data."""
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for i in range(16):
                buffer = io.BytesIO()
                Image.effect_noise((40, 40), 80).save(buffer, "png")
                content = b"junk" if (shard, i) == (1, 3) else buffer.getvalue()
                info = tarfile.TarInfo(f"{shard}-{i:02d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    line = ["--dataset", "wds/", "--data-dir", str(tmp_path), "--train-split", "s-{0..1}.tar"]
    line += ["--train-num-samples", "32", "--img-size", "32", "--patch-size", "1", "--batch-size", "8", "--epochs", "2"]
    line += ["--workers", workers, "--output", str(tmp_path / "out"), "--experiment", "x", "--device", "cpu"]
    assert pretrain.cli([*line, "--max-bad-images", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "32 images of 3 x 32 x 32" in printed and "8 updates of 8" in printed
    assert len((tmp_path / "out/x/summary.csv").read_text().splitlines()) == 3
    assert printed.count("Skipped an image that cannot be decoded") == 1 and "1-03.png" in printed


def test_too_many_bad_images_at_the_last_update(tmp_path, capsys):
    """The list is told even where the run had nothing left to do."""
    for i in range(8):
        Image.effect_noise((64, 64), 80).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"junk")
    line = ["--data-dir", str(tmp_path), *DATA[2:], "--epochs", "1", "--output", str(tmp_path / "out")]
    assert pretrain.cli([*line, "--experiment", "x"]) == 1
    assert "after epoch 1 of 1" in capsys.readouterr().out
    assert (tmp_path / "out/x/encoder/model.safetensors").exists()


@pytest.mark.parametrize(
    "line",
    [["--patch-size", "0"], ["--torchcompile", "nope"], ["--model-kwargs", "act_layer=nope"], ["--experiment", "."]],
    ids=lambda line: line[0],
)
def test_more_mistakes_are_one_message(tmp_path, capsys, line):
    assert pretrain.cli([*DATA, "--epochs", "1", "--output", str(tmp_path), "--experiment", "x", *line]) == 2
    assert line[0] in capsys.readouterr().err and not list(tmp_path.iterdir())
