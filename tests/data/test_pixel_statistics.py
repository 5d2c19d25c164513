"""Statistics of pixels: against numpy on all pixels at once, merged in any order, sampled, and how they are used."""

import json
import re

import numpy as np
import pytest
import tifffile
import torch
from dicom_files import draw
from PIL import Image

from timm_convnextv2.commands import main as cli
from timm_convnextv2.commands import stats
from timm_convnextv2.data import FolderSource, Pixels, load_image
from timm_convnextv2.data.formats.decode import read_header
from timm_convnextv2.data.measure.pixel_statistics import PERCENTILES, PixelStatistics
from timm_convnextv2.data.measure.sample import find_channels, measure, measure_pixels

CHANS = 5


def scenes(folder, n=12, kind=np.uint16, size=(20, 24), hole=True):
    """Multi-band TIFFs whose brightness differs from scene to scene, with a corner of nodata (0)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for i in range(n):
        rng = np.random.default_rng(i)
        base = 1000 * (1 + np.arange(CHANS))[:, None, None] + 200 * rng.normal()
        x = (base + 100 * rng.normal(size=(CHANS, size[0] + i % 3, size[1]))).clip(1, 60000).astype(kind)
        if hole:
            x[:, :4, :5] = 0
        tifffile.imwrite(folder / f"{i:02d}.tif", x, photometric="minisblack", metadata={"axes": "CYX"})
        arrays.append(x)
    return arrays


def flat(arrays, nodata=0):
    """All pixels of all images, `[C, N]`, as float64."""
    return np.concatenate([x[:, (x != nodata).all(0)].reshape(CHANS, -1) for x in arrays], 1).astype(np.float64)


def same(a, b):
    for c in range(a.channels):
        one, other = a.channel(c), b.channel(c)
        for key in one:
            exact = key not in ("mean", "std", "between", "within")
            assert one[key] == (other[key] if exact else pytest.approx(other[key], rel=1e-10)), (c, key)


def test_they_are_those_of_all_pixels_at_once_and_merge_in_any_order():
    rng = np.random.default_rng(0)
    # a constant channel, a narrow one far from 0, one with outliers, one with NaN, one of both signs
    images = []
    for i in range(9):
        x = np.stack([np.full((7, 11 + i), 3.0), 1e6 + rng.random((7, 11 + i)), *rng.normal(size=(3, 7, 11 + i))])
        x[2, 0, 0] = 1e5 * (i == 4)
        x[3, i % 7] = np.nan if i % 2 else np.inf
        images.append(x)
    whole, parts = PixelStatistics(CHANS), [PixelStatistics(CHANS) for _ in images]
    for x, part in zip(images, parts, strict=True):
        whole.add(x, largest=3.0)
        part.add(x, largest=3.0)
    for order in (range(9), rng.permutation(9)):
        joined, half = PixelStatistics(CHANS), PixelStatistics(CHANS)
        for k, i in enumerate(order):
            (half if k % 2 else joined).merge(parts[i])
        joined.merge(half)
        same(joined, whole)
        assert joined.images == 9
    for c in range(CHANS):
        values = np.concatenate([x[c].ravel() for x in images])
        values = values[np.isfinite(values)]
        found = whole.channel(c)
        assert found["pixels"] == values.size and found["missing"] == pytest.approx(1 - values.size / (9 * 7 * 15))
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert found["std"] == pytest.approx(values.std(), rel=1e-9, abs=1e-12)
        assert (found["min"], found["max"]) == (values.min(), values.max())
        assert found["saturated"] == pytest.approx((values >= 3).mean())
        for p in PERCENTILES:
            exact = np.percentile(values, p, method="inverted_cdf")
            assert abs(found[f"p{p}"] - exact) <= found["resolution"], (c, p)
            assert found[f"p{p}"] in values
        spread = values.max() - values.min()
        assert found["resolution"] <= max(spread / 2048, abs(values).max() * 2**-39)
        edges, counts = whole.histogram(c)
        assert counts.sum() == values.size and len(edges) == len(counts) + 1 and edges[0] <= values.min()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_percentiles_of_stored_values_occur_and_are_exact_where_bins_suffice(bits):
    """With 7 % zeros, as of nodata, merged from images of other ranges."""
    rng, found, images = np.random.default_rng(bits), PixelStatistics(1), []
    for i in range(5):
        x = rng.integers(1, 2 ** (bits - i % 3), (1, 40, 50)) / np.float32(255 if bits == 8 else 65535)
        x[:, :, :4] = 0
        images.append(x)
        found.add(x)
    values = np.concatenate(images, 1)[0]
    for p in (0, *PERCENTILES, 7.5, 8, 99.99, 100):
        exact, measured = np.percentile(values, p, method="inverted_cdf"), found.percentile(p)[0]
        assert measured in values and abs(measured - exact) <= found.resolution[0]
        assert measured == exact or bits == 16 and 0 < p < 100 and exact > 0


def test_the_standard_error_is_that_of_drawing_other_images():
    rng = np.random.default_rng(1)
    levels = rng.normal(size=400)
    means, errors = [], []
    for _ in range(120):
        found = PixelStatistics(1)
        for level in rng.choice(levels, 40):
            found.add(level + 0.5 * rng.normal(size=(1, 6, rng.integers(4, 12))))
        means.append(found.mean[0] / found.std[0])
        errors.append(found.standard_error()[0])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.25)
    assert found.standard_error(total=40)[0] == 0  # all of them were seen


def test_the_sample_is_as_large_as_the_error_asks_for_and_follows_the_seed(tmp_path):
    scenes(tmp_path, 72, size=(6, 6), hole=False)

    def found(seed=0, workers=0, **options):
        source = FolderSource(tmp_path, CHANS, Pixels())
        return measure(source, seed=seed, workers=workers, **options)

    loose, tight = found(error=0.5), found(error=1e-9)
    assert loose.pixels.images == 32 and loose.error <= 0.5 and loose.error > 0
    assert tight.pixels.images == tight.total == 72 and tight.error == 0
    some = found(error=0.15)
    assert 32 <= some.pixels.images < 72 and some.error <= 0.15
    assert found(error=1e-9, max_images=40).pixels.images == 40
    same(loose.pixels, found(error=0.5, workers=2).pixels)
    assert loose.pixels.mean.tolist() == found(error=0.5, workers=2).pixels.mean.tolist()
    assert loose.pixels.mean.tolist() != found(seed=1, error=0.5).pixels.mean.tolist()


def test_nodata_is_left_out_and_clipping_is_measured_again(tmp_path):
    arrays = scenes(tmp_path)
    found, pixels = measure_pixels(
        lambda pixels: FolderSource(tmp_path, CHANS, pixels), Pixels(nodata=0, divide=10000), (5, 95), error=1e-9
    )
    values = flat(arrays) / 10000
    resolution = found.pixels.resolution.max() * 4
    for c in range(CHANS):
        assert pixels.clip_low[c] == pytest.approx(np.percentile(values[c], 5), abs=resolution)
        clipped = values[c].clip(pixels.clip_low[c], pixels.clip_high[c])
        assert found.pixels.mean[c] == pytest.approx(clipped.mean(), rel=1e-6)
        assert found.pixels.std[c] == pytest.approx(clipped.std(), rel=1e-5)
    assert found.kind == "uint16" and found.stored == pytest.approx((10000 * values.min(), 10000 * values.max()))
    # and images come as they were measured
    image = load_image(tmp_path / "00.tif", CHANS, pixels)
    assert image.dtype == torch.float32 and image.max() <= max(pixels.clip_high) * (1 + 1e-6)
    assert Pixels.from_record(json.loads(json.dumps(pixels.record()))) == pixels


def test_a_divisor_replaces_the_scale_of_every_kind(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8)).save(tmp_path / "x.png")
    assert torch.equal(load_image(tmp_path / "x.png", 3, Pixels(divide=2)), load_image(tmp_path / "x.png").float() / 2)
    large = rng.integers(0, 2**31, (1, 5, 6), np.int32)
    np.save(tmp_path / "x.npy", large)
    with pytest.raises(ValueError, match="int32.*--divide"):
        load_image(tmp_path / "x.npy", 1)
    read = load_image(tmp_path / "x.npy", 1, Pixels(divide=2.0**31))
    assert torch.equal(read, torch.from_numpy(large / 2.0**31).float())
    white = rng.integers(0, 4095, (5, 6), np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", white, photometric="miniswhite")
    got = load_image(tmp_path / "x.tif", 1, Pixels(divide=1000))
    torch.testing.assert_close(got[0], torch.from_numpy((65535 - white.astype(np.float32)) / 1000))


def test_headers_tell_what_decoding_does(tmp_path):
    scenes(tmp_path, 1)
    np.save(tmp_path / "a.npy", np.zeros((3, 9, 8), np.float32))
    Image.new("RGBA", (8, 9)).save(tmp_path / "b.png")
    Image.new("I;16", (8, 9)).save(tmp_path / "c.png")
    names = {"00.tif": ("TIFF", 20, 24, 5, "uint16"), "a.npy": ("npy", 9, 8, 3, "float32")}
    names |= {"b.png": ("PNG", 9, 8, 3, "uint8"), "c.png": ("PNG", 9, 8, 1, "uint16")}
    for name, header in names.items():
        assert read_header(tmp_path / name) == header
        assert len(load_image(tmp_path / name, header[3])) == header[3]


# ------------------------------------------------------------------------------------------------------- the command


def run(tmp_path, capsys, *words, status=0):
    """`timm-convnextv2 stats`: what it printed and wrote."""
    assert cli.main(["stats", *words, "-j", "0", "--output", str(tmp_path / "out.json")]) == status
    out, err = capsys.readouterr()
    return out, err, json.loads((tmp_path / "out.json").read_text()) if status == 0 else None


def test_command(tmp_path, capsys):
    arrays = scenes(tmp_path / "data")
    out, _, found = run(tmp_path, capsys, str(tmp_path / "data"), "--nodata", "0", "--divide", "10000")
    values = flat(arrays) / 10000
    assert found["images"] == found["of"] == 12 and found["type"] == "uint16" and found["standard_error"] == 0
    assert found["mean"] == pytest.approx(values.mean(1).tolist(), rel=1e-5)
    assert found["std"] == pytest.approx(values.std(1).tolist(), rel=1e-4)
    assert found["pixels"] == {"nodata": 0, "divide": 10000} and found["channels"][0]["missing"] > 0
    assert "--in-chans 5 --nodata 0 --divide 10000 --mean 0." in out
    assert Image.open(tmp_path / "out.png").size[0] > 500
    _, err, _ = run(tmp_path, capsys, str(tmp_path / "data"), status=2)
    assert "exists" in err and "--overwrite" in err


@pytest.mark.parametrize(
    ("kind", "channels", "largest", "suggested", "said"),
    [
        (np.uint16, 5, 4087, ["--nodata 0", "--divide 10000"], "reflectances"),
        (np.uint16, 12, 900, ["--nodata 0", "--divide 10000"], "--divide 1023: 10 bits"),
        (np.uint16, 12, 250, ["--nodata 0", "--divide 255"], "8 bits"),
        (np.uint16, 4, 4087, ["--nodata 0", "--divide 4095"], "12 bits"),
        (np.uint16, 1, 4087, ["--nodata 0", "--divide 4095"], "12 bits"),
        (np.float32, 2, 900, ["--nodata 0"], ""),
        (np.uint8, 5, 250, ["--nodata 0"], ""),
        (np.uint8, 3, 250, [], "of the pixels are 0 in all 3 channels"),
        (np.uint8, 1, 250, [], ""),
    ],
)
def test_suggestions_follow_the_kind_of_the_images(tmp_path, capsys, kind, channels, largest, suggested, said):
    """A tenth of the pixels is 0: nodata in a raster, a black border in a photograph."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        x = np.random.default_rng(i).integers(1, largest, (channels, 40, 44)).astype(kind)
        x[:, 5, 5], x[:, :4] = largest, 0
        np.save(tmp_path / f"data/{i}.npy", x)
    for more in ([], ["--clip-percentiles", "20", "90"]):  # limits hide neither zeros nor the largest value
        out, _, found = run(tmp_path, capsys, str(tmp_path / "data"), "--overwrite", *more)
        assert [*found["suggested"]] == suggested
        assert said in out and ("Crop it" in out) == (kind is np.uint8 and channels == 3)


