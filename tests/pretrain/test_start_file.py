"""`--weights FILE`: a run that starts from a local file, whatever its format, and the licence that it inherits."""

import json

import pytest
import timm
import torch
from helpers import assert_same
from runs import DATA, load, refused, run
from safetensors.torch import load_file, save_file

from timm_convnextv2.checkpoint import export_encoder, export_fcmae, to_official
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.pretraining.start import create_model

KWARGS = dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), decoder_dim=16, img_size=64)  # of the runs
FORMATS = ["sparse", "dense", "classifier", "timm", "fcmae", "train.py"]
STILL = ["--lr", "0"]  # what is exported is what was loaded


@pytest.fixture(scope="module")
def fcmae():
    """An FCMAE with other weights than the seed of the runs gives."""
    torch.manual_seed(7)
    model = timm.create_model("fcmae_convnextv2_atto", **KWARGS)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    return model


def write(folder, model, kind):
    """The weights in a format, as it is found in the wild."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = model.encoder.state_dict()
    path = folder / f"{kind}.pth"
    if kind in ("sparse", "dense"):
        torch.save({"model": to_official(model.state_dict(), sparse=kind == "sparse"), "epoch": 1}, path)
    elif kind == "classifier":
        head = {"head.fc.weight": torch.ones(5, 16), "head.fc.bias": torch.ones(5)}
        torch.save({"model": to_official(encoder | head)}, path)
    elif kind == "timm":
        path = folder / "weights.safetensors"
        save_file(encoder, path)
    elif kind == "fcmae":
        torch.save(model.state_dict(), path)
    else:  # a training checkpoint of DDP, with a moving average that differs from the last weights
        zeros = {f"module.{k}": torch.zeros_like(v) for k, v in encoder.items()}
        torch.save({"state_dict": zeros, "state_dict_ema": {f"module.{k}": v for k, v in encoder.items()}}, path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_starts_from_every_format(tmp_path, no_images, fcmae, kind):
    path = write(tmp_path / "there", fcmae, kind)
    stated = [] if kind in ("sparse", "dense", "classifier") else ["--license", "mit"]
    out = run(tmp_path / "r", "--weights", str(path), *STILL, *stated)
    encoder = {k: v for k, v in fcmae.encoder.state_dict().items() if not k.startswith("head.")}
    found = load_file(out / "encoder" / "model.safetensors")
    assert_same({k: found[k] for k in encoder}, encoder)
    whole = kind in ("sparse", "fcmae")
    assert torch.equal(load(out)["state_dict"]["pred.weight"], fcmae.pred.weight) == whole
    config = json.loads((out / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == ("mit" if stated else "cc-by-nc-4.0")
    assert path.name in (out / "encoder" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["timm", "fcmae", "train.py"])
def test_unknown_licence_must_be_stated(tmp_path, capsys, fcmae, kind):
    path = write(tmp_path / "there", fcmae, kind)
    refused(tmp_path / "r", capsys, [str(path), "--license", "cc-by-nc-4.0"], "--weights", str(path))


def test_official_weights_stay_non_commercial(tmp_path, capsys, fcmae):
    path = write(tmp_path / "there", fcmae, "dense")
    refused(tmp_path / "r", capsys, ["cc-by-nc-4.0", "mit"], "--weights", str(path), "--license", "mit")


@pytest.mark.parametrize("export", [export_encoder, export_fcmae])
def test_config_beside_tells_licence_options_and_normalisation(tmp_path, fcmae, export):
    folder = export(fcmae, tmp_path / "f", license="apache-2.0", mean=[0.3] * 3, std=[0.2] * 3)
    config, start = parse_options([*DATA[:-2], "--weights", str(folder / "model.safetensors")])
    assert config.crops.mean == (0.3,) * 3 and config.network.pretrained and config.network.patch_size == 4
    model = create_model(config.network, config.crops, start=start)
    assert model.encoder.pretrained_cfg["license"] == "apache-2.0"
    assert "state_dict" not in start.overlay


def test_checkpoint_of_a_run(tmp_path, no_images, plain, capsys):
    """From random weights it needs no licence; from others it hands on theirs."""
    out = run(tmp_path / "a", "--weights", str(plain / "last.pth.tar"), *STILL)
    assert_same(load(out)["state_dict"], load(plain)["state_dict"])
    assert "license" not in json.loads((out / "encoder" / "config.json").read_text())["pretrained_cfg"]
    checkpoint = load(plain)
    checkpoint["args"]["pretrained"] = True
    moved = tmp_path / "moved.pth.tar"
    torch.save(checkpoint, moved)
    refused(tmp_path / "b", capsys, "--license", "--weights", str(moved))


def test_resumes_only_from_the_same_start(tmp_path, no_images, fcmae, capsys):
    path = write(tmp_path / "there", fcmae, "dense")
    out = run(tmp_path / "r", "--weights", str(path))
    run(out, "--weights", str(path), "--resume", "auto", epochs=2)
    assert load(out)["args"]["weights"] == str(path)
    run(out, "--resume", "auto", status=2, epochs=3)
    assert "weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, words",
    [
        (["--weights", "missing.pt"], "'missing.pt' does not exist"),
        (["--weights", "{tiny}"], ["of a tiny", "--model fcmae_convnextv2_tiny"]),
        (["--weights", "{tiny}", "--model", "local-dir:x"], "needs a variant as --model"),
        (["--weights", "{other}", "--license", "mit"], "not those of this ConvNeXt V2"),
        (["--weights", "{text}"], "text.pth"),
    ],
)
def test_what_does_not_fit(tmp_path, capsys, line, words):
    with torch.device("meta"):
        tiny = timm.create_model("convnextv2_tiny", num_classes=0).state_dict()
    tiny = {k: torch.zeros(1).expand(v.shape) for k, v in tiny.items()}  # small in the file, too
    files = {name: tmp_path / f"{name}.pth" for name in ("tiny", "other", "text")}
    torch.save(tiny, files["tiny"])
    torch.save({"layer1.weight": torch.zeros(3)}, files["other"])
    files["text"].write_text("weights")
    refused(tmp_path / "r", capsys, words, *[word.format(**files) for word in line])
