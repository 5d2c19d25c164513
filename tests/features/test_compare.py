"""`compare`: what is run, what is refused before it, and what is made of the curves; with timm's train.py if marked."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from timm_convnextv2.commands import compare as command
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.features import compare, verdict
from timm_convnextv2.runs.lock import Lock

TOP1 = {verdict.SCRATCH: (20.0, 40.0), verdict.OWN: (30.0, 60.0), "resnet18": (25.0, 39.0)}
BEST = {verdict.SCRATCH: 4e-3, verdict.OWN: 4.8e-4, "resnet18": 1.2e-2}  # recipes have 4e-3, 1.6e-3 and 4e-3


@pytest.fixture
def calls(monkeypatch):
    """Commands that would run in processes of their own; finetuning leaves what train.py and its export would."""
    made = []

    def call(command, words, log):
        words = list(map(str, words))
        made.append([command, *words])
        log.write_text("what it printed")
        if command == "pretrain" and "--dry-run" not in words:
            (log.parent / "pretrain/encoder").mkdir(parents=True)
        if command == "finetune":
            option = {name: words[words.index(name) + 1] for name in ("--output", "--experiment", "--seed", "--model")}
            run = Path(option["--output"]) / option["--experiment"]
            (run / "model").mkdir(parents=True)
            (run / "model/config.json").write_text("{}")
            name = option["--model"] if not option["--model"].startswith("local-dir") else verdict.OWN
            name = verdict.SCRATCH if name == verdict.OWN and "--from-scratch" in words else name
            epochs = sum(int(words[words.index(o) + 1]) for o in ("--epochs", "--warmup-epochs"))
            (first, last), more = TOP1[name], int(option["--seed"]) * (1 + (name == verdict.OWN))
            rate = float(words[words.index("--lr-base") + 1])
            more -= 5 * (rate != BEST[name])  # as if another learning rate were worse
            values = dict.fromkeys(range(epochs), first + more) | {epochs - 1: last + more}
            if "cut" in made:
                del values[epochs - 1]
            every = int(words[words.index("--val-interval") + 1])
            kept = [(i, v) for i, v in values.items() if (i + 1) % every == 0 or i + 1 == epochs]
            (run / "summary.csv").write_text("epoch,eval_top1\n" + "".join(f"{i},{v}\n" for i, v in kept))
        return 1.5

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(command, "_check_finetuning", lambda words, log: made.append(["check", *map(str, words)]))
    return made


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "run" / "encoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def words(tmp_path, *more):
    if not (tmp_path / "labelled/train").exists():
        for part, count in (("train", 10), ("validation", 4)):
            for i in range(2 * count):
                path = tmp_path / "labelled" / part / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"no image is opened")
    return ["--data-dir", str(tmp_path / "labelled"), "--output", str(tmp_path / "out"), *more]


def test_models_of_also_get_the_inputs_of_the_encoder(tmp_path, calls, encoder):
    """Random weights all of them, published ones those of the stored values; a model of ours has its own."""
    cfg = {"input_size": [2, 48, 48], "mean": [0.1, 0.2], "std": [0.3, 0.4]}
    pixels = {"divide": 4095.0, "standardize": "channel"}
    config = json.dumps({"architecture": "convnextv2_atto", "pretrained_cfg": cfg, "training": {"pixels": pixels}})
    (encoder / "config.json").write_text(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(config)
    also = ["--also", "resnet18", "resnet18.a1_in1k", f"local-dir:{tmp_path / 'other'}"]
    assert command.main(words(tmp_path, "--encoder", str(encoder.parent), *also, "--dry-run")) == 0
    own, random, published, ours = [call[1 : call.index("--epochs")] for call in calls][1:]
    size = ["--in-chans", "2", "--img-size", "48", "--mean", "0.1", "0.2", "--std", "0.3", "0.4"]
    assert random[2:-2] == ["--from-scratch", *size, "--pixels", json.dumps(pixels)]
    assert published[2:-2] == ["--pretrained", "--in-chans", "2", "--pixels", '{"divide": 4095.0}']
    assert ours[2:-2] == ["--pretrained"] and own[2:-2] == []


def test_each_candidate_is_tuned_alike_and_runs_once_per_seed(tmp_path, calls, encoder, capsys):
    options = ["--encoder", str(encoder.parent), "--also", "resnet18", "--epochs", "30", "--seeds", "0", "3"]
    assert command.main(words(tmp_path, *options, "--workers", "0")) == 0
    checks, runs = [c for c in calls if c[0] == "check"], [c for c in calls if c[0] == "finetune"]
    assert len(checks) == 3 and calls[:3] == checks and len(runs) == 11 + 6
    starts = [["--model", f"local-dir:{encoder}", "--from-scratch", "--recipe", "scratch-small"]]
    starts += [["--model", f"local-dir:{encoder}", "--recipe", "small-data"]]
    starts += [["--model", "resnet18", "--from-scratch", "--recipe", "scratch-small"]]
    budget = ["--epochs", "27", "--warmup-epochs", "3", "--warmup-prefix", "--val-interval", "{}", "--workers", "0"]
    # one step further where the best is the smallest or largest
    rates = [[1.2e-3, 4e-3, 1.2e-2], [4.8e-4, 1.6e-3, 4.8e-3, 1.44e-4], [1.2e-3, 4e-3, 1.2e-2, 3.6e-2]]
    expected = [(number, "0", rate) for number, grid in enumerate(rates) for rate in grid]
    expected += [(number, seed, rate) for seed in ("0", "3") for number, rate in enumerate(BEST.values())]
    data = tmp_path / "out/data"
    for i, (run, (number, seed, rate)) in enumerate(zip(runs, expected, strict=True)):
        start, tunes = starts[number], i < 11
        assert run[1 : 1 + len(start)] == start and run[run.index("--seed") + 1] == seed
        assert run[1 + len(start) :][: len(budget)] == [word.format(30 if tunes else 3) for word in budget]
        assert run[run.index("--data-dir") + 1] == str(data / ("20-tune" if tunes else "20"))
        assert run[run.index("--batch-size") + 1] == "16"  # of 16 images to tune on
        assert float(run[run.index("--lr-base") + 1]) == pytest.approx(rate)
    printed = capsys.readouterr().out
    assert re.search(r"own encoder +60\.0 +66\.0 +63\.0  0\.00048", printed)
    verdict = (
        "With 20 labelled images, pretraining pays: own encoder has 63.0 %, the best baseline, from scratch, 41.5 % "
        "(+21.5 points, 95 % interval over 2 seeds +2.4 to +40.6)."
    )
    assert verdict in printed and "14 to go, about 21 s" in printed
    found = json.loads((tmp_path / "out/compare.json").read_text())
    tried = {"0.000144": 55.0, "0.00048": 60.0, "0.0016": 55.0, "0.0048": 55.0}
    assert found["tuning"]["own encoder, 20 images"] == tried and found["lr_base"]["own encoder, 20 images"] == 4.8e-4
    assert found["top1"]["20"]["own encoder"] == {"0": 60.0, "3": 66.0} and found["verdict"] == [verdict]
    with open(tmp_path / "out/compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and [row["epoch"] for row in rows[:3]] == ["3", "6", "9"]
    assert rows[9] == dict(candidate="from scratch", images="20", seed="0", epoch="30", top1="40.0")
    with Image.open(tmp_path / "out/compare.png") as image:
        assert image.width > 600


@pytest.mark.parametrize("peak", [-7, -2, -1, 0, 1, 2, 6])
def test_rates_are_tried_until_the_best_has_neighbours(tmp_path, peak):
    """Wherever the peak lies, and on a plateau the first of it; a grid in any order, with steps of its own."""
    grid = (1e-2, 1e-3, 3e-3)
    candidate = compare.Candidate("x", "resnet18", (), "smoke", grid, {})
    cell = compare.Cell(candidate, 20, 8, 0, grid[-1], tmp_path, "", tmp_path / f"tune-0-20-images-{grid[-1]:g}", True)
    accuracy = lambda rate: 50 - abs(math.log(rate / (3e-3 * 10 ** (peak / 2))))  # noqa: E731
    tried, folders = {rate: accuracy(rate) for rate in grid}, {cell.folder}
    while another := compare.wider(cell, tried):
        assert another.folder.name == f"tune-0-20-images-{another.rate:g}" and another.folder not in folders
        folders.add(another.folder)
        tried[another.rate], cell = accuracy(another.rate), another
    best, rates = max(tried, key=lambda rate: tried[rate]), sorted(tried)
    assert rates[0] < best < rates[-1] and len(tried) <= 3 + 2 * abs(peak)
    assert compare.wider(cell, dict.fromkeys((1e-3, 3e-3, 1e-2, 3e-4), 10.0)) is None  # all are alike


def test_parts_are_nested_and_tuning_never_sees_the_validation_images(tmp_path, calls, encoder, capsys):
    options = ["--encoder", str(encoder), "--label-budgets", "0.5", "1", "--seeds", "0", "--epochs", "8"]
    assert command.main(words(tmp_path, *options)) == 0
    seen = {}
    for name in ("10-tune", "10", "20-tune", "20"):
        for part in ("train", "validation"):
            files = sorted((tmp_path / "out/data" / name / part).glob("*/*"))
            seen[name, part] = {f.resolve().relative_to(tmp_path / "labelled") for f in files}
            assert {f.parent.name for f in files} == {f.resolve().parent.name for f in files} == {"a", "b"}
    for size in ("10", "20"):
        tune, held = seen[f"{size}-tune", "train"], seen[f"{size}-tune", "validation"]
        assert not tune & held and tune | held == seen[size, "train"] and len(held) == int(size) // 5
        assert all(path.parts[0] == "train" for path in tune | held)
        assert len(seen[size, "validation"]) == 8 and all(
            path.parts[0] == "validation" for path in seen[size, "validation"]
        )
    assert seen["10", "train"] < seen["20", "train"]
    epochs = {c[c.index("--data-dir") + 1]: c[c.index("--epochs") + 1] for c in calls if c[0] == "finetune"}
    assert [epochs[str(tmp_path / "out/data" / size)] for size in ("10", "20")] == ["10", "8"]  # of 8 * sqrt(2) = 11


@pytest.mark.parametrize(
    ("own", "scratch", "said"),
    [
        (
            (60.0, 61.0, 62.0),
            (50.0, 52.0, 51.0),
            "pretraining pays: own encoder has 61.0 %, the best baseline, x, 51.0 %",
        ),
        ((40.0, 41.0, 42.0), (50.0, 52.0, 51.0), "pretraining does not pay"),
        ((40.0, 60.0, 50.0), (50.0, 44.0, 51.0), "whether pretraining pays cannot be told at this size"),
        ((60.0,), (50.0,), "cannot be told at this size: .*one seed, which gives no interval"),
    ],
)
def test_verdict(own, scratch, said):
    last = {100: {verdict.OWN: dict(enumerate(own)), "worse": {0: 1.0}, "x": dict(enumerate(scratch))}}
    (line,) = verdict.verdict(last)
    assert re.search(said, line) and line.startswith("With 100 labelled images, ")


@pytest.mark.parametrize("kind", ["folder", "CSV"])
def test_data_without_a_split_is_split_once(tmp_path, calls, encoder, capsys, kind):
    words(tmp_path)
    place = tmp_path / "labelled/train"
    if kind == "CSV":
        place = tmp_path / "labels.csv"
        rows = [
            f"{path.relative_to(tmp_path)},{path.parent.name}" for path in (tmp_path / "labelled/train").glob("*/*")
        ]
        place.write_text("\n".join(["name,label", *rows]))
    options = ["--data-dir", str(place), "--encoder", str(encoder), "--validation-share", "0.2"]
    assert command.main([*options, "--output", str(tmp_path / "out"), "--seeds", "1"]) == 0
    assert "is split: 16 images to train on, 4 to validate on" in capsys.readouterr().out
    parts = {
        part: {os.path.realpath(p) for p in (tmp_path / "out/data/16" / part).glob("*/*")}
        for part in ("train", "validation")
    }
    assert [len(paths) for paths in parts.values()] == [16, 4] and not parts["train"] & parts["validation"]
    assert command.main([*options, "--output", str(tmp_path / "again"), "--seeds", "2"]) == 0
    assert {os.path.realpath(p) for p in (tmp_path / "again/data/validation").glob("*/*")} == parts["validation"]


def test_several_labels_are_refused(tmp_path, calls, encoder, capsys):
    words(tmp_path)
    (tmp_path / "labels.csv").write_text("name,label\nlabelled/train/a/0.png,a;b\nlabelled/train/b/1.png,b\n")
    assert (
        command.main(
            ["--data-dir", str(tmp_path / "labels.csv"), "--encoder", str(encoder), "--output", str(tmp_path / "o")]
        )
        == 2
    )
    assert "has several labels" in capsys.readouterr().err and not calls


def test_without_an_outside_baseline_one_is_proposed(tmp_path, calls, encoder, capsys):
    """As it is printed: what is finished is kept."""
    options = words(tmp_path, "--encoder", str(encoder), "--epochs", "6", "--seeds", "0")
    assert command.main(options) == 0
    (more,) = re.findall(r"better baseline: (.*)", capsys.readouterr().out)
    calls.clear()
    assert command.main([*options, *more.split()]) == 0
    ran = [call for call in calls if call[0] == "finetune"]
    assert (
        len(ran) == 5 and all("resnet18" in call for call in ran) and "better baseline" not in capsys.readouterr().out
    )


def test_resume_keeps_what_is_finished(tmp_path, calls, encoder, capsys):
    """A finetuning that was stopped starts again, also if its export was written; it used to be refused for ever."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lr_base: 8.0e-4\n")
    options = words(tmp_path, "--encoder", str(encoder), "--recipe", str(recipe), "--seeds", "0", "1", "--epochs", "6")
    assert command.main(options) == 0
    before = [c for c in calls if c[0] == "finetune"]
    run = tmp_path / "out/finetune-1-20-images-seed-1"
    (run / compare.MADE_WITH).unlink()
    (run / "last.pth.tar").write_bytes(b"checkpoint of the stopped finetuning")
    calls.clear()
    assert command.main([*options, "--resume"]) == 0
    assert [c for c in calls if c[0] == "finetune"] == before[-1:] and not (run / "last.pth.tar").exists()
    calls[:] = ["cut"]
    (run / compare.MADE_WITH).unlink()
    assert command.main([*options, "--resume"]) == 1  # it ended after 5 of 6 epochs, and is not finished
    assert not (run / compare.MADE_WITH).exists()
    capsys.readouterr()
    calls.clear()
    assert command.main([*options[:-1], "2", "--resume"]) == 2
    assert "finetuned with options" in capsys.readouterr().err
    recipe.write_text("lr_base: 8.0e-4\nmixup: 0.5\n")
    assert command.main([*options, "--resume"]) == 2
    assert "finetuned with recipe" in capsys.readouterr().err
    recipe.write_text("lr_base: 8.0e-4  # as before\n")
    (encoder / "config.json").write_text("[]")
    assert command.main([*options, "--resume"]) == 2
    assert "finetuned with weights" in capsys.readouterr().err and not [c for c in calls if c[0] == "finetune"]


