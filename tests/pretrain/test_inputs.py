"""What reaches the network is measured before the start: printed, warned about where it is far off, or refused."""

import re

import numpy as np
import pytest
import torch
from helpers import write_tar
from PIL import Image
from runs import ERROR, SMALL, command, image_folder, run, spoil

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.data import DemoSource, InputStatistics, PretrainTransform
from timm_convnextv2.pretraining import batches, inputs
from timm_convnextv2.pretraining.config import Loading

RGB = ["--img-size", "64", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--dry-run", *SMALL]
GREY = [*RGB, "--in-chans", "1"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def textures(n=12, size=96, low=0.0, high=1.0):
    """Grey images with structure at all scales, float `[n, size, size]` in low..high."""
    random = np.random.default_rng(0)
    layers = [np.kron(random.random((n, s, s)), np.ones((1, size // s, size // s))) for s in (3, 12, 48)]
    return low + (high - low) * sum(layers) / len(layers)


def cells(n=12, size=96):
    """Microscopy: a few dim spots on exact black."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    spots = [
        0.3 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2 / random.uniform(4, 9) ** 2)
        for cy, cx in random.integers(0, size, (40, 2))
    ]
    return np.array([sum(spots[i : i + 4]) for i in range(n)])


def folder(path, images, bits=8):
    """PNGs of 8 or 16 bits, or .npy files of what is float32 already or has channels first."""
    path.mkdir()
    for i, image in enumerate(images):
        if image.dtype == np.float32:
            np.save(path / f"{i}.npy", image)
        else:
            kind = np.uint8 if bits == 8 else np.uint16
            Image.fromarray((np.clip(image, 0, 1) * np.iinfo(kind).max).astype(kind)).save(path / f"{i}.png")
    return str(path)


def start(capsys, path, *options, status=0, line=GREY):
    """What a dry run prints."""
    assert main([*line, "--data-dir", path, "--output", path, *options]) == status
    return capsys.readouterr()


def measured(text):
    """Mean and std of the channels that the line says."""
    found = re.search(r"Input after normalisation, \d+ images: mean (.*), std (.*), range", text)
    return [[float(x) for x in found[i].split()] for i in (1, 2)]


def test_statistics_are_those_of_the_pixels():
    torch.manual_seed(0)
    images = [torch.randn(4, 64, 96) * torch.tensor([1, 2, 3, 0.5])[:, None, None] + i for i in range(5)]
    for i, image in enumerate(images):
        image[3] = 0.2 * i  # flat, another value in each image
        image[0, :32, :32] = 1.5
    mean, std = [0.5, 1, 0, 2], [0.1, 2, 1, 3]
    found = InputStatistics(32, mean, std)
    for image in images:
        found.add(image)
    every = torch.stack(images).double().transpose(0, 1).flatten(1)
    assert torch.allclose(found.mean, every.mean(1)) and torch.allclose(found.std, every.std(1, correction=0))
    assert torch.equal(found.low, every.amin(1).float()) and torch.equal(found.high, every.amax(1).float())
    assert torch.allclose(found.stored_mean, every.mean(1) * torch.tensor(std) + torch.tensor(mean))
    assert torch.allclose(found.stored_std, every.std(1, correction=0) * torch.tensor(std))
    assert found.flat.tolist() == pytest.approx([1 / 6, 0, 0, 1])
    blocks = torch.stack(images).double().unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(3)
    assert found.patch_variance == pytest.approx(blocks.var(-1).median().item(), rel=1e-5)
    assert found.equal == [] and found.constant == [] and found.images == 5


def test_equal_and_constant_channels():
    mean, std = [0.1, 0.5, 0.9, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = InputStatistics(32, mean, std)
    for _ in range(3):
        a, b = torch.rand(2, 32, 32)
        image = torch.stack([a, b, a, torch.ones(32, 32), a, b])
        found.add((image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    assert found.equal == [[0, 2, 4], [1, 5]] and found.constant == [3]


def test_readme_command_is_silent(tmp_path, capfd, monkeypatch):
    """The demo set with its own settings: one line of numbers, no warning."""
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--device", "cpu"]) == 0
    printed = capfd.readouterr()
    mean, std = measured(printed.out)
    assert len(mean) == 3 and all(abs(m) < 0.5 for m in mean) and all(0.8 < s < 1.3 for s in std)
    assert printed.err == "" and "arning" not in printed.out


@pytest.mark.parametrize(
    "images, bits, line",
    [
        (textures(high=0.45), 16, GREY),  # X-ray, dark
        (cells(), 8, GREY),
        (np.stack([cells(), 0.5 * cells(), textures(high=0.2)], -1), 8, RGB),
        (textures(low=0.8), 8, GREY),  # documents, drawings on white
        ((textures() > 0.5) * 1.0, 8, GREY),
        (np.stack([textures(), textures()[::-1], textures(high=0.8)], -1), 8, RGB),
    ],
    ids=["x-ray", "microscopy", "fluorescence", "white", "binary", "photographs"],
)
def test_usual_images_pass_silently(tmp_path, capsys, images, bits, line):
    printed = start(capsys, folder(tmp_path / "d", images, bits), line=line)
    assert printed.err == "" and "Input after normalisation, 12 images" in printed.out


def pasted(text):
    """The options that a message ends with."""
    return re.search(r"--mean [-\d. ]+--std [-\de. ]+", text)[0].rstrip(". ").split()


TWELVE_BITS = textures(high=1 / 16)
BANDS = np.stack([textures(), 3000 * textures()], 1).astype(np.float32)
VALUES_255 = np.stack([255 * textures(), 255 * textures()[::-1], 200 * textures()], 1).astype(np.float32)


@pytest.mark.parametrize(
    "images, bits, line, options, words",
    [
        (TWELVE_BITS, 16, GREY, [], ["pixels have mean -1.9 and std 0.0", "They range from"]),
        (BANDS, 8, [*RGB, "--in-chans", "2", "--mean", ".5", ".5", "--std", ".2", ".2"], [], ["channel 2 has mean"]),
        (VALUES_255, 8, RGB, [], ["all channels have", "floats not at all"]),
    ],
    ids=["12 bits in words of 16", "one band of two", "floats of 0 to 255"],
)
def test_far_off_is_a_warning_with_what_fits(tmp_path, capsys, images, bits, line, options, words):
    path = folder(tmp_path / "d", images, bits)
    printed = start(capsys, path, *options, line=line)
    assert printed.err.count("warning: --mean and --std do not fit the images") == 1
    assert all(word in printed.err for word in words)
    again = start(capsys, path, *options, *pasted(printed.err), line=line)
    assert again.err == ""
    mean, std = measured(again.out)
    assert all(abs(m) < 0.1 for m in mean) and all(0.9 < s < 1.1 for s in std)


@pytest.mark.parametrize(
    "options",
    [
        ["--mean", "1353.7", "1117.2", "1041.8", "--std", "897.3", "736.0", "684.8"],
        ["--mean", "123.7", "116.3", "103.5", "--std", "58.4", "57.1", "57.4"],
    ],
    ids=["12 bits", "8 bits"],
)
def test_normalisation_in_the_units_of_the_file_is_refused(tmp_path, capsys, options):
    images = np.stack([textures(), textures()[::-1], textures(high=0.8)], -1)
    path = folder(tmp_path / "d", images)
    printed = start(capsys, path, *options, status=2, line=RGB)
    assert printed.err.startswith(f"{ERROR}--mean and --std do not fit") and printed.out == ""
    assert "8-bit by 255" in printed.err
    fits = pasted(printed.err)
    truth = images.reshape(-1, 3)
    assert [float(x) for x in fits[1:4]] == pytest.approx(truth.mean(0).tolist(), abs=0.03)
    assert [float(x) for x in fits[5:]] == pytest.approx(truth.std(0).tolist(), rel=0.2)
    assert start(capsys, path, *fits, line=RGB).err == ""


@pytest.mark.parametrize(
    "images, words",
    [
        (np.full((9, 64, 64), 0.3), "All pixels are identical"),
        (np.ones((9, 64, 64)) * np.linspace(0, 1, 9)[:, None, None], "Each patch has one value"),
    ],
)
def test_blank_images_are_refused(tmp_path, capsys, images, words):
    printed = start(capsys, folder(tmp_path / "d", images), status=2)
    assert printed.err.count(ERROR) == 1 and words in printed.err and "blank" in printed.err


def test_channels_that_tell_nothing(tmp_path, capsys):
    grey = start(capsys, folder(tmp_path / "grey", textures()), line=RGB)
    assert "warning: Channels 1, 2 and 3 are equal in all 12 images tried. Read grey" in grey.err
    opaque = np.stack([*[textures(high=h) for h in (1, 0.9, 0.8)], np.ones((12, 96, 96))], -1)
    four = ["--in-chans", "4", "--mean", *["0.5"] * 4, "--std", *["0.25"] * 4]
    alpha = start(capsys, folder(tmp_path / "alpha", opaque), line=[*RGB, *four])
    assert alpha.err == "warning: Channel 4 has one value in all 12 images tried.\n"
    bands = np.stack([textures(), textures(high=0.9), textures()], 1).astype(np.float32)
    five = start(capsys, folder(tmp_path / "bands", bands), line=RGB)
    assert five.err == (
        "warning: Channels 1 and 3 are equal in all 12 images tried. Is --in-chans what the files have?\n"
    )


def test_images_that_cannot_be_read_do_not_count(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {0, 7})
    run(tmp_path / "r", "--dry-run", "--max-bad-images", "0.1")
    assert "Input after normalisation, 30 images" in capsys.readouterr().out


def test_stream_is_looked_at(tmp_path, capsys):
    """A stream has no index: the few images that are shown count."""
    pytest.importorskip("webdataset", reason="needs the package webdataset")
    images = sorted(image_folder(tmp_path / "images", n=16).iterdir())
    write_tar(tmp_path / "shard-0000.tar", {path.name: path.read_bytes() for path in images})
    line = ["--dataset", "wds/", "--data-dir", str(tmp_path), "--split", "shard-{0000..0000}.tar"]
    line += ["--num-images", "16"]
    assert main([*RGB, *line]) == 0
    assert "Input after normalisation, 6 images" in capsys.readouterr().out


def test_image_that_is_not_finite_is_named(tmp_path, capsys, no_images):
    """NaN in an image is that image's fault, not of the loss: it is skipped by its name."""
    path = tmp_path / "d"
    folder(path, textures()[:, None].astype(np.float32))
    broken = np.load(path / "5.npy")
    broken[0, 40, 40] = np.nan
    np.save(path / "5.npy", broken)
    out = tmp_path / "r"
    line = command(out, "--data-dir", str(path), "--in-chans", "1", "--max-bad-images", "0.2", "--batch-size", "4")
    assert main(line) == 0
    printed = capsys.readouterr()
    assert re.search(r"Skipped .*5\.npy: contains NaN", printed.out) and "loss" not in printed.err


def test_all_processes_get_what_the_first_measured(monkeypatch):
    """One message, the same everywhere: what is checked is what the first process saw."""
    found = InputStatistics(32, *IMAGENET)
    for image in torch.zeros(2, 3, 32, 32):
        found.add(image)

    class World:
        primary, size, rank = False, 2, 1

        def share(self, value):
            assert value.images == 0  # another process tries the images, and does not look
            return found

    sampling = batches.Sampling(PretrainTransform(64), (2, 2), 0.5, seed=0)
    opened = batches.open_batches(
        lambda: DemoSource(16, 64), sampling, batch_size=4, loading=Loading(workers=0), world=World()
    )
    assert opened.inputs is found
    with pytest.raises(ValueError, match="All pixels are identical"):
        inputs.check_input(opened.inputs)
