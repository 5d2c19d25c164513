"""The record of how stored values become pixels goes from an encoder into detectors and segmenters, without options."""

import json

import numpy as np
import pytest
import torch
from encoders import make_encoder
from tiny import DETECTOR, SEGMENTER

from timm_convnextv2.commands.main import main
from timm_convnextv2.data import Pixels, load_image
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.transfer import create_backbone, open_detector, open_segmenter

RECORD = dict(divide=1000.0, clip_low=[0.1], clip_high=[2.5], nodata=-1.0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder that was trained on float images, divided by 1000 and clipped."""
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, patch_size=4, dims=[8, 12, 16, 20])
    config = json.loads((folder / "config.json").read_text())
    config["training"]["pixels"] = RECORD
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo images as floats of 0 to 3000, with a pixel without data."""
    folder = write_folder(tmp_path_factory.mktemp("d") / "d", size=32, train=8, validation=8, coco=True, masks=True)
    for path in folder.glob("*/images/*.png"):
        values = load_image(path).permute(1, 2, 0).numpy().astype(np.float32) * (3000 / 255)
        values[3, 4] = -1
        values[0, 0], values[0, 1] = 0, 3000  # beyond the limits, whatever is drawn
        np.save(path.with_suffix(".npy"), values)
        path.unlink()
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(".png", ".npy"))
    return folder


def test_a_backbone_reads_as_its_encoder_did(encoder, data, tmp_path):
    path = next((data / "train/images").iterdir())
    backbone = create_backbone(encoder, pretrained=False)
    assert backbone.pixels == Pixels.from_record(RECORD)
    image = backbone.load_image(path)
    raw = torch.from_numpy(np.load(path)).permute(2, 0, 1)
    known = (raw >= 100) & (raw <= 2500)
    assert 0 < known.float().mean() < 1 and torch.allclose(image[known], raw[known] / 1000)
    assert image.min() >= 0.1 and image.max() == 2.5
    assert create_backbone(encoder).read_with(7).pixels == Pixels.from_record({**RECORD, "nodata": 7})
    np.save(tmp_path / "x.npy", (raw.permute(1, 2, 0) / 3000 * 255).clamp(0).byte().numpy())
    plain = create_backbone("convnextv2_atto", pretrained=False).load_image(tmp_path / "x.npy")
    assert plain.dtype == torch.float32 and 0.5 < plain.max() <= 1


@pytest.mark.parametrize("task, options", [("detect", DETECTOR), ("segment", SEGMENTER)])
def test_training_evaluation_and_prediction_read_alike(encoder, data, tmp_path, capsys, monkeypatch, task, options):
    """What is decoded is the same in all three, and the export says how."""
    seen = []
    original = Pixels.clip
    monkeypatch.setattr(Pixels, "clip", lambda self, image: seen.append(self) or original(self, image))
    common = ["-j", "0", "--device", "cpu"]
    words = ["train", "--model", encoder, "--data-dir", data, "--output", tmp_path, "--experiment", "run", "-b", 4]
    words += ["--img-size", 32, "--epochs", 1, "--shown-images", 1, *options, *common]
    assert main([task, *map(str, words)]) == 0
    assert "-1 is nodata, divided by 1000, clipped to [0.1] .. [2.5]" in capsys.readouterr().out
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["backbone"]["pixels"] == RECORD
    assert "divided by 1000" in (model / "README.md").read_text()
    opened = open_detector(model).backbone.body if task == "detect" else open_segmenter(model).backbone
    assert opened.pixels == Pixels.from_record(RECORD)
    assert main([task, "eval", "--model", str(model), "--data-dir", str(data), *common]) == 0
    images = ["--data-dir", str(data / "validation/images"), "--output", str(tmp_path / "found")]
    assert main([task, "predict", "--model", str(model), *images, *common]) == 0
    assert set(seen) == {Pixels.from_record(RECORD)}
    seen.clear()
    assert main([task, "predict", "--model", str(model), *images, *common, "--overwrite", "--nodata", "-2"]) == 0
    assert {pixels.nodata for pixels in seen} == {-2.0}
