"""Runs on windows, pages and DICOM: the options, what is refused, and what the encoder's record says."""

import json

import numpy as np
import pytest
import tifffile
import torch
from dicom_files import draw
from encoders import embed
from runs import TINY, refused, rows, run

from timm_convnextv2.checkpoint.loading import model_pixels
from timm_convnextv2.commands import check
from timm_convnextv2.commands.main import main as program
from timm_convnextv2.commands.pretrain import main, parse_options
from timm_convnextv2.data import Pixels


def scenes(folder):
    for i in range(3):
        x = np.random.default_rng(i).integers(0, 3000, (2, 100, 90 + 30 * i), np.uint16)
        x[:, :, :20] = 0
        tifffile.imwrite(
            folder / f"{i}.tif", x, photometric="minisblack", planarconfig="separate", tile=(32, 32), compression="zlib"
        )
    return ["--data-dir", str(folder), "--in-chans", "2", *TINY]


def test_a_run_on_windows(tmp_path, capsys):
    (tmp_path / "scenes").mkdir()
    words = scenes(tmp_path / "scenes")
    windows = ["--window-size", "40", "--nodata", "0", "--divide", "3000", "--clip-percentiles", "1", "99"]
    run(tmp_path / "a", *windows, "--min-content", "0.6", "--holdout", "0.3", data=words)
    printed = capsys.readouterr().out
    assert "23 windows of 40 x 40 pixels per epoch, from 3 images" in printed  # 36,000 pixels by 1,600
    assert "images are held out" in printed and np.isfinite(float(rows(tmp_path / "a")[0]["eval_loss"]))
    pixels = model_pixels(f"local-dir:{tmp_path}/a/encoder", 2)
    assert (pixels.nodata, pixels.divide, pixels.page) == (0, 3000, None) and len(pixels.clip_high or ()) == 2
    # features of whole scenes would show everything smaller than in training
    for size, said in ((40, False), (100, True)):
        for i in range(8):
            x = np.random.default_rng(i).integers(0, 3000, (2, size, size), np.uint16)
            (label := tmp_path / f"{size}" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(label / f"{i}.tif", x, photometric="minisblack", planarconfig="separate")
        place = ["--data-dir", str(tmp_path / f"{size}"), "--device", "cpu", "--workers", "0", "--output"]
        for words in (["embed", "--model"], ["evaluate"]):
            capsys.readouterr()
            output = str(tmp_path / f"{size}-{words[0]}") + (".npy" if words[0] == "embed" else "")
            assert program([*words, str(tmp_path / "a"), *place, output]) == 0
            err = capsys.readouterr().err
            text = "was trained on windows of 40 px, and these images have 100 px: what they show is 2.5 times smaller"
            assert (text in err) == said, err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--window-size 120", "3 of 3 images are smaller than a window of 120 x 120"),
        ("--window-size 0", "--window-size must be at least 1"),
        ("--min-content 0.5", "--min-content is about windows"),
        ("--windows-per-image 3", "--windows-per-image is about windows"),
        ("--window-size 40 --min-content 1.5", "--min-content must be below 1, got 1.5"),
        ("--pages all first", "--pages takes all, first, channels, or numbers"),
        ("--pages -1", "--pages takes all, first, channels, or numbers"),
        ("--dicom-window 40", "--dicom-window takes 'file', or a centre and a width"),
        ("--dicom-window 40 0", "centre and a width above 0"),
        ("--dicom-window file --divide 9", "already gives 0 to 1"),
        ("--window-size 40 --windows-per-image 0.1", "images"),
    ],
)
def test_mistakes_are_one_message(words, message, tmp_path, capsys):
    (tmp_path / "scenes").mkdir()
    data = scenes(tmp_path / "scenes")
    refused(tmp_path / "a", capsys, message, *words.split(), data=data)


def test_a_stack_as_channels_goes_into_the_record(tmp_path):
    (tmp_path / "stacks").mkdir()
    for i in range(4):
        x = np.random.default_rng(i).integers(0, 65535, (3, 36, 40), np.uint16)
        tifffile.imwrite(tmp_path / "stacks" / f"{i}.ome.tif", x, photometric="minisblack", metadata={"axes": "ZYX"})
    data = ["--data-dir", str(tmp_path / "stacks"), *TINY]
    run(tmp_path / "a", "--pages", "channels", data=data)
    encoder = f"local-dir:{tmp_path}/a/encoder"
    assert model_pixels(encoder, 3) == Pixels(page="channels")
    embed(encoder, str(tmp_path / "stacks"), str(tmp_path / "x.npy"), workers=0)
    assert len(np.load(tmp_path / "x.npy")) == 4
    assert parse_options(["--model", encoder, "--pretrained"])[0].pixels.pages == ("channels",)
    run(tmp_path / "b", "--pages", "all", "--in-chans", "1", data=data)
    assert model_pixels(f"local-dir:{tmp_path}/b/encoder", 1) == Pixels()
    assert main(["--config", str(tmp_path / "b" / "args.yaml"), "--experiment", "c", "--dry-run"]) == 0


def test_the_window_of_dicom_goes_into_the_record(tmp_path):
    pytest.importorskip("pydicom", reason="the package pydicom is not installed")
    (tmp_path / "x-rays").mkdir()
    for i in range(4):
        x = np.random.default_rng(i).integers(0, 4095, (36, 40), np.uint16)
        draw(tmp_path / "x-rays" / f"{i}.dcm", x, "MONOCHROME1", WindowCenter=2000 + i, WindowWidth=3000)
    data = ["--data-dir", str(tmp_path / "x-rays"), "--in-chans", "1", *TINY]
    run(tmp_path / "a", "--dicom-window", "file", data=data)
    encoder = f"local-dir:{tmp_path}/a/encoder"
    assert model_pixels(encoder, 1) == Pixels(dicom_window="file")
    training = json.loads((tmp_path / "a" / "encoder" / "config.json").read_text())["training"]
    assert training["pixels"] == {"dicom_window": "file"}
    embed(encoder, str(tmp_path / "x-rays"), str(tmp_path / "x.npy"), workers=0)
    assert torch.from_numpy(np.load(tmp_path / "x.npy")).isfinite().all()


def test_check_looks_at_windows_of_large_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4000)  # each scene has more than twice as many
    (tmp_path / "scenes").mkdir()
    scenes(tmp_path / "scenes")
    words = [str(tmp_path / "scenes"), "--nodata", "0", "-j", "0", "--output", str(tmp_path / "check.json")]
    assert check.main([*words, "--img-size", "32"]) == 1 and "unreadable: " in capsys.readouterr().out
    assert check.main([*words, "--window-size", "40", "--overwrite"]) == 0
    assert check.main([*words, "--window-size", "96", "--overwrite"]) == 1
    assert "small: " in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--window-size", "40"], ["--pages", "all"]])
def test_weights_of_sources_are_of_whole_images(tmp_path, capsys, more):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
        words = scenes(place)
    weights = ["--data-dir", *map(str, places), "--source-weights", "1", "3", *more]
    refused(tmp_path / "r", capsys, ["Weights of sources and lists"], *words[2:], *weights)
