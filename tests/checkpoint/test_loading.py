"""`load_model`: the weights are those of the file, or there is no model."""

import json
import os
import shutil

import pytest
import safetensors.torch
import timm
import torch
from encoders import DIMS, make_encoder, maps_of

from timm_convnextv2.checkpoint import export_fcmae, load_model
from timm_convnextv2.hub_errors import HubError


def test_features_only_has_the_exported_weights(exported):
    name, encoder, first = exported
    backbone = load_model(name, features_only=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(images)
    assert backbone.feature_info.channels() == DIMS
    assert backbone.feature_info.reduction() == [first, 2 * first, 4 * first, 8 * first]
    for ours, expected in zip(maps, maps_of(encoder, images), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kwargs", [dict(features_only=True), dict(num_classes=0)], ids=["maps", "pooled"])
def test_weights_that_were_not_loaded_are_noticed(small, monkeypatch, kwargs):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create_model(name, **more))
    with pytest.raises(ValueError, match=small):
        load_model(small, **kwargs)


def test_a_classifier_with_a_missing_tensor_is_noticed(tmp_path):
    """timm itself loads such weights without `strict`, because of the head that it drops."""
    classifier = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=DIMS, num_classes=7)
    timm.models.save_for_hf(classifier, tmp_path, safe_serialization=True)
    name, weights = f"local-dir:{tmp_path}", tmp_path / "model.safetensors"
    load_model(name, features_only=True)
    stored = safetensors.torch.load_file(weights)
    del stored["stages.2.downsample.1.weight"]
    safetensors.torch.save_file(stored, weights)
    timm.create_model(name, pretrained=True, features_only=True)
    with pytest.raises(ValueError, match=r"stages\.2\.downsample\.1\.weight"):
        load_model(name, features_only=True)


def of_other_sizes(folder):
    make_encoder(folder.parent / "other", dims=[8, 16, 24, 40])
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)


def with_values(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


SPOILED = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config of something else": lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
    "foreign architecture": with_values(architecture="convnextv9"),
    "20,000 blocks": with_values(model_args={"depths": [20000, 1, 1, 1]}),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "other sizes": of_other_sizes,
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_is_no_model_is_refused_by_name(small, tmp_path, how):
    folder = tmp_path / "folder"
    shutil.copytree(small.removeprefix("local-dir:"), folder)
    SPOILED[how](folder)
    with pytest.raises(ValueError, match=f"'local-dir:{folder}'"):
        load_model(f"local-dir:{folder}", features_only=True)


def test_names_that_are_refused():
    for name in ("some/folder", "", "ftp:x"):
        with pytest.raises(ValueError, match="local-dir:FOLDER.*hf-hub:USER/NAME"):
            load_model(name)
    with pytest.raises(ValueError, match="'convnextv2_ato'.*'convnextv2_atto'"):
        load_model("convnextv2_ato")
    with pytest.raises(ValueError, match=r"convnextv2_atto\.fcmae_ft_in1k"):
        load_model("convnextv2_atto.nothing")
    with pytest.raises(ValueError, match="'convnextv2_small'"):
        load_model("convnextv2_small")
    with pytest.raises(HubError, match="'someone/absent'"):
        load_model("hf-hub:someone/absent")


def test_a_pretraining_model_is_refused(tmp_path):
    model = timm.create_model("fcmae_convnextv2_atto", depths=(1, 1, 1, 1), dims=DIMS, decoder_dim=16)
    export_fcmae(model, tmp_path)
    for kwargs in (dict(num_classes=0), dict(features_only=True)):
        with pytest.raises(ValueError, match=f"'local-dir:{tmp_path}'"):
            load_model(f"local-dir:{tmp_path}", **kwargs)


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_atto.fcmae_ft_in1k", "resnet18", "resnet18.a1_in1k"])
def test_a_model_of_timm_is_loaded_from_the_hub(name, monkeypatch):
    """Without a network: what is asked of timm, and that what it says is told."""
    with pytest.raises(HubError, match=f"'timm/{name}"):
        load_model(name, num_classes=0)
    asked = []
    create_model = timm.create_model

    def create(name, pretrained, **kwargs):
        asked.append((name, pretrained, kwargs))
        return create_model(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    assert load_model(name, num_classes=0).num_classes == 0
    assert asked == [(name, True, {"num_classes": 0})]
