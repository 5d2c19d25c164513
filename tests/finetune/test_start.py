"""What a run starts from: files of weights and their licence, and how stored values become pixels."""

import argparse
import json
import shutil

import numpy as np
import pytest
import tifffile
import timm
import torch
from test_foreign_names import HUGGING_FACE, MMPRETRAIN, renamed

from timm_convnextv2.checkpoint import to_official
from timm_convnextv2.data import Pixels
from timm_convnextv2.finetune import images, launch

SHAPE = dict(patch_size=1, depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))
FORMATS = ["timm", "encoder", "official", "transformers", "mmpretrain", "pretraining"]


@pytest.fixture(scope="module")
def classifier():
    return timm.create_model("convnextv2_atto", num_classes=3, **SHAPE)


def write(folder, model, kind):
    """A classifier's weights alone in a folder, as they are found in the wild."""
    folder.mkdir(exist_ok=True)
    path, weights = folder / f"{kind}.pth", model.state_dict()
    if kind == "pretraining":
        encoder = {f"encoder.{k}": v for k, v in weights.items() if not k.startswith("head.fc")}
        content = {"state_dict": encoder, "args": {"mask_ratio": 0.6, "pretrained": True, "license": ""}}
    elif kind == "official":
        content = {"model": to_official(weights)}
    elif kind in ("transformers", "mmpretrain"):
        content = {"state_dict": renamed(model, HUGGING_FACE if kind == "transformers" else MMPRETRAIN)}
    else:
        content = {k: v for k, v in weights.items() if kind == "timm" or not k.startswith("head.")}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_as_pretrained_path_with_its_licence(run, refused, classifier, tmp_path, kind):
    words = ["--pretrained-path", str(write(tmp_path / "there", classifier, kind))]
    if kind == "official":
        assert "under cc-by-nc-4.0" in refused(*words, "--license", "mit")
        assert run(*words)["args"]["license"] == "cc-by-nc-4.0"
        return
    message = refused(*words)
    assert words[1] in message and "--license ID" in message and "cc-by-nc-4.0" in message
    assert run(*words, "--license", "mit")["args"]["license"] == "mit"


@pytest.mark.parametrize("option", ["--initial-checkpoint", "--resume"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_that_timm_loads_as_they_are(run, refused, classifier, tmp_path, kind, option):
    words = [option, str(write(tmp_path / "there", classifier, kind)), "--license", "mit"]
    if kind == "timm" and option == "--initial-checkpoint":
        assert run(*words)["args"]["license"] == "mit"
        return
    message = refused(*words)
    what = "is loaded without conversion" if option == "--initial-checkpoint" else "is not a checkpoint of train.py"
    assert what in message and f"--pretrained --pretrained-path {words[1]}" in message


@pytest.mark.parametrize("option", ["--initial-checkpoint", "--pretrained-path"])
def test_files_that_are_missing_or_of_another_model(refused, tmp_path, option):
    assert "'gone.pth' does not exist" in refused(option, "gone.pth")
    torch.save({"layer1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert "layer1.weight" in refused(option, str(tmp_path / "other.pth"), "--license", "mit")


def with_config(encoder, folder, **values):
    """A copy of an encoder whose config.json has other values; 'a__b' is the key b of a."""
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        *outer, key = key.split("__")
        (config[outer[0]] if outer else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_the_licence_of_a_resumed_run_is_found_where_its_options_are_not_repeated(run, classifier, tmp_path):
    official = write(tmp_path / "there", classifier, "official")
    args = run("--pretrained-path", str(official))["args"]
    last = tmp_path / "out" / "x" / "last.pth.tar"
    torch.save({"epoch": 0, "state_dict": classifier.state_dict(), "args": argparse.Namespace(**args)}, last)
    shutil.rmtree(last.parent / "model")
    assert run("--resume", str(last))["args"]["license"] == "cc-by-nc-4.0"


@pytest.fixture
def with_nodata(encoder, tmp_path):
    """An encoder that was pretrained with --nodata=-9999 --divide 2."""
    return with_config(encoder, tmp_path / "encoder", training={"pixels": {"nodata": -9999.0, "divide": 2.0}})


@pytest.fixture
def holed(tmp_path):
    """Float images with a hole of -9999 in each."""
    x = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    x[:8] = -9999
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (tmp_path / "holed" / split / label).mkdir(parents=True)
            for i in range(4):
                tifffile.imwrite(tmp_path / "holed" / split / label / f"{i}.tif", x, photometric="minisblack")
    return tmp_path / "holed"


def test_nodata_reaches_the_data_set_and_the_record(run, refused, holed, monkeypatch):
    assert "--nodata=-9999" in refused(data=holed)
    fed = []
    monkeypatch.setattr(launch, "feed", lambda script, reading, readers: fed.append(reading))
    assert run("--nodata=-9999", data=holed)["args"]["pixels"] == {"nodata": -9999}
    assert fed[0].pixels == Pixels(nodata=-9999)
    data = images.create_dataset("", root=str(holed), split="train", reading=fed[0])
    assert 0 <= data[0][0].min() and data[0][0].max() <= 1


def test_pixels_are_those_of_the_encoder_by_default(run, holed, with_nodata, capsys):
    record = {"nodata": -9999, "divide": 2}
    seen = run(model=with_nodata, data=holed)
    assert seen["args"]["pixels"] == record and f"--pixels={json.dumps(seen['args']['pixels'])}" in seen["argv"]
    note = f"Pixels are read as {with_nodata} was trained on them: -9999 is nodata, divided by 2"
    assert f"{note}; --nodata=nan: none." in capsys.readouterr().out
    seen = run("--nodata", "7", model=with_nodata, experiment="y")
    assert seen["args"]["pixels"] == {**record, "nodata": 7} and seen["argv"].count("--nodata=7.0") == 1
    assert f"{note}; --nodata=7 replaces that." in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, crop_mode, word",
    [
        ({}, "border", "--crop-mode border"),
        ({"mixup": 0.8, "mixup_mode": "half"}, "center", "--mixup-mode half"),
        ({"cutmix": 1.0, "mixup_mode": "half"}, "center", "--mixup-mode half"),
        ({"naflex_loader": True}, "center", "--naflex-loader"),
        ({"tf_preprocessing": True}, "center", "--tf-preprocessing"),
    ],
)
def test_what_is_for_8_bit_images_is_refused_before_the_start(options, crop_mode, word):
    images.refuse_for_tensors("", options, crop_mode)
    images.refuse_for_tensors("not 8-bit with 1 channel", {"mixup_mode": "half"}, "center")
    with pytest.raises(ValueError, match=f"{word} is for 8-bit RGB or grey, and there are images not 8-bit with 1"):
        images.refuse_for_tensors("not 8-bit with 1 channel", options, crop_mode)


def test_border_crop_of_the_model_is_refused_before_the_start(refused, holed, encoder, tmp_path):
    model = with_config(encoder, tmp_path / "encoder", pretrained_cfg__crop_mode="border")
    message = refused("--nodata=-9999", model=model, data=holed)
    assert "--crop-mode border is for 8-bit RGB or grey" in message
