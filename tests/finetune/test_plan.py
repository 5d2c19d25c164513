"""Options resolved, batch, learning rate, layers and folder of a run."""

import argparse
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import RECIPES

from timm_convnextv2.commands.finetune import main
from timm_convnextv2.recipes import load_recipe


@pytest.mark.parametrize("key, near", [("epoch", "epochs"), ("layer-decay", "layer_decay"), ("xyzzy", None)])
def test_recipe_key_that_train_script_does_not_know(refused, train, recipe_file, key, near):
    message = refused(recipe=recipe_file(**{"lr_base": 0.1, key: 1}))
    assert f"'{key}'" in message and str(train) in message
    assert (f"Did you mean '{near}'?" in message) if near else ("Did you mean" not in message)


@pytest.mark.parametrize("options", [["--no-such-option", "1"], ["--epochs", "many"]])
def test_options_that_train_script_does_not_take_are_one_message(refused, options):
    assert options[options[0] == "--epochs"] in refused(*options)


def test_number_of_classes(run, refused, capsys):
    assert run("--num-classes", "3")["args"]["num_classes"] == 3
    assert "3 classes (a, b, c)" in refused("--num-classes", "5")
    # a recipe's is for ImageNet, the folder's is counted
    assert run(recipe="finetune-1k-atto", experiment="y")["args"]["num_classes"] == 3
    assert "replace the recipe's 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, warned",
    [
        ("--epochs 100 --mixup 0.8 --aa rand-m9", "updates may be too few for --aa rand-m9, --mixup 0.8:"),
        ("--epochs 700 --mixup 0.8", ""),
        ("--epochs 2 --mixup 0.8", ""),  # too few in any case, which another warning says
        ("--epochs 100 --mixup 0 --reprob 0.25", ""),
    ],
)
def test_few_updates_for_strong_augmentation(run, capsys, options, warned):
    run(*options.split())
    err = capsys.readouterr().err
    assert warned in err and ("too few for" in err) == bool(warned)


@pytest.mark.parametrize("world, wanted, steps", [(1, 8, 1), (1, 24, 3), (2, 16, 1), (2, 48, 3)])
def test_global_batch(run, monkeypatch, capsys, world, wanted, steps):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = run("--global-batch-size", str(wanted))["args"]
    assert args["grad_accum_steps"] == steps and args["batch_size"] * steps * world == wanted
    lr = load_recipe("smoke", RECIPES).values["lr_base"] * wanted / 256
    assert f"global batch {wanted} = 8 images" in (out := capsys.readouterr().out)
    assert float(re.search(r"lr ([\d.e-]+) \(", out)[1]) == pytest.approx(lr, rel=1e-3)
    assert re.search(rf"epochs? .*of {-(-(24 // world // 8) // steps)} updates?\b", out)  # an incomplete one counts


@pytest.mark.parametrize(
    "world, wanted, ways",
    [
        (1, 20, ["--batch-size 4 or 5 or 10", "--global-batch-size 16 or 24"]),
        (2, 20, ["--batch-size 2 or 5 or 10", "--global-batch-size 16 or 32"]),
        (2, 21, ["--global-batch-size 16 or 32"]),
        (1, 4, ["--batch-size 1 or 2 or 4", "--global-batch-size 8"]),
        (1, 0, ["--global-batch-size 8"]),
        (1, -8, ["--global-batch-size 8"]),
    ],
)
def test_global_batch_that_does_not_divide(refused, monkeypatch, world, wanted, ways):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    message = refused("--global-batch-size", str(wanted))
    assert all(way in message for way in ways), message


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
    assert main(command("--dry-run", *options)) == 0
    assert f"lr {lr:g} (" in capsys.readouterr().out


def test_batches_that_cannot_be_made(refused, monkeypatch):
    assert "--grad-accum-steps 3" in refused("--global-batch-size", "24", "--grad-accum-steps", "2")
    assert "--batch-size 24 or less" in refused("--batch-size", "25")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--batch-size 6 or less" in refused("--batch-size", "8")


