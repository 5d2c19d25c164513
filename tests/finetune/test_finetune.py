"""The launcher: with a stand-in for timm's train.py, and (marked `timm_train`) with the real one."""

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import RECIPES, ROOT
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from timm.data import rand_augment_transform
from timm.models import save_for_hf

import timm_convnextv2  # noqa: F401
import timm_convnextv2.checkpoint as checkpoint

SCRIPT = ROOT / "train_scripts" / "finetune.py"
spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
finetune = importlib.util.module_from_spec(spec)
sys.modules["finetune"] = finetune
spec.loader.exec_module(finetune)

CLASSES = ("a", "b", "c")
# A train.py in small: timm's options, as far as launcher and recipes need them, and a main() that notes what it got.
STAND_IN = """
import argparse, importlib, json, os, sys
from pathlib import Path
import yaml
from timm.utils import ParseKwargs

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser(prog="train.py")
parser.add_argument("data", nargs="?")
for name in ("pretrained", "amp", "sched_on_updates", "warmup_prefix", "model_ema", "model_ema_warmup", "pin_mem"):
    parser.add_argument("--" + name.replace("_", "-"), action="store_true")
for name, kind, default in (
    ("data_dir", str, None), ("dataset", str, ""), ("train_split", str, "train"), ("val_split", str, "validation"),
    ("class_map", str, ""), ("input_key", str, None), ("target_key", str, None), ("input_img_mode", str, None),
    ("model", str, "resnet50"), ("pretrained_path", str, None), ("initial_checkpoint", str, ""), ("resume", str, ""),
    ("num_classes", int, None), ("gp", str, None), ("in_chans", int, None), ("img_size", int, None),
    ("crop_pct", float, None), ("interpolation", str, ""), ("drop_path", float, None), ("head_init_scale", float, None),
    ("device", str, "cuda"), ("amp_dtype", str, "float16"), ("batch_size", int, 128), ("grad_accum_steps", int, 1),
    ("opt", str, "sgd"), ("opt_eps", float, None), ("weight_decay", float, 2e-5), ("clip_grad", float, None),
    ("layer_decay", float, None), ("layer_decay_min_scale", float, 0), ("layer_decay_no_opt_scale", float, None),
    ("lr", float, None), ("lr_base", float, 0.1), ("lr_base_size", int, 256), ("lr_base_scale", str, ""),
    ("sched", str, "cosine"), ("min_lr", float, 0), ("warmup_lr", float, 1e-5), ("warmup_epochs", int, 5),
    ("epochs", int, 300), ("cooldown_epochs", int, 0), ("aa", str, None), ("color_jitter", float, 0.4),
    ("train_interpolation", str, "random"), ("reprob", float, 0.0), ("remode", str, "pixel"), ("mixup", float, 0.0),
    ("cutmix", float, 0.0), ("smoothing", float, 0.1), ("model_ema_decay", float, 0.9998), ("hflip", float, 0.5),
    ("workers", int, 4), ("checkpoint_hist", int, 10), ("log_interval", int, 50), ("seed", int, 42),
    ("output", str, ""), ("experiment", str, ""),
):
    parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
parser.add_argument("--opt-betas", type=float, nargs="+")
parser.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0])
parser.add_argument("--ratio", type=float, nargs="+", default=[0.75, 1.33])
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--device-modules", nargs="+")


class ClassificationTask:
    def prepare_distributed(self, device_ids=None, **kwargs):
        return device_ids, kwargs


def main():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as f:
            parser.set_defaults(**yaml.safe_load(f))
    args = parser.parse_args(remaining)
    for module in args.device_modules or []:
        importlib.import_module(module)
    if args.seed == 13:
        sys.exit(7)
    if args.seed == 14:
        raise KeyboardInterrupt
    if args.seed == 15:
        raise ValueError("from inside")
    if os.environ.get("RANK", "0") == "0":
        folder = Path(args.output) / args.experiment
        folder.mkdir(parents=True, exist_ok=True)
        seen = dict(args=vars(args), argv=sys.argv, config=Path(config.config).name)
        (folder / "seen.json").write_text(json.dumps(seen))
        if args.seed != 16:
            (folder / "last.pth.tar").write_bytes(b"")


if __name__ == "__main__":
    main()
"""


