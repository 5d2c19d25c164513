"""Pages of TIFF, OME-Zarr and GIF: as images, as channels, alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from zarr_files import save_zarr

from timm_convnextv2.data import FolderSource, ImageError, Pixels, WindowOptions, load_image
from timm_convnextv2.data.formats.decode import count_pages, open_scene, read_header
from timm_convnextv2.data.sources.files import PageSource
from timm_convnextv2.data.sources.windows import WindowSource

tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")


def values(*shape, dtype=np.uint16):
    return np.random.default_rng(len(shape)).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


STACK, RGB = values(4, 33, 20), values(2, 20, 33, 3, dtype=np.uint8)
ZC, TZ = values(3, 2, 20, 33), values(2, 3, 20, 33)


def different_sizes(path):
    with tifffile.TiffWriter(path) as file:
        for x in (STACK[0], STACK[1], STACK[2, :17, :17]):
            file.write(x, photometric="minisblack", metadata=None)


def gif(path):
    frames = [Image.fromarray(np.full((8, 9), 90 * i, np.uint8)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


# name: file, writer, channels, pages as [C, H, W] of stored values, largest value
KINDS = {
    "plain pages": (
        "x.tif", lambda p: tifffile.imwrite(p, STACK, photometric="minisblack", metadata=None), 1, STACK[:, None]),
    "z-stack, OME": (
        "x.ome.tif", lambda p: tifffile.imwrite(p, STACK, photometric="minisblack", metadata={"axes": "ZYX"}), 1,
        STACK[:, None]),
    "z-stack, ImageJ": (
        "x.tif", lambda p: tifffile.imwrite(p, STACK, imagej=True, metadata={"axes": "ZYX"}), 1, STACK[:, None]),
    "z-stack of two channels, tiled": (
        "x.ome.tif", lambda p: tifffile.imwrite(
            p, ZC, photometric="minisblack", tile=(16, 16), compression="zlib", metadata={"axes": "ZCYX"}), 2, ZC),
    "time and depth": (
        "x.ome.tif", lambda p: tifffile.imwrite(p, TZ, photometric="minisblack", metadata={"axes": "TZYX"}), 1,
        TZ.reshape(6, 1, 20, 33)),
    "all pages in one": (
        "x.tif", lambda p: tifffile.imwrite(
            p, STACK, imagej=True, byteorder=">", truncate=True, metadata={"axes": "ZYX"}), 1, STACK[:, None]),
    "colours": ("x.tif", lambda p: tifffile.imwrite(p, RGB, photometric="rgb"), 3, RGB.transpose(0, 3, 1, 2)),
    "other sizes": ("x.tif", different_sizes, 1, [STACK[:1], STACK[1:2], STACK[2:3, :17, :17]]),
    "GIF": ("x.gif", gif, 1, [np.full((1, 8, 9), 90 * i, np.uint8) for i in range(3)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_page_is_an_image(kind, tmp_path):
    name, write, in_chans, pages = KINDS[kind]
    write(tmp_path / name)
    path = str(tmp_path / name)
    source = PageSource(FolderSource(tmp_path, in_chans))
    assert count_pages(path) == len(source) == len(pages) and f"{len(pages)} pages of 1 file" in source.left
    for i, page in enumerate(pages):
        image = source[i]
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        truth = torch.from_numpy(page.astype(np.float32)) / np.iinfo(page.dtype).max
        assert torch.equal(image, truth) and source.name(i) == f"{path}, page {i}"
        scene = open_scene(path, in_chans, source.pixels_of(i))
        assert scene.size == page.shape[1:]
        assert torch.equal(scene.read(3, 2, 4, 5), source[i][:, 3:7, 2:7]) and scene.whole == (kind == "GIF")
        scene.close()
    two = PageSource(FolderSource(tmp_path, in_chans), [2, 0] if len(pages) > 2 else [1, 0])
    assert torch.equal(two[1], source[0]) and torch.equal(two[0], source[min(2, len(pages) - 1)])
    with pytest.raises(ImageError, match=f"{len(pages)} pages.*page {len(pages) + 3}"):
        load_image(path, in_chans, Pixels(page=len(pages) + 3))


@pytest.mark.parametrize("kind", ["plain pages", "z-stack, OME", "z-stack, ImageJ", "z-stack of two channels, tiled"])
def test_all_pages_are_the_channels(kind, tmp_path):
    name, write, _, pages = KINDS[kind]
    write(tmp_path / name)
    path, truth = tmp_path / name, np.concatenate([*pages])
    pixels = Pixels(page="channels")
    image = load_image(path, len(truth), pixels)
    assert torch.equal(image, torch.from_numpy(truth.astype(np.float32) / np.float32(65535)))
    assert read_header(path, "channels").channels == len(truth)
    part = open_scene(str(path), len(truth), pixels).read(5, 6, 7, 8)
    assert torch.equal(part, image[:, 5:12, 6:14])
    with pytest.raises(ImageError, match=f"expected {len(truth) + 1} channels"):
        load_image(path, len(truth) + 1, pixels)


def test_frames_of_a_gif_are_no_channels(tmp_path):
    gif(tmp_path / "x.gif")
    with pytest.raises(ImageError, match="3 pages.*TIFF, DICOM.*OME-Zarr"):
        load_image(tmp_path / "x.gif", 3, Pixels(page="channels"))


def test_windows_of_pages(tmp_path):
    KINDS["z-stack of two channels, tiled"][1](tmp_path / "x.ome.tif")
    Image.fromarray(RGB[0][..., 0]).save(tmp_path / "y.png")
    source = PageSource(FolderSource(tmp_path, 2))
    assert len(source) == 4 and source.name(3).endswith("y.png")  # one page stays as it was
    (tmp_path / "y.png").unlink()
    windows = WindowSource(PageSource(FolderSource(tmp_path, 2)), WindowOptions(16))
    assert len(windows) == 8 and windows.name(7).endswith("x.ome.tif, page 2, window 3 of 3")
    assert windows[7].shape == (2, 16, 16)


def test_zarr_stacks(tmp_path):
    save_zarr(tmp_path / "x.zarr", ZC, "zcyx", 16, 0.4)
    source = PageSource(FolderSource(tmp_path, 2))
    assert len(source) == 3
    assert all(torch.equal(source[i], torch.from_numpy(ZC[i].astype(np.float32) / np.float32(65535))) for i in range(3))
    with pytest.raises(ImageError, match="ZCYX"):
        load_image(tmp_path / "x.zarr", 2)
    assert load_image(tmp_path / "x.zarr", 6, Pixels(page="channels")).shape == (6, 20, 33)
