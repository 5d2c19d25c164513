"""--mean auto, --std auto, --clip-percentiles, --divide: measured once, kept, and applied by every other command."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from encoders import embed
from runs import TINY, load, refused, run

from timm_convnextv2.checkpoint.provenance import ConfigError, read_config
from timm_convnextv2.commands.pretrain import main, parse_options
from timm_convnextv2.config import build, flat, from_mapping
from timm_convnextv2.data import FolderSource, load_image
from timm_convnextv2.data.formats.pixels import Pixels
from timm_convnextv2.data.sources.files import ImageFiles
from timm_convnextv2.features.collapse_models import collapse_of_models
from timm_convnextv2.features.config import Computation, DrawnImages, Extraction, Scoring, Splitting
from timm_convnextv2.features.evaluate import evaluate_models
from timm_convnextv2.finetune import images
from timm_convnextv2.finetune.model import choose_pixels
from timm_convnextv2.pretraining import resolve
from timm_convnextv2.pretraining.config import PretrainConfig
from timm_convnextv2.pretraining.setup import open_probe

CHANS = 5
PIXELS = ["--nodata", "0", "--divide", "10000", "--clip-percentiles", "2", "98"]


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands")
    for i in range(12):
        rng = np.random.default_rng(i)
        x = 1000 * (1 + np.arange(CHANS))[:, None, None] + 200 * rng.normal() + 300 * rng.random((CHANS, 36, 40))
        x[:, :6] = 0
        tifffile.imwrite(
            folder / f"{i:02d}.tif", x.astype(np.uint16), photometric="minisblack", metadata={"axes": "CYX"}
        )
    return folder


@pytest.fixture(scope="module")
def made(bands, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    data = ["--data-dir", str(bands), "--in-chans", str(CHANS), *PIXELS, *TINY]
    run(out, data=data)
    return out


def test_what_was_measured_is_in_every_record(bands, made):
    settings = yaml.safe_load((made / "args.yaml").read_text())
    pixels = Pixels.from_record(settings)
    images = [load_image(path, CHANS, pixels) for path in sorted(bands.glob("*.tif"))]
    valid = torch.cat([x[:, 6:].flatten(1) for x in images], 1).double()
    assert settings["mean"] == pytest.approx(valid.mean(1).tolist(), rel=1e-5)
    assert settings["std"] == pytest.approx(valid.std(1).tolist(), rel=1e-3)
    assert load(made)["args"]["clip_low"] == settings["clip_low"]
    config = read_config(made / "encoder" / "config.json")
    assert config["training"]["pixels"] == pixels.record() and set(pixels.record()) >= {"nodata", "divide", "clip_low"}
    assert config["pretrained_cfg"]["mean"] == settings["mean"]
    assert f"stored values are prepared: {pixels}." in (made / "encoder" / "README.md").read_text()


def test_a_resumed_run_keeps_what_was_measured(bands, made, monkeypatch, capsys, tmp_path):
    data = ["--data-dir", str(bands), "--in-chans", str(CHANS), *PIXELS, *TINY]
    monkeypatch.setattr(resolve, "measure_pixels", lambda *_, **__: pytest.fail("measured again"))
    resume = ["--resume", str(made / "last.pth.tar"), "--epochs", "2"]
    repeat = ["--config", str(made / "args.yaml")]
    for words in ([*data, *resume], repeat):
        assert main([*words, "--output", str(tmp_path), "--experiment", "b", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert ("as measured when the run began" in out) == (words is not repeat)
        for name in ("mean", "std", "clip_low", "clip_high"):
            assert yaml.safe_dump({name: load(made)["args"][name]}, default_flow_style=None) in out


def test_pretraining_that_continues_takes_them(made):
    config, _ = parse_options(["--model", f"local-dir:{made / 'encoder'}", "--pretrained", "--data-dir", "x"])
    found, settings = flat(config), load(made)["args"]
    for name in ("mean", "std", "clip_low", "clip_high", "nodata", "divide"):
        assert found[name] == settings[name]


def test_other_commands_apply_them_without_being_told(bands, made, monkeypatch, tmp_path):
    """The images of embedding, and of finetuning, validation and prediction, are those of pretraining."""
    wanted = load_image(bands / "00.tif", CHANS, Pixels.from_record(load(made)["args"]))
    model = f"local-dir:{made / 'encoder'}"
    seen = []
    get = FolderSource.__getitem__
    monkeypatch.setattr(FolderSource, "__getitem__", lambda self, i: seen.append(get(self, i)) or seen[-1])
    embed(model, bands, tmp_path / "x.npy", batch_size=4)
    assert torch.equal(seen[0], wanted)
    embed(model, bands, tmp_path / "y.npy", batch_size=4, nodata=1.0)  # said otherwise: 0 is data
    assert not torch.equal(seen[-12], wanted)
    folder = tmp_path / "data" / "one"
    folder.mkdir(parents=True)
    (folder / "00.tif").symlink_to(bands / "00.tif")
    pixels, _ = choose_pixels(None, model, CHANS)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(bands / "00.tif", "one/00.tif")
    for root in (folder.parent, tmp_path / "data.tar"):
        dataset = images.create_dataset(root=str(root), reading=images.Reading(CHANS, pixels), split="")
        assert torch.equal(dataset.load(0)[0], wanted)
    with pytest.raises(ValueError, match="clip_low has 5 values for 3 channels"):
        choose_pixels(None, model, 3)


def test_what_judges_an_encoder_applies_them(bands, made, monkeypatch, tmp_path):
    """Labelled images, the images of collapse, and those of the probe of pretraining."""
    settings = load(made)["args"]
    wanted = {i: load_image(bands / f"{i:02d}.tif", CHANS, Pixels.from_record(settings)) for i in range(4)}
    for i in range(4):
        folder = tmp_path / "labelled" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.tif").symlink_to(bands / f"{i:02d}.tif")
    seen = {}

    def noting(get):
        return lambda source, i: seen.setdefault(Path(source.path(i)).name, get(source, i))

    for source in (FolderSource, ImageFiles):
        monkeypatch.setattr(source, "__getitem__", noting(source.__getitem__))
    rows, scoring = Extraction(device="cpu", batch_size=4, workers=0), Scoring(k=(1,), probe=False, draws=1)
    found = evaluate_models(
        [str(made)], tmp_path / "labelled", rows, scoring, baselines=False, split=Splitting(validation_share=0.5)
    )
    assert all(torch.equal(seen[f"{i}.tif"], x) for i, x in wanted.items())
    assert found["results"][0]["preprocessing"]["pixels"] == Pixels.from_record(settings).record()
    seen.clear()
    drawn = DrawnImages(str(tmp_path / "labelled"), num_images=4)
    collapse_of_models([str(made)], drawn, Computation(device="cpu"))
    assert all(torch.equal(seen[f"{i}.tif"], x) for i, x in wanted.items())
    seen.clear()
    collapse_of_models([str(made)], drawn, Computation(device="cpu", nodata=1.0))  # said otherwise: 0 is data
    assert not torch.equal(seen["0.tif"], wanted[0])
    seen.clear()
    config = build(PretrainConfig, from_mapping(PretrainConfig, settings, "args"))
    labelled = open_probe(config, str(tmp_path / "labelled"), torch.device("cpu")).labelled
    assert len([split.source[i] for split in labelled[1:3] for i in range(len(split.source))]) == len(wanted)
    assert all(torch.equal(seen[f"{i}.tif"], x) for i, x in wanted.items())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"divide": "10"}, "training.pixels.divide = '10' .str., expected a number above 0"),
        ({"nodata": [1]}, "training.pixels.nodata"),
        ({"clip_low": [0], "clip_high": [0]}, "clip limits"),
        ({"clip_low": [0]}, "clip limits"),
        ({"clip_low": [0, 0], "clip_high": [1, 1]}, "clip_low has 2 values for 5 channels"),
        ({"gamma": 2}, "training.pixels.gamma = 2"),
    ],
)
def test_a_damaged_record_is_refused(made, tmp_path, record, words):
    config = json.loads((made / "encoder" / "config.json").read_text())
    config["training"]["pixels"] = record
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path / "config.json")


def test_images_that_cannot_be_measured_are_one_message(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(6):
        np.save(folder / f"{i}.npy", np.full((CHANS, 9, 9), i, np.float32 if i % 2 else np.uint16))
    (tmp_path / "runs").mkdir()
    data = ["--data-dir", str(folder), "--in-chans", str(CHANS), *TINY]
    refused(tmp_path / "runs" / "r", capsys, ["3 of uint16", "--mean"], data=data)
