"""Checks of the model's folder, its weights, the data and the augmentation."""

import json
import re
import shutil

import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.data import rand_augment_transform
from timm.models import save_for_hf

from timm_convnextv2.finetune.model import check_folder_weights


def without(folder):
    shutil.rmtree(folder)


BROKEN = {
    "no validation": (lambda root: without(root / "validation"), ["--val-split 'validation'", "it has train"]),
    "no train": (lambda root: without(root / "train"), ["--train-split 'train'", "it has validation"]),
    "empty": (lambda root: [p.unlink() for p in (root / "validation").rglob("*.png")], ["0 images", "sub-folder"]),
    "class less": (lambda root: without(root / "validation" / "b"), ["(3)", "(2)", "only", "b (1)"]),
    "other class": (lambda root: (root / "train/c").rename(root / "train/d"), ["/train has d", "/validation has c"]),
    "no classes": (lambda root: shutil.copy(root / "train" / "a" / "0.png", root / "train"), ["in no sub-folder"]),
    "nothing": (lambda root: without(root), ["does not exist", "train/ and validation/"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_data_folder(refused, data, tmp_path, case):
    check_refused(data, tmp_path / "broken", *BROKEN[case], lambda folder: refused(data=folder))


def check_refused(source, folder, damage, words, refuse):
    """A damaged copy of a folder gives a message with these words."""
    shutil.copytree(source, folder)
    damage(folder)
    message = refuse(folder)
    assert all(word in message for word in [*words, str(folder)]), message


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
    assert "validate --model" not in capsys.readouterr().out


def test_other_data_sets_are_left_to_train_script(run, refused):
    assert "--num-classes is needed" in refused("--dataset", "hfds/some/name")
    args = run("--dataset", "hfds/some/name", "--num-classes", "7")["args"]
    assert args["dataset"] == "hfds/some/name" and args["num_classes"] == 7


def rewrite(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


MODELS = {
    "no folder": (lambda f: without(f), ["no such folder", "model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), ["JSON"]),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), ["timm's format"]),
    "foreign": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), ["timm's format", "architecture"]),
    "unknown": (lambda f: rewrite(f, architecture="convnextv2_attoo"), ["'convnextv2_attoo'", "'convnextv2_atto'"]),
    "FCMAE": (lambda f: rewrite(f, architecture="fcmae_convnextv2_atto"), ["whole FCMAE", "encoder"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
    "another": (lambda f: rewrite(f, architecture="resnet18", model_args={}), ["holds a ConvNeXt V2", "'resnet18'"]),
    "options": (lambda f: rewrite(f, model_args={"no_such": 1}), ["cannot be created", "no_such"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_broken_model_folder(refused, encoder, tmp_path, case):
    check_refused(encoder, tmp_path / "model", *MODELS[case], lambda folder: refused(model=f"local-dir:{folder}"))


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


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def replaced(name, **shape):
    model = timm.create_model(name, num_classes=0, **shape)
    return lambda folder: save_file(model.state_dict(), folder / "model.safetensors")


WIDER, SHORTER = dict(depths=[1, 1, 2, 1], dims=[8, 8, 16, 24]), dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 16])


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut_off, "1000 bytes.*truncated"),
        (replaced("resnet18"), r"the first names: \['bn1.bias', .*found \d+ of the model's \d+ tensors"),
        (replaced("convnextv2_atto", patch_size=1, **WIDER), r"'stages\.3\.downsample\.1\.weight' is \[24, 16, 2, 2\]"),
        (replaced("convnextv2_atto", patch_size=1, **SHORTER), r"'stages\.2\.blocks\.1\.\S+' is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(refused, run, encoder, tmp_path, damage, words):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    damage(folder)
    message = refused(model=f"local-dir:{folder}")
    assert str(folder / "model.safetensors") in message and re.search(words, message)
    run("--from-scratch", model=f"local-dir:{folder}")  # which does not read them


def test_weights_that_timms_filter_cannot_reshape(tmp_path):
    shape = dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    save_file({"stages.0.0.pwconv1.weight": torch.zeros(16, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit its config\.json: "):
        check_folder_weights(tmp_path, timm.create_model("convnextv2_tiny", **shape))


def test_grey_and_headed_weights_pass_the_check(run, encoder, tmp_path):
    run("--in-chans", "1", experiment="grey")
    headed = timm.create_model(f"local-dir:{encoder}", num_classes=7)
    save_for_hf(headed, tmp_path / "headed", safe_serialization=True)
    shutil.copy(encoder / "config.json", tmp_path / "headed")
    run(model=f"local-dir:{tmp_path / 'headed'}", experiment="headed")


def test_cuda_that_is_not_there(run, refused, command, monkeypatch, capsys):
    """It is no default then, and a trial refuses what the run would refuse."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device cpu" in refused(device="cuda") and "--device cpu" in refused("--dry-run", device="cuda")
    assert run(device=None, recipe="small-data")["args"]["device"] == "cpu"
    out = capsys.readouterr().out
    assert "--device cpu: PyTorch sees no CUDA GPU here." in out and " --device cpu" in out.splitlines()[-2]


@pytest.mark.parametrize("words, on", [([], False), (["--amp"], True), (["--no-amp"], False)])
def test_amp_on_a_slow_cpu(run, slow_bfloat16, capsys, words, on):
    """A recipe's is left out; the next command agrees."""
    assert run(*words, recipe="small-data")["args"]["amp"] is on
    out, err = capsys.readouterr()
    assert ("--no-amp: this CPU" in out) == (not words) and ("warning: --amp: this CPU" in err) == on
    assert (" --amp" in out.splitlines()[-2]) == on


def test_no_amp(run, refused):
    assert run(recipe="small-data", experiment="with")["args"]["amp"] is True
    assert run("--no-amp", recipe="small-data", experiment="without")["args"]["amp"] is False
    assert "--no-amp" in refused("--amp", "--no-amp", recipe="small-data", experiment="both")


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
