"""The options that `stats` prints to paste make pretraining read the pixels that `stats` measured."""

from functools import partial

import numpy as np
import pytest
import tifffile
from dicom_files import draw
from PIL import Image
from runs import TINY

from timm_convnextv2.commands import main as cli
from timm_convnextv2.commands.pretrain import main, parse_options
from timm_convnextv2.config import entries, flat
from timm_convnextv2.data import load_image
from timm_convnextv2.data.config import PixelOptions, WindowOptions
from timm_convnextv2.data.paths.find import find_files
from timm_convnextv2.pretraining.resolve import measure
from timm_convnextv2.pretraining.setup import open_source
from timm_convnextv2.runs.group import Processes

SIZE = 40


def write(folder, kind, n=4):
    """Images of a kind; the stored values `[n, C, H, W]`."""
    folder.mkdir()
    rng, images = np.random.default_rng(0), []
    for i in range(n):
        x = 0.02 + 0.9 * rng.random((2, SIZE, SIZE)) ** 2 * rng.uniform(0.9, 1)
        x[:, 0, 0] = 0.98  # largest value of the data set
        if kind == "8 bits":
            x = (255 * x[:1]).astype(np.uint8)
            Image.fromarray(x[0]).save(folder / f"{i}.png")
        elif kind == "float":
            x = (1000 * x).astype(np.float32)
            np.save(folder / f"{i}.npy", x)
        else:
            x = ((4095 if kind == "12 bits" else 65535) * x).astype(np.uint16)
            axes = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
            tifffile.imwrite(folder / f"{i}.tif", x, **axes)
        images.append(x)
    return np.stack(images)


def pasted(folder, capsys, *options):
    """The words of the line to paste."""
    words = [str(folder), "-j", "0", "--output", str(folder.parent / "s.json"), "--overwrite"]
    assert cli.main(["stats", *words, *options]) == 0
    return capsys.readouterr().out.rstrip().rpartition("to paste:\n")[2].split()


def resolved(folder, line):
    """The config of pretraining, with what it measures at its start."""
    config, _ = parse_options(["--data-dir", str(folder), "--workers", "0", *line])
    listing = find_files(config.paths, "", 0, Processes())
    return measure(config, {}, partial(open_source, config, listing, False), Processes())[0]


@pytest.mark.parametrize("percentiles", [(), ("--clip-percentiles", "1", "99")], ids=["whole range", "percentiles"])
@pytest.mark.parametrize("kind, unit", [("8 bits", 255), ("12 bits", 4095), ("16 bits", 65535), ("float", 1)])
def test_the_line_gives_the_pixels_that_were_meant(tmp_path, capsys, kind, unit, percentiles):
    stored = write(tmp_path / "data", kind)
    config = resolved(tmp_path / "data", pasted(tmp_path / "data", capsys, *percentiles))
    channels, crops = stored.shape[1], config.crops
    pixels = config.pixels.to_pixels(channels)
    read = np.stack([load_image(p, channels, pixels).numpy() for p in sorted((tmp_path / "data").iterdir())])
    read = read / 255.0 if read.dtype == np.uint8 else read
    wanted = stored / unit
    if percentiles:
        low, high = np.percentile(wanted, (1, 99), axis=(0, 2, 3), keepdims=True, method="inverted_cdf")
        wanted = wanted.clip(low, high)
    np.testing.assert_allclose(read, wanted, atol=1e-3 * wanted.max())
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in crops.normalization)
    normalised = (read - mean) / std
    assert normalised.mean((0, 2, 3)) == pytest.approx(0, abs=1e-2)
    assert normalised.std((0, 2, 3)) == pytest.approx(1, abs=1e-2)


GIVEN = {
    "nodata": "--nodata=-3.25",
    "divide": "--divide 4094.5",
    "clip_percentiles": "--clip-percentiles 2 98",
    "clip_low": "--clip-low 0.0031 0.0012345678 --clip-high 1 2",
    "clip_high": "--clip-low -1e-05 --clip-high 0.05",
    "dicom_window": "--dicom-window 2000.5 3000",
    "standardize": "--standardize image",
    "pages": "--pages channels",
    "window_size": "--window-size 24",
    "windows_per_image": "--window-size 24 --windows-per-image 2",
    "min_content": "--window-size 24 --min-content 0.25",
    "content_std": "--window-size 24 --min-content 0.25 --content-std 0.002",
}


@pytest.mark.parametrize("name", [*entries(PixelOptions), *entries(WindowOptions)])
def test_the_line_has_every_option_that_changes_the_pixels(tmp_path, capsys, name):
    folder = tmp_path / "data"
    if name == "dicom_window":
        pytest.importorskip("pydicom", reason="needs the package pydicom")
        folder.mkdir()
        for i in range(3):
            draw(folder / f"{i}.dcm", np.random.default_rng(i).integers(9, 4000, (SIZE, SIZE), np.uint16))
    else:
        write(folder, "12 bits")
    line = pasted(folder, capsys, *GIVEN[name].split())
    wanted, _ = parse_options(["--data-dir", "x", *GIVEN[name].split(), "--in-chans", line[1]])
    config, _ = parse_options(["--data-dir", "x", *line])
    found, expected = ({**flat(c.pixels), **flat(c.windows)} for c in (config, wanted))
    if name in ("clip_low", "clip_high", "dicom_window"):  # they have the unit of the present divisor
        assert found["divide"] is None
    elif name != "divide":
        expected["divide"] = 4095  # as suggested
    assert found == expected


def test_limits_are_measured_or_named(tmp_path, capsys):
    write(tmp_path / "data", "float")
    options = "--clip-percentiles 1 99 --clip-low 0 --clip-high 1".split()
    assert cli.main(["stats", str(tmp_path / "data"), *options]) == 2
    assert "choose one" in capsys.readouterr().err


def test_limits_in_another_unit_are_named_in_the_refusal(tmp_path, capsys):
    write(tmp_path / "data", "12 bits")
    options = "--in-chans 2 --mean 0 0 --std 1 1 --divide 4095 --clip-low 0.001 --clip-high 0.0015".split()
    places = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "o")]
    assert main([*places, "--dry-run", *TINY, *options]) == 2
    said = capsys.readouterr().err
    assert "All pixels are identical" in said and "65535" not in said
    for word in ("--divide 4095", "--clip-low 0.001", "--clip-high 0.0015"):
        assert word in said
