"""The command finetune: with a stand-in for timm's train.py, and (marked `timm_train`) with the real one."""

import csv
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import RECIPES, SCRIPTS, run_python
from PIL import Image
from safetensors.torch import load_file

from timm_convnextv2.checkpoint import load_checkpoint
from timm_convnextv2.commands import finetune
from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune import launch
from timm_convnextv2.recipes import load_recipe
from timm_convnextv2.report.classes import read_classes

SCRIPT = SCRIPTS / "finetune.py"


def test_train_script_gets_recipe_options_and_what_was_found_out(run, train, encoder, data):
    seen = run("--lr-base", "0.5", "--hflip", "0")
    args, recipe = seen["args"], load_recipe("smoke", RECIPES).values
    expected = {**recipe, "lr_base": 0.5, "hflip": 0, "device": "cpu", "batch_size": 8}
    expected |= {"num_classes": 3, "model": f"local-dir:{encoder}", "data_dir": str(data), "experiment": "x"}
    assert {k: args[k] for k in expected} == expected
    assert args["device_modules"] == ["timm_convnextv2"] and args["pretrained"]
    assert seen["argv"][0] == str(train) and seen["config"] == "smoke.yaml"
    assert "timm_train_script" in sys.modules and sys.argv[0] != str(train)


@pytest.mark.parametrize(
    "started, words",
    [
        (SCRIPT, [sys.executable, str(SCRIPT.with_name("publish.py"))]),
        ("timm_convnextv2/__main__.py", [sys.executable, "-m", "timm_convnextv2", "publish"]),
        ("bin/timm-convnextv2", ["timm-convnextv2", "publish"]),
    ],
    ids=["script", "module", "console command"],
)
def test_result_is_exported_and_next_commands_are_printed(run, tmp_path, data, capsys, monkeypatch, started, words):
    console = started if started == "bin/timm-convnextv2" else None
    monkeypatch.setattr(sys, "argv", [str(started)])
    monkeypatch.setattr(shutil, "which", lambda name: console)
    run("--val-split", "val", "--amp", "--amp-dtype", "bfloat16")
    folder = tmp_path / "out" / "x"
    assert (folder / "model" / "exported").read_text() == str(folder)
    assert json.loads((folder / "label_names.json").read_text()) == ["a", "b", "c"]
    validate, publish = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:])
    start = ["timm-convnextv2"] if console else [sys.executable, "-m", "timm_convnextv2"]
    options = f"--model local-dir:out/x/model --data-dir {data} --split val --device cpu --amp --amp-dtype bfloat16"
    assert validate == [*start, "validate", *options.split(" ")]
    assert publish == [*words, os.path.relpath(folder), "USER/NAME", "--license", "ID", "--dry-run"]


@pytest.mark.parametrize("epochs, ended", [(3, "Stopped after 3 epochs of 10"), (10, "Done: ")])
def test_a_run_that_was_stopped_is_not_done(epochs, ended, command, train, tmp_path, capsys):
    plan = finetune.prepare(command())  # 9 epochs + 1 of warmup
    plan.folder.mkdir(parents=True)
    (plan.folder / "last.pth.tar").touch()
    rows = [f"{epoch},1.0" for epoch in range(epochs)]
    (plan.folder / "summary.csv").write_text("\n".join(["epoch,train_loss", *rows]) + "\n")
    assert finetune.finish(plan) == 0
    printed = capsys.readouterr().out
    assert ended in printed and ("--resume" in printed) == (epochs < 10)
    assert ("Done: " in printed) == (epochs == 10)


def test_from_scratch_is_the_same_but_for_the_weights(run, capsys):
    pretrained, scratch = run()["args"], run("--from-scratch", experiment="scratch")["args"]
    assert "random weights" in capsys.readouterr().out
    assert {**pretrained, "pretrained": False, "experiment": "scratch"} == scratch and pretrained["pretrained"]


@pytest.mark.parametrize("option", [["--pretrained"], ["--initial-checkpoint", "x"], ["--pretrained-path", "x"]])
def test_from_scratch_contradicts_weights(refused, option):
    assert option[0] in refused("--from-scratch", *option)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--pretrained-path", "x.safetensors"], "only with --pretrained"), (["--config", "x.yaml"], "--recipe FILE"),
        (["--config=x.yaml"], "--recipe FILE"), (["-c", "x.yaml"], "--recipe FILE"),
    ],
)  # fmt: skip
def test_words_that_train_script_would_not_heed_are_refused(refused, recipe_file, words, expected):
    assert expected in refused(*words, recipe=recipe_file(opt="adamw"))


def test_own_recipe_file_and_other_modules(run, recipe_file):
    args = run("--device-modules", "colorsys", recipe=recipe_file(epochs=3, pretrained=True, lr_base=0.1))["args"]
    assert args["epochs"] == 3 and args["device_modules"] == ["colorsys", "timm_convnextv2"]