def pictures(root, classes=CLASSES, n=8, size=32):
    """A split: a folder of `n` PNGs a class, each class of a colour of its own."""
    for i, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for j in range(n):
            colour = [(40 + 7 * j + 60 * (i == channel)) % 256 for channel in range(3)]
            Image.new("RGB", (size, size), tuple(colour)).save(root / label / f"{j}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    pictures(root / "train")
    pictures(root / "validation", n=4)
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A timm folder of a tiny ConvNeXt V2 without classifier, as pretrain.py exports."""
    folder = tmp_path_factory.mktemp("run") / "encoder"
    shape = dict(patch_size=1, depths=[1, 1, 2, 1], dims=[8, 8, 16, 16])
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", num_classes=0, **shape)
    cfg = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), num_classes=0, license="mit")
    save_for_hf(model, folder, model_config=dict(pretrained_cfg=cfg), model_args=shape, safe_serialization=True)
    return folder


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A stand-in given as TIMM_TRAIN, and an export that only notes its call."""
    path = tmp_path / "timm" / "train.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    monkeypatch.setenv("TIMM_TRAIN", str(path))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def export_finetuned(source, folder, **_):
        folder.mkdir()
        (folder / "exported").write_text(str(source))
        return folder

    monkeypatch.setattr(checkpoint, "export_finetuned", export_finetuned)
    monkeypatch.setattr(ImageOps, "posterize", lambda image, bits: image)  # as Pillow before 13, for any bits
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def command(train, data, encoder, tmp_path):
    def make(*more, recipe="smoke", experiment="x", model=f"local-dir:{encoder}", data=data, device="cpu"):
        words = ["--recipe", str(recipe), "--data-dir", str(data), "--output", str(tmp_path / "out")]
        words += ["--model", model] if model else []
        words += ["--experiment", experiment] if experiment else []
        words += ["--device", device] if device else []
        return [*words, "--batch-size", "8", *more]

    return make


@pytest.fixture
def run(command, tmp_path):
    """Runs the launcher and gives what train.py got."""

    def run(*more, **kwargs):
        assert finetune.cli(command(*more, **kwargs)) == 0
        return json.loads((tmp_path / "out" / kwargs.get("experiment", "x") / "seen.json").read_text())

    return run


@pytest.fixture
def refused(command, tmp_path, capsys):
    """Runs the launcher, which must refuse in one line and leave nothing; gives the message."""

    def refused(*more, **kwargs):
        before = sorted(tmp_path.rglob("*"))
        assert finetune.cli(command(*more, **kwargs)) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts] == before
        return err

    return refused