def test_other_models_are_allowed_with_a_warning(run, capsys):
    run(model="resnet18")
    out, err = capsys.readouterr()
    assert "not a ConvNeXt V2" in err and "Done: the weights are in out/x/last.pth.tar; only ConvNeXt V2 is" in out
    run(model="convnextv2_atto", experiment="y")
    assert "not a ConvNeXt V2" not in capsys.readouterr().err


def test_channels_that_only_the_folder_tells(run, refused, encoder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"], config["model_args"]["in_chans"] = [4, 32, 32], 4
    (folder / "config.json").write_text(json.dumps(config))
    for channels, split, label in itertools.product((2, 4), ("train", "validation"), "ab"):
        (tmp_path / f"of{channels}" / split / label).mkdir(parents=True)
        for i in range(8):
            np.save(tmp_path / f"of{channels}" / split / label / f"{i}.npy", np.zeros((9, 9, channels), "u1"))
    args = run(model=f"local-dir:{folder}", data=tmp_path / "of4")["args"]
    # the folder's mean and std are for three channels: their average goes to train.py and its args.yaml
    assert args["in_chans"] == 4 and args["mean"] == [0.4] * 4 and args["std"] == [0.2] * 4
    words = ("--in-chans", "2", "--mean", "0.1", "0.2", "--std", "1")
    args = run(*words, model=f"local-dir:{folder}", data=tmp_path / "of2", experiment="y")["args"]
    assert args["in_chans"] == 2 and args["input_size"] == [2, 32, 32] and args["mean"] == [0.1, 0.2]
    capsys.readouterr()
    assert "has 3 channels (mode RGB), expected 4" in refused(model=f"local-dir:{folder}", experiment="w")
    assert "one or 4" in refused("--mean", "0.1", "0.2", model=f"local-dir:{folder}", data=tmp_path / "of4")
    assert run(experiment="z")["args"]["in_chans"] is None  # three: train.py's own default


def test_layers_that_hardly_learn(run, command, capsys):
    run("--layer-decay", "0.2")
    assert "3.2e-04 of the rate" in capsys.readouterr().err  # 0.2 ** 5
    assert main(command("--dry-run", recipe="linear-probe", experiment="probe")) == 0
    out = capsys.readouterr().out
    assert "stem.0.weight frozen" in out and "head.fc.bias 1; " in out and "parameters are frozen" in out


def test_without_pretrained_the_weights_would_be_left_out(run, recipe_file, capsys):
    path = recipe_file(epochs=3)
    assert not run(recipe=path)["args"]["pretrained"]
    assert "are not loaded" in capsys.readouterr().err
    run("--pretrained", recipe=path, experiment="y")
    assert "are not loaded" not in capsys.readouterr().err


def test_run_folder_is_named_as_by_timm(command, tmp_path, encoder):
    assert main(command(experiment=None)) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{timm.models.safe_model_name(f'local-dir:{encoder}')}-32", folder.name)
    assert (folder / "model").is_dir()


def test_folder_of_another_run(run, refused, encoder, tmp_path):
    run()
    message = refused()
    assert f"Resume it: --resume {tmp_path}/out/x/last.pth.tar" in message and "--experiment" in message
    assert "does not exist" in refused("--resume", str(tmp_path / "none.pth.tar"))
    shutil.rmtree(tmp_path / "out" / "x" / "model")
    last = tmp_path / "out" / "x" / "last.pth.tar"
    assert "is not of this model" in refused("--resume", str(last))  # the stand-in trains none
    weights = timm.create_model(f"local-dir:{encoder}", num_classes=3).state_dict()
    torch.save({"epoch": 0, "state_dict": weights, "args": argparse.Namespace(model=f"local-dir:{encoder}")}, last)
    run("--resume", str(last))