@pytest.mark.parametrize("words", [["--recipe", "smoke", "--device", "cpu", "--model", "x"], ["--data-dir", "x"]])
def test_recipe_and_data_are_needed(train, capsys, words):
    assert main(words) == 2
    assert ("--data-dir" if "--recipe" in words else "--recipe") + " is needed" in capsys.readouterr().err


def test_exit_status_interrupts_and_errors_pass_through(command, monkeypatch, capsys):
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as e:
        main(command("--seed", "13"))
    assert e.value.code == 7
    with pytest.raises(KeyboardInterrupt):
        main(command("--seed", "14"))
    with pytest.raises(ValueError, match="from inside"):
        main(command("--seed", "15"))
    assert sys.argv == argv
    assert main(command("--seed", "16")) == 1
    assert "without a checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(launch, "export_finetuned", lambda *_, **__: int("it cannot be"))
    assert main(command(experiment="y")) == 1
    assert "it cannot be" in capsys.readouterr().err


def test_dry_run_tells_everything_and_does_nothing(command, train, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = sorted(tmp_path.rglob("*.json"))
    words = command("--dry-run", "--global-batch-size", "16", "--layer-decay", "0.5", recipe="small-data", device=None)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert str(train) in out and f"timm {timm.__version__} is installed" in out
    assert f"{data / 'train'}: 24 images" in out and f"{data / 'validation'}: 12 images" in out and "3 classes" in out
    assert "global batch 16 = 8 images x 2 processes x 1 step; lr 0.0004 (0.0016 x sqrt(16 / 256))" in out
    assert "the recipe's is 64, lr 0.0008" in out
    assert "100 epochs (90 + 10 of warmup) of 1 update" in out
    assert "stem.0.weight 0.03125" in out and "head.fc.bias 1" in out  # five blocks: 0.5 ** 5
    assert "  layer_decay: 0.5\n" in out and "  num_classes: 3\n" in out and "hflip" not in out
    assert sorted(tmp_path.rglob("*.json")) == before and not (tmp_path / "out").exists()


def test_other_processes_are_silent_and_do_not_export(command, monkeypatch, tmp_path, capsys):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(command()) == 0
    assert main(command(recipe="nothing")) == 2
    assert capsys.readouterr() == ("", "") and not (tmp_path / "out").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first process of another node
    assert main(command(data="/not/on/this/node")) == 2
    assert "/not/on/this/node" in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone(timm_train, tmp_path_factory):
    """train.py and validate.py outside of their repository, so that they import the installed timm."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("train.py", "validate.py"):
        shutil.copy(timm_train.with_name(name), folder)
    return folder


def python(*words, cwd):
    result = run_python(*words, cwd=cwd, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def summary(folder):
    with open(folder / "summary.csv", newline="") as f:
        return [{k: v for k, v in row.items() if "time" not in k} for row in csv.DictReader(f)]


SHORT = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tuned(timm_train, encoder, data, tmp_path_factory):
    """One run of the script with the real train.py: its folder and what it printed."""
    out = tmp_path_factory.mktemp("tuned")
    words = ["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--data-dir", data, "--output", out]
    result = python(SCRIPT, *words, "--experiment", "run", "--timm-train", timm_train, *SHORT, "--model-ema", cwd=out)
    return out / "run", result


@pytest.mark.timm_train
def test_real_run(tuned):
    folder, result = tuned
    assert len(summary(folder)) == 3
    results, page = read_classes(folder), (folder / "report.html").read_text(encoding="utf-8")
    assert [(of.name, of.count) for of in results.classes] == [("a", 4), ("b", 4), ("c", 4)]
    assert ">taken for</th>" in page or all(of.value == 1 for of in results.classes)
    publish = result.stdout.splitlines()[-1].split()
    assert publish[0] in ("python", sys.executable)
    assert publish[1:] == [str(SCRIPT.with_name("publish.py")), "run", "USER/NAME", "--dry-run"]
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["num_classes"] == 3 and args["device_modules"] == ["timm_convnextv2"]
    # the rate in the description is the one that train.py computes
    described = float(re.search(r"; lr ([\d.e-]+) \(", result.stdout)[1])
    computed = float(re.search(r"Learning rate \(([\d.e-]+)\) calculated", result.stdout + result.stderr)[1])
    assert described == pytest.approx(computed, rel=1e-3)
    best = load_checkpoint(folder / "model_best.pth.tar")  # the average is exported, with the metrics that it had
    exported = load_file(folder / "model/model.safetensors")
    config = json.loads((folder / "model/config.json").read_text())
    assert all(torch.equal(value, best["state_dict_ema"][name]) for name, value in exported.items())
    assert config["training"]["metrics"]["top1"] == pytest.approx(best["metric"], abs=1e-3)
    assert config["pretrained_cfg"]["license"] == "mit" and config["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.timm_train
def test_same_run_by_hand(tuned, alone, encoder, data, tmp_path):
    words = ["--device-modules", "timm_convnextv2", "--config", RECIPES / "smoke.yaml"]
    words += ["--model", f"local-dir:{encoder}", "--data-dir", data, "--num-classes", 3]
    words += ["--output", tmp_path, "--experiment", "hand"]
    python(alone / "train.py", *words, *SHORT, "--model-ema", cwd=tmp_path)
    assert summary(tmp_path / "hand") == summary(tuned[0])


@pytest.mark.timm_train
def test_real_run_of_two_processes(timm_train, encoder, data, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "timm_convnextv2", "finetune"]
    words += ["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--data-dir", data]
    words += ["--output", tmp_path, "--experiment", "two"]
    words += ["--timm-train", timm_train, *SHORT, "--batch-size", 2, "--global-batch-size", 8]
    result = python(*words, cwd=tmp_path)
    assert result.stdout.count("global batch 8 = 2 images x 2 processes x 2 steps") == 1
    assert result.stdout.count("Done: ") == 1
    assert len(summary(tmp_path / "two")) == 3
    model = timm.create_model(f"local-dir:{tmp_path / 'two' / 'model'}", pretrained=True)
    assert model.num_classes == 3


def write_16_bit(root):
    """Two classes of 16-bit grey that differ in brightness alone, all values above 255."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("validation", 8)):
        for label, level in (("dark", 6000), ("bright", 50000)):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                x = rng.integers(level - 1000, level + 1000, (32, 32), dtype=np.uint16)
                Image.fromarray(x).save(root / split / label / f"{i}.png")


@pytest.fixture(scope="module")
def bright(timm_train, encoder, tmp_path_factory):
    """A finetuning on two classes of 16-bit grey: its folder and its data."""
    out = tmp_path_factory.mktemp("bright")
    write_16_bit(out / "data")
    words = ["-m", "timm_convnextv2", "finetune", "--recipe", "smoke", "--model", f"local-dir:{encoder}"]
    words += ["--data-dir", out / "data", "--output", out, "--experiment", "run", "--timm-train", timm_train, *SHORT]
    words += ["--epochs", "6", "--in-chans", "1", "--lr-base", "0.1", "--reprob", "0", "--mixup", "0", "--cutmix", "0"]
    return out, python(*words, cwd=out)


@pytest.mark.timm_train
def test_16_bit_classes_are_learnt_validated_and_predicted(bright, timm_train):
    out, result = bright
    assert max(float(row["eval_top1"]) for row in summary(out / "run")) == 100
    assert "not 8-bit with 1 channel" in result.stderr and "--mean 0.4: the average" in result.stdout
    config = json.loads((out / "run" / "model" / "config.json").read_text())
    assert config["label_names"] == ["bright", "dark"] and "num_classes" not in config.get("model_args", {})
    common = [out / "run" / "model", "--device", "cpu", "--workers", "1", "--batch-size", "8"]
    common += ["--timm-train", timm_train, "--data-dir", out / "data"]
    python("-m", "timm_convnextv2", "validate", *common, "--results-file", out / "v.csv", cwd=out)
    assert float(next(csv.DictReader((out / "v.csv").open()))["top1"]) == 100
    words = ["--label-type", "name", "--results-file", "p", "--no-console-results", "--fullname"]
    pytest.importorskip("pandas", reason="inference.py needs pandas")
    python("-m", "timm_convnextv2", "predict", *common, *words, cwd=out)
    rows = list(csv.DictReader((out / "p.csv").open()))
    assert len(rows) == 16 and all(row["filename"].startswith(row["label"] + "/") for row in rows)
    for words, files in ((), ["predictions.csv"]), (("--results-dir", "d", "--results-format", "csv", "json"),
                         ["d/predictions.csv", "d/predictions.json"]):  # fmt: skip
        said = python("-m", "timm_convnextv2", "predict", *common, *words, cwd=out).stdout
        assert said.splitlines()[-1] == f"Written: {', '.join(files)}" and len(said.splitlines()) < 10, said
        assert all((out / file).is_file() for file in files)


@pytest.mark.timm_train
def test_our_validate_agrees_with_stock_and_with_training(tuned, alone, data, timm_train, tmp_path):
    folder, _ = tuned
    words = ["--model", f"local-dir:{folder / 'model'}", "--data-dir", data, "--device", "cpu", "--workers", 1]
    words += ["--results-format", "json", "--batch-size", 4, "--results-file"]
    python(alone / "validate.py", *words, tmp_path / "stock.json", cwd=tmp_path)
    ours = ["-m", "timm_convnextv2", "validate", "--timm-train", timm_train]
    python(*ours, *words, tmp_path / "our.json", cwd=tmp_path)
    stock, our = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("stock", "our"))
    best = max(float(row["eval_top1"]) for row in summary(folder))
    assert our == stock and stock["top1"] == pytest.approx(best, abs=1e-3) and stock["img_size"] == 32