@pytest.mark.parametrize("window", [[], ["--dicom-window", "2000", "4000"]])
def test_black_in_dicom_is_not_taken_for_nodata(tmp_path, capsys, window):
    pytest.importorskip("pydicom", reason="needs the package pydicom")
    (tmp_path / "data").mkdir()
    for i in range(3):
        x = np.random.default_rng(i).integers(1, 4095, (40, 44), np.uint16)
        x[:4] = 4095
        draw(tmp_path / f"data/{i}.dcm", x, "MONOCHROME1")
    _, _, found = run(tmp_path, capsys, str(tmp_path / "data"), *window)
    assert found["channels"][0]["zeros"] > 0.09 and found["suggested"] == {}


@pytest.mark.parametrize("given", ["", "--nodata 0", "--divide 10000", "--nodata 0 --divide 10000"])
def test_options_that_the_values_suggest(tmp_path, capsys, given):
    """Of 16-bit scenes with 5.9 % zeros in all bands and a maximum of 4,744."""
    for i, x in enumerate(scenes(tmp_path / "data", 4, size=(34, 40), hole=False)):
        x[:, :2, :] = 0
        x[0, 9, 9] = 4744
        tifffile.imwrite(
            tmp_path / f"data/{i:02d}.tif", x.clip(0, 4744), photometric="minisblack", metadata={"axes": "CYX"}
        )
    out, _, found = run(tmp_path, capsys, str(tmp_path / "data"), *given.split())
    options = {"--nodata 0": r"5\.\d% .* exactly 0 in all 5 channels", "--divide 10000": r"4744 of 65535"}
    expected = [option for option in options if option not in given]
    assert [*found["suggested"]] == expected
    for option in expected:
        assert re.search(f"  {option} +.*{options[option]}", out)
    pasted = out.rstrip().rpartition("\n")[2].strip()
    assert pasted.startswith("--in-chans 5 ") and " --nodata" in pasted and " --divide 10000 " in pasted
    assert ("--mean auto --std auto" in pasted) == bool(expected)