def test_the_child_ends_with_the_command(tmp_path, monkeypatch):
    """`kill PID` of `compare` left the finetuning running."""
    script = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.chdir(tmp_path)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **how: popen([words[0], "-c", script], **how))

    def kill():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        compare.call("finetune", [], tmp_path / "log")
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("mean", ["", " --mean auto --std auto --clip-percentiles 1 99"])
def test_pretrains_first_and_checks_with_the_untrained_encoder(tmp_path, calls, mean):
    small = (
        "--img-size 32 --patch-size 1 --decoder-dim 8 --model-kwargs depths=[1,1,1,1] dims=[8,8,8,8] --divide 100"
        + mean
    )
    options = words(tmp_path, "--unlabelled", str(tmp_path / "images"), "--pretrain", small, "--seeds", "0")
    assert command.main(options) == 0
    kinds = [c[0] for c in calls]
    assert kinds == ["pretrain", "check", "check", "pretrain", *["finetune"] * 9]
    assert calls[0] == [*calls[3], "--dry-run"] and "--resume" in calls[3] and "depths=[1,1,1,1]" in calls[3]
    untrained, trained = tmp_path / "out/untrained", tmp_path / "out/pretrain/encoder"
    assert calls[1][2] == f"local-dir:{untrained}"
    assert json.loads((untrained / "config.json").read_text())["training"]["pixels"] == {"divide": 100}
    assert calls[4][2] == f"local-dir:{trained}"


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "Give --encoder MODEL, or --unlabelled DIR"),
        (["--encoder", "convnextv2_atto", "--unlabelled", "y"], "--encoder is pretrained already"),
        (["--encoder", "convnextv2_atto", "--seeds", "1", "1"], "--seeds takes different numbers, got '1 1'"),
        (["--encoder", "convnextv2_atto", "--epochs", "0"], "--epochs must be at least 1"),
        (["--encoder", "convnextv2_atto", "--also", "resnet18", "resnet18"], "--also names resnet18 twice"),
        (
            ["--encoder", "convnextv2_atto", "--also", "resnet81"],
            "timm has no model of this name. Did you mean 'resnet18'?",
        ),
        (
            ["--encoder", "convnextv2_atto", "--also", "resnet18.a1_in2k"],
            "no model of this name. Did you mean 'resnet18.a1_in1k'?",
        ),
        (["--encoder", "convnextv2_atto", "--lr-grid", "1"], "--lr-grid takes two or more different numbers, got '1'"),
        (["--encoder", "convnextv2_atto", "--lr", "0.1"], "--lr is tuned for each candidate: give --lr-grid"),
        (
            ["--encoder", "convnextv2_atto", "--label-budgets", "0.05"],
            "is 1 of 20 training images; expected at least one per class",
        ),
        (["--encoder", "convnextv2_atto", "--label-budgets", "2"], "leaves one image of a; expected two or more"),
        (["--encoder", "convnextv2_ato"], "--encoder convnextv2_ato: timm has no model of this name. Did you mean"),
        (["--encoder", "{tmp}/labelled"], "has no model"),
    ],
)
def test_refused_before_anything_is_started(tmp_path, calls, capsys, options, message):
    (tmp_path / "labelled").mkdir()
    assert command.main(words(tmp_path, *[o.format(tmp=tmp_path) for o in options])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not [c for c in calls if c[0] == "finetune"]


def test_a_folder_that_is_used_is_refused(tmp_path, calls, encoder, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("")
    assert command.main(words(tmp_path, "--encoder", str(encoder))) == 2
    assert "is not empty" in capsys.readouterr().err
    lock = Lock(tmp_path / "out")
    assert command.main(words(tmp_path, "--encoder", str(encoder), "--resume")) == 2
    assert "is in use by process" in capsys.readouterr().err and not calls
    lock.release()


def test_a_dry_run_leaves_nothing_behind(tmp_path, calls, encoder, capsys):
    options = ["--encoder", str(encoder), "--label-budgets", "0.5", "1", "--epochs", "8", "--batch-size=2"]
    assert command.main(words(tmp_path, *options, "--dry-run")) == 0
    # (8 of 10 images in 11 epochs and 16 of 20 in 8) for 3 rates of 2 candidates, then all images for 3 seeds
    updates = 6 * (11 * 4 + 8 * 8) + 6 * (11 * 5 + 8 * 10)
    what = (
        f"12 finetunings to choose learning rates and 12 to compare, about {updates:,} updates in all (more while "
        "the best rate is the smallest or largest): from scratch, "
    )
    assert what + "own encoder; with 10, 20 images" in capsys.readouterr().out
    assert not [c for c in calls if "--batch-size" in c]  # the user's is kept
    assert not list((tmp_path / "out").glob("*")) and {c[0] for c in calls} == {"check"}
    assert command.main(words(tmp_path, "--encoder", str(encoder))) == 0


def test_what_a_finetuning_would_refuse_is_refused(tmp_path, encoder, capsys, monkeypatch):
    monkeypatch.setattr(compare, "call", lambda *_: pytest.fail("nothing is started"))
    assert command.main(words(tmp_path, "--encoder", str(encoder), "--recipe", "no-such")) == 2
    assert "no-such" in capsys.readouterr().err


def test_the_cost_of_a_pretraining(pretrained):
    run, _ = pretrained
    with open(run / "summary.csv", newline="") as file:
        epochs = len(list(csv.DictReader(file)))
    text = verdict.pretraining_cost(f"local-dir:{run / 'encoder'}")
    found = re.search(r"for (\d+) epochs, ([\d,]+) updates of (\d+) images", text)
    assert found and int(found[1]) == epochs, text
    settings = yaml.safe_load((run / "args.yaml").read_text())
    assert int(found[3]) == settings["batch_size"] * settings["grad_accum_steps"] and int(found[2]) >= epochs
    assert verdict.pretraining_cost("convnextv2_atto") == ""


def test_a_finetuning_that_fails(tmp_path, calls, encoder, capsys, monkeypatch):
    def fail(command, words, log):
        log.write_text("first\nthe last line\n")
        raise subprocess.CalledProcessError(3, [command, str(log)])

    monkeypatch.setattr(compare, "call", fail)
    assert command.main(words(tmp_path, "--encoder", str(encoder))) == 1
    error = capsys.readouterr().err
    assert "'finetune' failed with status 3" in error and "the last line" in error and "--resume" in error


def test_a_rate_that_diverges_is_a_bad_one(tmp_path, calls, encoder, capsys, monkeypatch):
    """`finetune` fails after its last epoch, because it does not export weights that are not finite."""
    fine = compare.call

    def diverge(command, words, log):
        seconds = fine(command, words, log)
        if command == "finetune" and float(words[words.index("--lr-base") + 1]) > 0.01:
            raise subprocess.CalledProcessError(2, [command, str(log)])
        return seconds

    monkeypatch.setattr(compare, "call", diverge)
    assert command.main(words(tmp_path, "--encoder", str(encoder), "--epochs", "6", "--seeds", "0")) == 0
    assert re.search(r"from scratch, learning rate 0.012: 35.0 % \(\d+ s; ", capsys.readouterr().out)


@pytest.mark.timm_train
def test_with_timm(tmp_path, capsys):
    if not os.environ.get("TIMM_TRAIN"):
        pytest.skip("TIMM_TRAIN=/path/to/timm's/train.py is not set")
    write_folder(tmp_path / "labelled", size=32, train=24, validation=16)
    small = "--img-size 32 --patch-size 1 --decoder-dim 8 --model-kwargs depths=[1,1,1,1] dims=[8,8,8,8] -b 4 -j 0"
    options = ["--unlabelled", str(tmp_path / "labelled/train"), "--pretrain", f"{small} --epochs 1 --device cpu"]
    options += "--epochs 2 --seeds 0 --lr-grid 1 1e12 --recipe smoke --device cpu -b 4 --workers 0".split()
    options += ["--also", "test_resnet"]  # another model of timm, which is trained but not exported
    assert command.main(words(tmp_path, *options)) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out/compare.json").read_text())["top1"]
    assert found["24"].keys() == {verdict.SCRATCH, verdict.OWN, "test_resnet"}
    assert all(0 <= value <= 100 for curve in found["24"].values() for value in curve.values())