def recipe_file(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


# ------------------------------------------------------------------------------------------------------------- it runs


def test_train_script_gets_recipe_options_and_what_was_found_out(run, train, encoder, data):
    seen = run("--lr-base", "0.5", "--hflip", "0")
    args, recipe = seen["args"], finetune.load_recipe("smoke").values
    expected = {**recipe, "lr_base": 0.5, "hflip": 0, "device": "cpu", "batch_size": 8}
    expected |= {"num_classes": 3, "model": f"local-dir:{encoder}", "data_dir": str(data), "experiment": "x"}
    assert {k: args[k] for k in expected} == expected
    assert args["device_modules"] == ["timm_convnextv2"] and args["pretrained"]
    assert seen["argv"][0] == str(train) and seen["config"] == "smoke.yaml"
    assert "timm_train_script" in sys.modules and sys.argv[0] != str(train)


def test_result_is_exported_and_next_commands_are_printed(run, tmp_path, data, capsys):
    run("--val-split", "val", "--amp", "--amp-dtype", "bfloat16")
    folder = tmp_path / "out" / "x"
    assert (folder / "model" / "exported").read_text() == str(folder)
    validate, publish = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert validate == (
        f"python validate.py --model local-dir:{folder}/model --pretrained --data-dir {data} --split val --device cpu "
        "--amp --amp-dtype bfloat16"
    ).split(" ")
    assert publish == f"python {ROOT}/train_scripts/publish.py {folder} USER/NAME --dry-run".split(" ")


def test_from_scratch_is_the_same_but_for_the_weights(run, capsys):
    pretrained, scratch = run()["args"], run("--from-scratch", experiment="scratch")["args"]
    assert "random weights" in capsys.readouterr().out
    assert {**pretrained, "pretrained": False, "experiment": "scratch"} == scratch and pretrained["pretrained"]


@pytest.mark.parametrize("option", [["--pretrained"], ["--initial-checkpoint", "x"], ["--pretrained-path", "x"]])
def test_from_scratch_contradicts_weights(refused, option):
    assert option[0] in refused("--from-scratch", *option)


def test_own_recipe_file_and_other_modules(run, tmp_path, capsys):
    path = recipe_file(tmp_path / "mine.yaml", epochs=3, pretrained=True, lr_base=0.1)
    args = run("--device-modules", "colorsys", recipe=path)["args"]
    assert args["epochs"] == 3 and args["device_modules"] == ["colorsys", "timm_convnextv2"]


def test_without_pretrained_the_weights_would_be_left_out(run, tmp_path, capsys):
    path = recipe_file(tmp_path / "mine.yaml", epochs=3)
    assert not run(recipe=path)["args"]["pretrained"]
    assert "are not loaded" in capsys.readouterr().err
    run("--pretrained", recipe=path, experiment="y")
    assert "are not loaded" not in capsys.readouterr().err


def test_run_folder_is_named_as_by_timm(command, tmp_path, encoder):
    assert finetune.cli(command(experiment=None)) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{timm.models.safe_model_name(f'local-dir:{encoder}')}-32", folder.name)
    assert (folder / "model").is_dir()


def test_folder_of_another_run(run, refused, tmp_path):
    run()
    message = refused()
    assert "--resume" in message and "--experiment" in message
    assert "no such file" in refused("--resume", str(tmp_path / "none.pth.tar"))
    shutil.rmtree(tmp_path / "out" / "x" / "model")
    run("--resume", str(tmp_path / "out" / "x" / "last.pth.tar"))


def test_exit_status_interrupts_and_errors_pass_through(command, capsys):
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as e:
        finetune.cli(command("--seed", "13"))
    assert e.value.code == 7
    with pytest.raises(KeyboardInterrupt):
        finetune.cli(command("--seed", "14"))
    with pytest.raises(ValueError, match="from inside"):
        finetune.cli(command("--seed", "15"))
    assert sys.argv == argv
    assert finetune.cli(command("--seed", "16")) == 1
    assert "without a checkpoint" in capsys.readouterr().err


def test_failed_export_is_an_error(command, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("it cannot be")

    monkeypatch.setattr(checkpoint, "export_finetuned", fail)
    assert finetune.cli(command()) == 1
    assert "it cannot be" in capsys.readouterr().err


def test_dry_run_tells_everything_and_does_nothing(command, train, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = sorted(tmp_path.rglob("*.json"))
    words = command("--dry-run", "--global-batch-size", "16", "--layer-decay", "0.5", recipe="small-data", device=None)
    assert finetune.cli(words) == 0
    out = capsys.readouterr().out
    assert str(train) in out and f"timm {timm.__version__} is installed" in out
    assert f"{data / 'train'}: 24 images" in out and f"{data / 'validation'}: 12 images" in out and "3 classes" in out
    assert "global batch 16 = 8 images x 2 processes x 1 step; lr 5e-05 (0.0008 x 16 / 256)" in out
    assert "the recipe's is 64, lr 0.0002" in out
    assert "100 epochs (90 + 10 of warmup) of 1 update" in out
    assert "stem.0.weight 0.03125" in out and "head.fc.bias 1" in out  # five blocks: 0.5 ** 5
    assert "  layer_decay: 0.5\n" in out and "  num_classes: 3\n" in out and "hflip" not in out
    assert sorted(tmp_path.rglob("*.json")) == before and not (tmp_path / "out").exists()


def test_as_a_script(command, tmp_path):
    words = [sys.executable, str(SCRIPT), *command("--no-such-option")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and "unrecognized arguments: --no-such-option" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_list_recipes(capsys):
    assert finetune.cli(["--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in RECIPES.glob("*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


# ------------------------------------------------------------------------------------------------------------- recipes


def test_unknown_recipe_lists_all(refused):
    message = refused(recipe="finetune-1k-tinny")
    assert "Did you mean 'finetune-1k-tiny'?" in message and all(n in message for n in finetune.recipe_names())


@pytest.mark.parametrize(
    "text, words", [("", "NoneType"), ("- a\n", "list"), ("a: [", "cannot be read"), (None, "none")]
)
def test_recipe_file_that_is_none(refused, tmp_path, text, words):
    path = tmp_path / "none.yaml"
    if text is not None:
        path.write_text(text)
    assert words in refused(recipe=path)


@pytest.mark.parametrize("key, near", [("epoch", "epochs"), ("layer-decay", "layer_decay"), ("xyzzy", None)])
def test_recipe_key_that_train_script_does_not_know(refused, train, tmp_path, key, near):
    message = refused(recipe=recipe_file(tmp_path / "mine.yaml", **{"lr_base": 0.1, key: 1}))
    assert f"'{key}'" in message and str(train) in message
    assert (f"Did you mean '{near}'?" in message) if near else ("Did you mean" not in message)


@pytest.mark.parametrize("words", [["--config", "x.yaml"], ["--config=x.yaml"], ["-c", "x.yaml"]])
def test_config_is_the_launchers(refused, words):
    assert "--recipe FILE" in refused(*words)


def test_recipe_is_needed(capsys):
    assert finetune.cli(["--data-dir", "x"]) == 2
    assert "--recipe is needed" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("world, wanted, steps", [(1, 8, 1), (1, 24, 3), (2, 16, 1), (2, 48, 3)])
def test_global_batch(run, monkeypatch, capsys, world, wanted, steps):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = run("--global-batch-size", str(wanted))["args"]
    assert args["grad_accum_steps"] == steps and args["batch_size"] * steps * world == wanted
    lr = finetune.load_recipe("smoke").values["lr_base"] * wanted / 256
    assert f"global batch {wanted} = 8 images" in (out := capsys.readouterr().out)
    assert float(re.search(r"lr ([\d.e-]+) \(", out)[1]) == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize(
    "world, wanted, ways",
    [
        (1, 20, ["--batch-size 4 or 5 or 10", "--global-batch-size 16 or 24"]),
        (2, 20, ["--batch-size 2 or 5 or 10", "--global-batch-size 16 or 32"]),
        (2, 21, ["--global-batch-size 16 or 32"]),
        (1, 4, ["--batch-size 1 or 2 or 4", "--global-batch-size 8"]),
        (1, 0, ["--global-batch-size 8"]),
    ],
)
def test_global_batch_that_does_not_divide(refused, monkeypatch, world, wanted, ways):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    message = refused("--global-batch-size", str(wanted))
    assert all(way in message for way in ways), message


def test_global_batch_against_steps(refused):
    assert "--grad-accum-steps 3" in refused("--global-batch-size", "24", "--grad-accum-steps", "2")


@pytest.mark.parametrize(
    "options, lr",
    [
        (["--lr", "0.3"], 0.3),
        (["--lr-base", "0.2", "--lr-base-size", "8"], 0.2),
        (["--lr-base", "0.1", "--lr-base-size", "32", "--lr-base-scale", "sqrt"], 0.05),
        (["--lr-base", "0.1", "--lr-base-size", "32", "--lr-base-scale", ""], 0.05),  # train.py: sqrt for AdamW
        (["--lr-base", "0.1", "--lr-base-size", "32", "--lr-base-scale", "", "--opt", "sgd"], 0.025),
    ],
)
def test_learning_rate_that_train_script_will_compute(command, capsys, options, lr):
    assert finetune.cli(command("--dry-run", *options)) == 0
    assert f"lr {lr:g} (" in capsys.readouterr().out


def test_other_processes_are_silent_and_do_not_export(command, monkeypatch, tmp_path, capsys):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert finetune.cli(command()) == 0
    assert finetune.cli(command(recipe="nothing")) == 2
    assert capsys.readouterr() == ("", "") and not (tmp_path / "out").exists()


def test_processes_on_cpu(command, train, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finetune.cli(command("--dry-run")) == 0
    task = sys.modules["timm_train_script"].ClassificationTask()
    assert task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=False) == (
        None,
        dict(broadcast_buffers=False),
    )
    train.write_text(STAND_IN.replace("class ClassificationTask", "class Other"))
    assert finetune.cli(command("--dry-run")) == 2
    assert "several processes on CPU" in capsys.readouterr().err


def test_each_node_tells_its_own_mistake(command, monkeypatch, capsys):
    for name, value in (("RANK", "8"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert finetune.cli(command(data="/not/on/this/node")) == 2
    assert "/not/on/this/node" in capsys.readouterr().err


def test_fewer_images_than_a_batch(refused, monkeypatch):
    assert "--batch-size 24 or less" in refused("--batch-size", "25")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--batch-size 6 or less" in refused("--batch-size", "8")


# ---------------------------------------------------------------------------------------------------------------- data


def without(folder):
    shutil.rmtree(folder)


BROKEN = {
    "no validation": (lambda root: without(root / "validation"), ["--val-split 'validation'", "it has train"]),
    "no train": (lambda root: without(root / "train"), ["--train-split 'train'", "it has validation"]),
    "empty": (lambda root: [p.unlink() for p in (root / "validation").rglob("*.png")], ["0 images", "sub-folder"]),
    "class less": (lambda root: without(root / "validation" / "b"), ["3 classes", "2", "only in", "b"]),
    "other class": (lambda root: (root / "train" / "c").rename(root / "train" / "d"), ["/train: d", "/validation: c"]),
    "no classes": (lambda root: shutil.copy(root / "train" / "a" / "0.png", root / "train"), ["in no sub-folder"]),
    "nothing": (lambda root: without(root), ["does not exist", "train/ and validation/"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_data_folder(refused, data, tmp_path, case):
    root = tmp_path / "broken"
    shutil.copytree(data, root)
    damage, words = BROKEN[case]
    damage(root)
    message = refused(data=root)
    assert all(word in message for word in [*words, str(root)]), message


def test_data_folder_is_needed(train, encoder, capsys):
    assert finetune.cli(["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--device", "cpu"]) == 2
    assert "--data-dir is needed" in capsys.readouterr().err


def test_number_of_classes(run, refused, capsys):
    assert run("--num-classes", "3")["args"]["num_classes"] == 3
    assert "3 classes (a, b, c)" in refused("--num-classes", "5")
    # a recipe's is for ImageNet, the folder's is counted
    assert run(recipe="finetune-1k-atto", experiment="y")["args"]["num_classes"] == 3
    assert "replace the recipe's 1000" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("training", "val"), ("train", "eval")])
def test_split_names_that_timm_takes(run, data, tmp_path, names):
    for name, source in zip(names, ("train", "validation"), strict=True):
        shutil.copytree(data / source, tmp_path / "other" / name)
    run(data=tmp_path / "other")
    shutil.copytree(data / "train", tmp_path / "other" / "mine")
    assert run("--train-split", "mine", data=tmp_path / "other", experiment="y")["args"]["train_split"] == "mine"


def test_without_validation(run, data, tmp_path, capsys):
    shutil.copytree(data / "train", tmp_path / "other" / "train")
    assert run("--val-split", "", data=tmp_path / "other")["args"]["val_split"] == ""
    assert "validate.py" not in capsys.readouterr().out


def test_other_data_sets_are_left_to_train_script(run, refused):
    assert "--num-classes is needed" in refused("--dataset", "hfds/some/name")
    args = run("--dataset", "hfds/some/name", "--num-classes", "7")["args"]
    assert args["dataset"] == "hfds/some/name" and args["num_classes"] == 7


def test_augmentation_that_pillow_refuses(run, refused, monkeypatch):
    def posterize(image, bits):
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between or equal to 1 and 8")
        return image

    monkeypatch.setattr(ImageOps, "posterize", posterize)
    message = refused(recipe="finetune-1k-atto")
    assert "pillow<13" in message
    policy = re.search(r"--aa (\S+-mmax9)$", message.strip())[1]
    assert run("--aa", policy, recipe="finetune-1k-atto")["args"]["aa"] == policy
    run("--aa", "", recipe="finetune-1k-atto", experiment="y")

    image, bits = Image.new("RGB", (8, 8)), []
    monkeypatch.setattr(ImageOps, "posterize", lambda image, n: bits.append(n) or image)
    for name in (policy, policy.removesuffix("-mmax9")):
        augment = rand_augment_transform(name, {})
        bits.clear()
        for _ in range(4000):
            augment(image)
        assert (min(bits) < 1) == (name != policy)


# --------------------------------------------------------------------------------------------------------------- model


def rewrite(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


MODELS = {
    "no folder": (lambda f: without(f), ["no such folder", "model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), ["JSON"]),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), ["not timm's"]),
    "foreign": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), ["not timm's", "architecture"]),
    "unknown": (lambda f: rewrite(f, architecture="convnextv2_attoo"), ["'convnextv2_attoo'", "'convnextv2_atto'"]),
    "FCMAE": (lambda f: rewrite(f, architecture="fcmae_convnextv2_atto"), ["whole FCMAE", "encoder"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
    "another": (lambda f: rewrite(f, architecture="resnet18", model_args={}), ["holds a ConvNeXt V2", "'resnet18'"]),
    "options": (lambda f: rewrite(f, model_args={"no_such": 1}), ["cannot be created", "no_such"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_broken_model_folder(refused, encoder, tmp_path, case):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    damage, words = MODELS[case]
    damage(folder)
    message = refused(model=f"local-dir:{folder}")
    assert all(word in message for word in [*words, str(folder)]), message


def test_config_alone_is_enough_from_scratch(run, encoder, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(encoder / "config.json", tmp_path / "model")
    assert run("--from-scratch", model=f"local-dir:{tmp_path / 'model'}")["args"]["num_classes"] == 3


def test_run_folder_instead_of_its_encoder(refused, encoder):
    assert f"Did you mean local-dir:{encoder}?" in refused(model=f"local-dir:{encoder.parent}")


@pytest.mark.parametrize(
    "model, words", [(None, "--model is needed"), ("convnextv2_tny", "'convnextv2_tiny'"), ("a/b", "hf-hub:")]
)
def test_model_name(refused, model, words):
    assert words in refused(model=model)


def test_other_models_are_allowed_with_a_warning(run, capsys):
    run(model="resnet18")
    assert "not a ConvNeXt V2" in capsys.readouterr().err
    run(model="convnextv2_atto", experiment="y")
    assert "not a ConvNeXt V2" not in capsys.readouterr().err


def test_layers_that_hardly_learn(run, capsys):
    run("--layer-decay", "0.2")
    assert "3.2e-04 of the rate" in capsys.readouterr().err  # 0.2 ** 5


def test_cuda_that_is_not_there(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused(device="cuda")


# ------------------------------------------------------------------------------------------------------------ train.py


@pytest.fixture
def server():
    """A loopback HTTP server; `answers` maps paths to (status, body, bytes sent of it, seconds before)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            status, body, sent, delay = server.answers.get(self.path, (404, b"", None, 0))
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[:sent])
            except OSError:  # the client left
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.answers, server.requests = {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/timm"
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_TRAIN", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "timm_convnextv2" / f"train-{timm.__version__}.py"


PAGE = f"/timm/v{timm.__version__}/train.py"


def test_order_of_the_places(tmp_path, monkeypatch, server, cache):
    server.answers[PAGE] = (200, STAND_IN.encode(), None, 0)
    assert finetune.find_train_script(base_url=server.url) == cache

    clone = tmp_path / "clone"
    (clone / "timm").mkdir(parents=True)
    monkeypatch.setattr(timm, "__file__", str(clone / "timm" / "__init__.py"))
    (clone / "train.py").write_text("print('of another project')\n")
    assert finetune.find_train_script(base_url=server.url) == cache
    (clone / "train.py").write_text(STAND_IN)
    assert finetune.find_train_script(base_url=server.url) == clone / "train.py"

    for name in ("variable", "option"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(STAND_IN)
    monkeypatch.setenv("TIMM_TRAIN", str(tmp_path / "variable" / "train.py"))
    assert finetune.find_train_script(base_url=server.url) == tmp_path / "variable" / "train.py"
    option = str(tmp_path / "option")  # a clone's folder
    assert finetune.find_train_script(option, base_url=server.url) == tmp_path / "option" / "train.py"


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def of_another_model(folder):
    save_for_hf(timm.create_model("resnet18", num_classes=0), folder.parent / "other", safe_serialization=True)
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)


def of_another_width(folder):
    shape = dict(patch_size=1, depths=[1, 1, 2, 1], dims=[8, 8, 16, 24])
    model = timm.create_model("convnextv2_atto", num_classes=0, **shape)
    save_for_hf(model, folder.parent / "other", model_args=shape, safe_serialization=True)
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)


def without_a_block(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("stages.2.blocks.1.")}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut_off, "1000 bytes.*truncated"),
        (of_another_model, "weights have .* of the"),
        (of_another_width, r"'stages\.3\.downsample\.1\.weight' is \[24, 16, 2, 2\] in the file and \[16, 16, 2, 2\]"),
        (without_a_block, "stages.2.blocks.1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(refused, run, encoder, tmp_path, damage, words):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    damage(folder)
    message = refused(model=f"local-dir:{folder}")
    assert str(folder / "model.safetensors") in message and re.search(words, message)
    run("--from-scratch", model=f"local-dir:{folder}")  # which does not read them


def test_grey_and_headed_weights_pass_the_check(run, encoder, tmp_path):
    run("--in-chans", "1", experiment="grey")
    model = timm.create_model(f"local-dir:{encoder}", num_classes=7)
    save_for_hf(
        model, tmp_path / "headed", model_args=model.pretrained_cfg.get("model_args") or {}, safe_serialization=True
    )
    shutil.copy(encoder / "config.json", tmp_path / "headed")
    run(model=f"local-dir:{tmp_path / 'headed'}", experiment="headed")


@pytest.mark.parametrize(
    "options, words", [(["--no-such-option", "1"], "no-such-option"), (["--epochs", "many"], "many")]
)
def test_options_that_train_script_does_not_take_are_one_message(refused, options, words):
    assert words in refused(*options)


def test_download_is_cached(server, cache):
    server.answers[PAGE] = (200, STAND_IN.encode(), None, 0)
    for _ in range(2):
        assert finetune.download_train_script(timm.__version__, base_url=server.url) == cache
    assert server.requests == [PAGE] and cache.read_text() == STAND_IN and list(cache.parent.iterdir()) == [cache]
    assert finetune.script_version(cache) == timm.__version__
    cache.write_text(STAND_IN[:2000])  # a cache that something cut off is no train.py
    finetune.download_train_script(timm.__version__, base_url=server.url)
    assert cache.read_text() == STAND_IN


TAIL = STAND_IN.index("\n\nif __name__")
DOWNLOADS = {
    "not there": (404, b"", None, 0),
    "server error": (503, b"busy", None, 0),
    "cut off by the connection": (200, STAND_IN.encode(), 3000, 0),
    "cut off in a line": (200, STAND_IN[:3000].encode(), None, 0),
    "cut off between lines": (200, STAND_IN[:TAIL].encode(), None, 0),
    "a login page": (200, b"<html>please log in</html>", None, 0),
    "not text": (200, bytes(range(256)), None, 0),
    "slow": (200, STAND_IN.encode(), None, 1.5),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_bad_download_is_refused_with_three_ways(server, cache, case):
    server.answers[PAGE] = DOWNLOADS[case]
    with pytest.raises(ValueError) as e:
        finetune.download_train_script(timm.__version__, base_url=server.url, timeout=0.5)
    message = str(e.value)
    assert f"{server.url}/v{timm.__version__}/train.py" in message and "\n" not in message
    assert all(way in message for way in ("--timm-train", "TIMM_TRAIN=", "pip install -e", str(cache)))
    assert not cache.exists() and not list(cache.parent.glob("*"))


def test_no_network(cache, command, monkeypatch, capsys):
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            finetune,
            "find_train_script",
            lambda option, find=finetune.find_train_script: find(
                option, base_url=f"http://127.0.0.1:{taken.getsockname()[1]}"
            ),
        )
        monkeypatch.delenv("TIMM_TRAIN")
        assert finetune.cli(command()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "refused" in err


def test_only_the_first_process_of_a_node_downloads(server, cache, monkeypatch):
    server.answers[PAGE] = (200, STAND_IN.encode(), None, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="the first process of this node did not get it"):
        finetune.download_train_script(timm.__version__, base_url=server.url, timeout=0.1)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(finetune.download_train_script(timm.__version__, base_url=server.url))
    )
    thread.start()
    time.sleep(0.2)
    assert not server.requests
    cache.parent.mkdir(parents=True)
    cache.write_text(STAND_IN[:2000])  # of an earlier run that was cut off
    time.sleep(0.3)
    assert not found
    (cache.parent / "part").write_text(STAND_IN)
    os.replace(cache.parent / "part", cache)
    thread.join(10)
    assert found == [cache]


@pytest.mark.parametrize("kind", ["--timm-train", "TIMM_TRAIN"])
def test_path_that_is_not_there(refused, monkeypatch, tmp_path, kind):
    if kind == "TIMM_TRAIN":
        monkeypatch.setenv(kind, str(tmp_path / "nowhere.py"))
        assert f"{kind} is {tmp_path / 'nowhere.py'}" in refused()
    else:
        assert f"{kind} is {tmp_path / 'nowhere.py'}" in refused(kind, str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: "x = 1\n", "it has no main"),
        (lambda s: s[:3000], "is not Python"),
        (lambda s: s.replace("import yaml", "from timm.task import NoSuchTask"), "does not go with the installed timm"),
        (lambda s: s.replace('"--device-modules"', '"--other-modules"'), "too old"),
        (lambda s: s.replace('("smoothing", float, 0.1),', ""), "'smoothing'"),
    ],
)
def test_script_that_cannot_be_used(refused, train, change, words):
    train.write_text(change(STAND_IN))
    message = refused()
    assert words in message and str(train) in message


@pytest.mark.parametrize("version", ["0.0.1", timm.__version__])
def test_version_of_the_script(run, train, capsys, version):
    (train.parent / "timm").mkdir()
    (train.parent / "timm" / "version.py").write_text(f"__version__ = '{version}'\n")
    run()
    out, err = capsys.readouterr()
    assert f"timm {version}" in out
    assert ("is of timm 0.0.1" in err) == (version == "0.0.1")


# ----------------------------------------------------------------------------------------------- with timm's train.py


@pytest.fixture(scope="module")
def timm_train():
    path = os.environ.get("TIMM_TRAIN")
    if not path:
        pytest.skip("TIMM_TRAIN=/path/to/timm's/train.py is not set")
    return Path(path).resolve()


@pytest.fixture(scope="module")
def alone(timm_train, tmp_path_factory):
    """train.py and validate.py outside of their repository, so that they import the installed timm."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("train.py", "validate.py"):
        shutil.copy(timm_train.with_name(name), folder)
    return folder


def python(*words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def summary(folder):
    with open(folder / "summary.csv", newline="") as f:
        return [{k: v for k, v in row.items() if "time" not in k} for row in csv.DictReader(f)]


SHORT = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tuned(timm_train, encoder, data, tmp_path_factory):
    """One run of the launcher with the real train.py: its folder and what it printed."""
    out = tmp_path_factory.mktemp("tuned")
    words = ["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--data-dir", data, "--output", out]
    result = python(SCRIPT, *words, "--experiment", "run", "--timm-train", timm_train, *SHORT, "--model-ema", cwd=out)
    return out / "run", result


@pytest.mark.timm_train
def test_real_run(tuned):
    folder, result = tuned
    assert len(summary(folder)) == 3
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["num_classes"] == 3 and args["device_modules"] == ["timm_convnextv2"]
    # the rate said before is the one that train.py computed
    said = float(re.search(r"; lr ([\d.e-]+) \(", result.stdout)[1])
    computed = float(re.search(r"Learning rate \(([\d.e-]+)\) calculated", result.stdout + result.stderr)[1])
    assert said == pytest.approx(computed, rel=1e-3)


@pytest.mark.timm_train
def test_same_run_by_hand(tuned, alone, encoder, data, tmp_path):
    words = ["--device-modules", "timm_convnextv2", "--config", RECIPES / "smoke.yaml"]
    words += ["--model", f"local-dir:{encoder}", "--data-dir", data, "--num-classes", 3]
    words += ["--output", tmp_path, "--experiment", "hand"]
    python(alone / "train.py", *words, *SHORT, "--model-ema", cwd=tmp_path)
    assert summary(tmp_path / "hand") == summary(tuned[0])


@pytest.mark.timm_train
def test_stock_validate_agrees(tuned, alone, data, tmp_path):
    folder, _ = tuned
    best = max(float(row["eval_top1"]) for row in summary(folder))
    words = ["--model", f"local-dir:{folder / 'model'}", "--pretrained", "--data-dir", data, "--device", "cpu"]
    words += ["--workers", 1, "--results-file", tmp_path / "result.json", "--results-format", "json"]
    python(alone / "validate.py", *words, cwd=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    result = result[0] if isinstance(result, list) else result
    assert result["top1"] == pytest.approx(best, abs=1e-3) and result["img_size"] == 32


@pytest.mark.timm_train
def test_real_run_of_two_processes(timm_train, encoder, data, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT, "--recipe", "smoke"]
    words += ["--model", f"local-dir:{encoder}", "--data-dir", data, "--output", tmp_path, "--experiment", "two"]
    words += ["--timm-train", timm_train, *SHORT, "--batch-size", 2, "--global-batch-size", 8]
    result = python(*words, cwd=tmp_path)
    assert result.stdout.count("global batch 8 = 2 images x 2 processes x 2 steps") == 1
    assert result.stdout.count("Done: ") == 1
    assert len(summary(tmp_path / "two")) == 3
    model = timm.create_model(f"local-dir:{tmp_path / 'two' / 'model'}", pretrained=True)
    assert model.num_classes == 3


@pytest.mark.timm_train
def test_real_linear_probe_leaves_the_backbone(timm_train, encoder, data, tmp_path):
    words = ["--recipe", "linear-probe", "--model", f"local-dir:{encoder}", "--data-dir", data, "--output", tmp_path]
    words += ["--experiment", "probe", "--timm-train", timm_train, *SHORT, "--lr", "0.1"]
    result = python(SCRIPT, *words, cwd=tmp_path)
    assert "parameters are frozen" in result.stdout
    before, after = (
        load_file(encoder / "model.safetensors"),
        load_file(tmp_path / "probe" / "model" / "model.safetensors"),
    )
    changed = {k for k in after if k not in before or not torch.equal(before[k], after[k])}
    assert changed == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}


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


def test_weights_that_train_py_would_not_read_are_refused(command, capsys, tmp_path):
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("opt: adamw\n")
    assert finetune.cli(command("--pretrained-path", "x.safetensors", recipe=recipe)) == 2
    assert "only with --pretrained" in capsys.readouterr().err
