"""`--standardize`: each channel of each image, or each image, to mean 0 and variance 1, in every command."""

import json
import re

import numpy as np
import pytest
import tifffile
import torch
from encoders import embed
from PIL import Image
from real import NETWORK, call

from timm_convnextv2.checkpoint.provenance import check_training
from timm_convnextv2.commands.main import main
from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.config import flat
from timm_convnextv2.data import DemoSource, FolderSource, Pixels, WindowOptions, WindowSource, load_image
from timm_convnextv2.data.formats.pixels import STD_FLOOR
from timm_convnextv2.features.labelled import open_labelled
from timm_convnextv2.finetune import images
from timm_convnextv2.finetune.model import choose_pixels
from timm_convnextv2.transfer import create_backbone

SIZE = (33, 47)


def stored(kind, channels, size=SIZE, seed=0):
    """Values of a type, with another mean and spread in each channel, and 7 in a corner."""
    rng = np.random.default_rng(seed)
    high = {"uint8": 250, "uint16": 60000, "float32": 3.0}[kind]
    scale = (0.2 + 0.7 * rng.random((channels, 1, 1))) * high
    x = (scale * (0.3 + 0.6 * rng.random((channels, *size)))).astype(kind)
    x[:, :5, :8] = 7
    return x


def write(path, x):
    """Writes `[C, H, W]` as the suffix says; returns the path."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, x, photometric="minisblack", metadata={"axes": "CYX"}, compression="zlib", tile=(16, 16))
    else:
        Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)).save(path)
    return path


def standardized(x, how, missing=None):
    """The definition, by NumPy: `x` `[C, H, W]` float64 in units of the pixels, `missing` bool `[C, H, W]`."""
    missing, found = np.zeros(x.shape, bool) if missing is None else missing, np.zeros(x.shape)
    for part in [slice(c, c + 1) for c in range(len(x))] if how == "channel" else [slice(None)]:
        valid = x[part][~missing[part]]
        found[part] = (x[part] - valid.mean()) / max(valid.std(), STD_FLOOR)
    return np.where(missing, 0, found)


@pytest.mark.parametrize("how", ["channel", "image"])
@pytest.mark.parametrize("nodata", [None, 7])
@pytest.mark.parametrize(
    ("name", "kind", "channels"),
    [
        ("x.png", "uint8", 1), ("x.png", "uint8", 3), ("x.png", "uint16", 1), ("x.npy", "float32", 1),
        ("x.npy", "uint16", 12), ("x.npy", "uint8", 12), ("x.tif", "uint16", 3), ("x.tif", "uint8", 12),
    ],
)  # fmt: skip
def test_values_are_those_of_numpy(tmp_path, name, kind, channels, nodata, how):
    x = stored(kind, channels)
    path = write(tmp_path / name, x)
    unit = {"uint8": 255, "uint16": 65535, "float32": 1}[kind]
    gone = None if nodata is None else np.broadcast_to((x == 7).all(0), x.shape)
    image = load_image(path, channels, Pixels(nodata=nodata, standardize=how))
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image, standardized(x / unit, how, gone), atol=2e-5)
    limits = Pixels(nodata, 2.0 * unit, (0.1,), (0.3,), standardize=how)
    clipped = load_image(path, channels, limits)
    np.testing.assert_allclose(clipped, standardized((x / unit / 2).clip(0.1, 0.3), how, gone), atol=1e-4)


@pytest.mark.parametrize("how", ["channel", "image"])
def test_constant_images_are_zero_and_small_differences_stay_small(tmp_path, how):
    x = np.full((3, 9, 7), 131, np.uint8)
    assert not load_image(write(tmp_path / "x.png", x), 3, Pixels(standardize=how)).any()
    level = np.full((1, 9, 7), 0.25, np.float32)
    level[0, 0, 0] += STD_FLOOR / 100
    image = load_image(write(tmp_path / "x.npy", level), 1, Pixels(standardize=how))
    assert 0 < image.abs().max() < 0.011


def test_grey_of_colours_with_nodata_and_large_offsets(tmp_path):
    x = stored("uint8", 3)
    x[:, 10:20, 10:20] = np.array([0, 9, 0])[:, None, None]
    path, pixels = write(tmp_path / "x.png", x), Pixels(nodata=7, standardize="channel")
    image, grey = load_image(path, 1, pixels)[0], np.asarray(Image.open(path).convert("L"), np.float64)
    np.testing.assert_allclose(image, standardized(grey[None] / 255, "channel", (x == 7).all(0)[None])[0], atol=2e-5)
    counts = (1e6 + np.random.default_rng(0).random((1, 9, 8))).astype(np.float32)
    image = load_image(write(tmp_path / "x.npy", counts), 1, Pixels(standardize="channel"))
    np.testing.assert_allclose(image, standardized(counts.astype(np.float64), "channel"), atol=1e-4)


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.npy"])
def test_a_window_is_standardised_by_itself_after_its_content_is_judged(tmp_path, name):
    """Also if the format makes it decode the whole image; noise of an empty region is no content."""
    x = np.full((1, 64, 96), 50, np.uint8)
    x[:, ::2, ::2] += 1
    x[:, :, 56:] = stored("uint8", 1, (64, 40))
    write(tmp_path / name, x)
    pixels = Pixels(nodata=7, standardize="channel")
    plain, source = (FolderSource(tmp_path, 1, p) for p in (pixels._replace(standardize=None), pixels))
    for at in range(4):
        options = WindowOptions(16, min_content=0.9, content_std=0.01)
        image, raw = WindowSource(source, options).read(0, seed=at), WindowSource(plain, options).read(0, seed=at)
        assert raw.float().std() > 4
        gone = raw.numpy() == 7
        if not gone.any():
            np.testing.assert_allclose(image, standardized(raw.numpy() / 255.0, "channel"), atol=2e-5)
            assert abs(float(image.mean())) < 1e-5 and abs(float(image.var(correction=0)) - 1) < 1e-4


def test_the_demo_is_standardised_too():
    options = "--dataset demo --standardize image".split()
    config, _ = parse_options(options)
    raw, image = DemoSource(8, 32)[5], DemoSource(8, 32, pixels=config.pixels.to_pixels())[5]
    np.testing.assert_allclose(image, standardized(raw.numpy() / 255.0, "image"), atol=2e-5)


# -------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """16-bit images with 5 channels in two class folders, and the run that was pretrained on them."""
    root = tmp_path_factory.mktemp("standardized")
    for i in range(8):
        (root / f"data/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        write(root / f"data/{'ab'[i % 2]}/{i}.npy", stored("uint16", 5, (40, 36), seed=i) // (1 + i))
    words = "pretrain --epochs 1 --batch-size 4 --device cpu --workers 0 --in-chans 5 --standardize channel --nodata 7"
    call(words, *NETWORK, "--data-dir", root / "data", "--output", root, "--experiment", "run", "--mean", "auto")
    return root / "data", root / "run"


def test_every_command_sees_the_numbers_of_pretraining(made, tmp_path, monkeypatch):
    data, run = made
    config = json.loads((run / "encoder/config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0] * 5 and config["pretrained_cfg"]["std"] == [1] * 5
    assert config["training"]["pixels"] == {"nodata": 7, "standardize": "channel"}
    assert "each channel of each image to mean 0 and variance 1" in (run / "encoder/README.md").read_text()
    x = np.load(data / "a/0.npy")
    wanted = standardized(x / 65535, "channel", np.broadcast_to((x == 7).all(0), x.shape))
    model = f"local-dir:{run / 'encoder'}"
    seen, read = [], FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, *args: seen.append(read(self, *args)) or seen[-1])
    embed(model, data, tmp_path / "x.npy", batch_size=4)
    pixels, _ = choose_pixels(None, model, 5)
    seen.append(open_labelled(data, in_chans=5, pixels=pixels, validation_share=0.5).train.source.reading(5, pixels)[0])
    seen.append(images.create_dataset(root=str(data), reading=images.Reading(5, pixels), split="").load(0)[0])
    seen.append(create_backbone(model).load_image(data / "a/0.npy"))
    for image in (seen[0], *seen[-2:]):
        np.testing.assert_allclose(image, wanted, atol=2e-5)
    found, _ = parse_options(["--model", model, "--pretrained", "--data-dir", "x"])
    assert flat(found)["standardize"] == "channel" and flat(found)["mean"] == [0] * 5
    other, _ = parse_options(["--model", model, "--pretrained", "--data-dir", "x", "--nodata", "3"])
    assert flat(other)["mean"] == ["auto"]  # other pixels than those of the start model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--standardize channel --mean 0.5 0.5 0.5", "--mean is 0 with --standardize channel"),
        ("--standardize image --std 0.2 0.2 0.2", "--std is 1 with --standardize image"),
        ("--standardize pixel", "invalid choice: 'pixel'"),
        ("--dataset demo --standardize image --nodata 3", "demo data set .* 3 is nodata"),
    ],
)
def test_contradictions_are_refused(words, message, capsys, tmp_path):
    arguments = [*words.split(), *([] if "demo" in words else ["--data-dir", "x"]), "--output", str(tmp_path)]
    assert main(["pretrain", *arguments, "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_record_of_a_folder_is_checked():
    with pytest.raises(ValueError, match=r"training.pixels.standardize = 'pixel' .*expected 'channel' or 'image'"):
        check_training("x", {"training": {"made_with": {"timm_convnextv2": "1"}, "pixels": {"standardize": "pixel"}}})


# ------------------------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize(("spread", "advised"), [(60, True), (5, False)])
def test_stats_advises_it_if_images_differ_more_than_their_pixels(tmp_path, capsys, spread, advised):
    rng = np.random.default_rng(0)
    levels = 125 + spread * np.where(np.arange(12) % 2, 1, -1)
    pixels = [np.clip(level + 20 * rng.normal(size=(1, 15, 14)), 0, 255).astype(np.uint8) for level in levels]
    (tmp_path / "data").mkdir()
    for i, x in enumerate(pixels):
        write(tmp_path / f"data/{i}.png", x)
    words = ["stats", str(tmp_path / "data"), "-j", "0", "--output", str(tmp_path / "out.json"), "--overwrite"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert ("--standardize channel" in out) == advised
    channel = json.loads((tmp_path / "out.json").read_text())["channels"][0]
    x = np.stack(pixels)[:, 0].astype(np.float64) / 255
    assert channel["between"] == pytest.approx(x.mean((1, 2)).std(), rel=1e-6)
    assert channel["within"] == pytest.approx(np.sqrt(x.var((1, 2)).mean()), rel=1e-6)
    assert main([*words, "--standardize", "image"]) == 0  # the pixels before it; the line to paste has it
    out = capsys.readouterr().out
    assert "between each other" not in out and out.rstrip().endswith("--in-chans 1 --standardize image")
    assert json.loads((tmp_path / "out.json").read_text())["channels"][0] == channel
