"""Options, config files, and mistakes in them."""

import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from runs import command, config, refused

from timm_convnextv2.commands.pretrain import main, parse_options
from timm_convnextv2.config import flat, usable_cores


def options_of(argv):
    """The options alone, of a model without a folder."""
    config, start = parse_options(argv)
    assert start is None
    return SimpleNamespace(**flat(config))


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
    args = options_of(["--config", config(tmp_path, input_size=[3, 64, 96]), *line])
    assert args.input_size == expected and args.in_chans == expected[0]


def test_a_config_does_not_name_another(tmp_path, capsys):
    refused(tmp_path / "r", capsys, "'config'", "--config", config(tmp_path, config="x"))


@pytest.mark.parametrize(
    "line, warmup",
    [
        (["--epochs", "800"], 40), (["--epochs", "1600"], 40), (["--epochs", "100"], 5),
        (["--epochs", "10", "--warmup-epochs", "3"], 3),
    ],
)  # fmt: skip
def test_default_warmup(line, warmup):
    assert options_of(["--data-dir", "x", *line]).warmup_epochs == warmup


def test_demo_defaults_give_way():
    args = options_of([])
    assert (args.dataset, args.epochs, args.img_size, args.warmup_epochs) == ("demo", 16, 56, 16 / 12)
    assert options_of(["--epochs", "3", "--batch-size", "16"]).batch_size == 16
    assert args.standardize == "channel" and args.mean == [0] * 3 and args.probe_dir == "demo"
    args = options_of(["--dataset", "demo", "--mean", *"123", "--std", *"123", "--decoder-dim", "16"])
    assert args.standardize is args.probe_dir is None and args.mean == [1, 2, 3] and args.model_kwargs == {}
    args = options_of(["--data-dir", "x"])
    assert (args.dataset, args.epochs, args.img_size, args.workers) == ("", None, 224, min(4, usable_cores()))


@pytest.mark.parametrize("options", [[], ["--amp"], ["--model-ema"], ["--grad-checkpointing"]])
def test_dry_run(tmp_path, capsys, options):
    assert main(command(tmp_path / "r", "--dry-run", *options)) == 0
    printed = capsys.readouterr().out
    head, _, tail = printed.partition("fcmae_convnextv2_atto: ")
    settings = yaml.safe_load(head)
    assert settings["img_size"] == 64 and settings["epochs"] == 1
    # the defaults are left out, and what follows from others
    assert not {"dry_run", "seed", "mask_ratio", "input_size", "recon_interval"} & settings.keys()
    assert "32 images of 3 x 64 x 64 in 2 x 2 patches of 32 px; 4 updates of 8 images" in tail
    assert re.search(r"Memory per process: about [\d.]+ GiB", tail)
    assert re.search(r"Time: about \d+ s for 4 updates \([\d.e-]+ s each, measured\)", tail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, words",
    [
        (["--img-size", "100"], ["96x96", "128x128"]),
        (["--input-size", "3", "64", "100"], ["64x100", "64x96"]),
        (["--mask-ratio", "0"], "mask"),
        (["--mask-ratio", "1"], "mask"),
        (["--mask-ratio", "0.9"], ["0 of 4 patches", "up to 0.75"]),  # leaves nothing of four patches
        (["--img-size", "32"], "1x1 grid"),
        (["--model", "convnextv2_atto"], "Did you mean 'fcmae_convnextv2_atto'?"),
        (["--model", "resnet50"], "not an FCMAE model. There are: "),
        (["--model", "./nothing"], "'./nothing' does not exist"),
        (["--model", "local-dir:nothing"], "'nothing' is not the folder of a model: it does not exist"),
        (["--model", "fcmae_convnextv2_ato"], "Did you mean 'fcmae_convnextv2_atto'?"),
        (["--model-kwargs", "nonsense=1"], "nonsense"),
        (["--batch-size", "33"], ["33", "32"]),
        (["--batch-size", "8", "--grad-accum-steps", "5"], ["40 images", "32"]),
        (["--in-chans", "5"], "1 or 3 channels, got in_chans=5"),
        (["--mean", "auto", "0.5", "0.5"], ["--mean takes auto alone"]),
        (["--clip-percentiles", "99", "1"], ["--clip-percentiles 99 1", "0 <= LO < HI <= 100"]),
        (["--clip-percentiles", "1", "99", "--clip-low", "0", "--clip-high", "1"], ["choose one"]),
        (["--clip-low", "1", "--clip-high", "0.5"], ["out of order in channel 1"]),
        (["--clip-low", "0"], ["come in pairs"]),
        (["--divide", "0"], ["divide must be a number above 0"]),
        (["--in-chans", "0"], "--in-chans must be at least 1"),
        (["--mean", "0.5", "0.5", "--std", "1", "1", "1"], "--mean has 2 values for 3 channels"),
        (["--mean", "0.5", "0.5", "0.5"], "--std is missing"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--warmup-epochs", "1"], ["--warmup-epochs 1", "--epochs 1"]),
        (["--device", "nonsense"], "--device nonsense"),
        (["--max-bad-images", "3"], "--max-bad-images"),
        (["--opt", "nonsense"], "nonsense"),
        (["--resume", "missing.pth"], "'missing.pth' does not exist"),
        (["--dataset", "nonsense"], "nonsense"),
        (["--patch-size", "3"], "patch"),
        (["--patch-size", "0"], "--patch-size"),
        (["--torchcompile", "nope"], "--torchcompile nope"),
        (["--model-kwargs", "act_layer=nope"], "--model-kwargs"),
        (["--experiment", "."], "--experiment . is not a folder"),
        (["--decoder-depth", "0"], "decoder_depth"),
        (["--lr", "-1"], "--lr"),
        (["--show-bands", "4", "3", "2"], ["--show-bands 4 3 2", "1 to 3"]),
        (["--scale", "0", "2"], "scale"),
        # all at once
        (["--batch-size", "0", "--workers", "-1"], ["2 mistakes:", "- --batch-size must be", "- --workers must be"]),
        (
            ["--model", "resnet50", "--experiment", "../x", "--torchcompile", "nope", "--probe-dir", "nowhere"],
            ["4 mistakes:", "not an FCMAE model", "--experiment ../x", "--torchcompile nope", "--probe-dir nowhere"],
        ),
        (
            ["--mask-ratio", "0", "--dataset", "", "--data-dir", "gone", "gone too"],
            ["2 mistakes:", "mask", "--data-dir gone does not exist"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_settings(tmp_path, capsys, options, words):
    refused(tmp_path / "r", capsys, words, *options)


@pytest.mark.parametrize("option, module", [("--log-wandb", "wandb"), ("--log-tensorboard", "tensorboard")])
def test_missing_log_package(tmp_path, capsys, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    refused(tmp_path / "r", capsys, f"pip install {module}", option)