@pytest.mark.parametrize(
    ("count", "more", "options", "words"),
    [
        (3, np.zeros((2, 9, 9), np.float32), "", "3 .* 5 channels of uint16 .*; 1 .* 2 channels"),
        (3, np.zeros((CHANS, 9, 9), np.float32), "", "3 of uint16 .*; 1 of float32"),
        (0, np.full((1, 9, 9), -9999, np.float32), "--nodata -9999", "nodata everywhere"),
        (12, None, "--clip-percentiles -1 50", "--clip-percentiles -1 50"),
        (12, None, "--error 0", "standard error.* 0.0"),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, count, more, options, words):
    scenes(tmp_path / "data", count)
    if more is not None:
        np.save(tmp_path / "data/x.npy", more)
    out, err, _ = run(tmp_path, capsys, str(tmp_path / "data"), *options.split(), status=2)
    assert not out and err.count("error:") == 1
    assert re.search(words, err), err
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.png").exists()


def test_the_figure_does_not_become_an_image_of_the_data(tmp_path, capsys):
    scenes(tmp_path, 2)
    _, err, _ = run(tmp_path, capsys, str(tmp_path), status=2)
    assert "would lie among the images" in err
    assert stats.StatsConfig().output is None
    assert find_channels(FolderSource(tmp_path, CHANS)) == CHANS
