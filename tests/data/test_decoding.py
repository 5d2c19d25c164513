"""Image files as `load_image` reads them, beside the kinds of `test_image_kinds`."""

import sys

import numpy as np
import pytest
import torch
from drawn import RGB, UPRIGHT, hwc, noise
from PIL import Image

from timm_convnextv2.data import FolderSource, ImageError, MissingPackageError, check_readable, load_image
from timm_convnextv2.data.formats.pillow import from_pil


def test_mode_i_out_of_16_bits_is_an_error():
    image = Image.fromarray(np.array([[0, 70000]], np.int32))
    assert image.mode == "I"
    with pytest.raises(ImageError, match="70000.*16 bits"):
        from_pil(image, 1)
    image = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert from_pil(image, 1).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(hwc(load_image(tmp_path / "x.png")), UPRIGHT[orientation](RGB))
    # the same through each of the two TIFF decoders
    tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
    for dtype in (np.uint8, np.uint16):
        raw = RGB.astype(dtype) * (257 if dtype == np.uint16 else 1)
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(tmp_path / "x.tif", raw, photometric="rgb", extratags=[tag])
        x = hwc(load_image(tmp_path / "x.tif").float()) * (255 if dtype == np.uint16 else 1)
        assert np.allclose(x, UPRIGHT[orientation](RGB), atol=1e-3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "npy"])
def test_truncated_file_raises(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    image = noise(size=(64, 64))
    np.save(path, np.asarray(image)) if suffix == "npy" else image.save(path)
    load_image(path)
    content = path.read_bytes()
    for length in (len(content) // 2, 3, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match=f"x.{suffix}"):
            load_image(path)


def test_missing_tifffile_names_the_remedy_and_stops_the_run(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "x.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert load_image(tmp_path / "x.tif", 3).shape == (3, 6, 8)
    with pytest.raises(MissingPackageError, match="x.tif.*pip install tifffile"):
        load_image(tmp_path / "x.tif", 2)
    with pytest.raises(MissingPackageError, match="pip install tifffile"):
        check_readable(FolderSource(tmp_path, in_chans=2))


def test_npy_of_either_layout_has_its_channels_last(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", a)
    x = load_image(tmp_path / "x.npy", 4)
    assert x.dtype == torch.uint8 and np.array_equal(x.numpy(), a.transpose(2, 0, 1))
