"""Windows: the values of the whole image, places that follow from the seed, shares by area, and messages."""

import multiprocessing
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from zarr_files import save_zarr

from timm_convnextv2.data import (
    DemoSource,
    FolderSource,
    ImageError,
    PretrainDataset,
    PretrainTransform,
    WindowOptions,
    load_image,
)
from timm_convnextv2.data.formats.decode import open_scene
from timm_convnextv2.data.formats.pixels import PLAIN, Pixels
from timm_convnextv2.data.sources.picked import hold_out
from timm_convnextv2.data.sources.windows import WindowSource, check_windows, content

tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")

H, W = 83, 71  # odd, and no multiple of a tile


def values(channels, dtype, last=True, height=H, width=W):
    rng = np.random.default_rng(channels)
    shape = (height, width, channels) if last else (channels, height, width)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def grey(dtype):
    return values(1, dtype)[..., 0]


def smooth(channels):
    """Survives JPEG, and shows when chroma is shifted."""
    y, x = np.mgrid[:H, :W]
    return np.stack([128 + 100 * np.sin((y + c * x) / 9) for c in range(1, channels + 1)], -1).astype(np.uint8)


def twelve_bits(path):
    try:
        tifffile.imwrite(path / "x.tif", grey("u2") >> 4, bitspersample=12, compression=None, photometric="minisblack")
    except NotImplementedError:
        pytest.skip("this imagecodecs does not write 12 bits (packints_encode)")


TILED = dict(tile=(32, 16))
PLANES, BANDS = (dict(planarconfig=config, photometric="minisblack") for config in ("separate", "contig"))
GREY = dict(photometric="minisblack")
YCBCR = dict(compression="jpeg", compressionargs={"outcolorspace": "ycbcr"})
CYX = dict(metadata={"axes": "CYX"})


def tif(in_chans, x, name="x.tif", **options):
    return in_chans, lambda p: tifffile.imwrite(p / name, x, **options)


# name: in_chans, and a function that writes the file to a folder
KINDS = {
    "tiled": tif(3, values(3, "u1"), photometric="rgb", **TILED),
    "striped": tif(3, values(3, "u1"), photometric="rgb", rowsperstrip=7),
    "contiguous": tif(3, values(3, "u1"), photometric="rgb"),
    "BigTIFF": tif(3, values(3, "u1"), photometric="rgb", bigtiff=True, **TILED),
    "big-endian": tif(1, grey("u2"), byteorder=">"),
    "big-endian tiles": tif(1, grey("u2"), byteorder=">", **TILED),
    "LZW strips": tif(1, grey("u2"), compression="lzw", rowsperstrip=5),
    "deflate, predictor": tif(4, values(4, "u2"), compression="deflate", predictor=True, **BANDS, **TILED),
    "zstd": tif(1, grey("f4"), compression="zstd", **TILED),
    "float predictor": tif(1, grey("f4"), compression="deflate", predictor=True, **TILED),
    "planes, tiled": tif(5, values(5, "u2", False), **PLANES, **TILED),
    "planes": tif(5, values(5, "u2", False), **PLANES),
    "planes, 8-bit RGB": tif(3, values(3, "u1", False), planarconfig="separate", photometric="rgb", **TILED),
    "int16": tif(1, grey("i2"), **TILED),
    "int8": tif(1, grey("i1"), rowsperstrip=9),
    "float64": tif(2, values(2, "f8"), **BANDS, **TILED),
    "float16": tif(1, grey("f2"), **TILED),
    "grey": tif(3, grey("u1"), **TILED),
    "grey 16-bit as RGB": tif(3, grey("u2"), **TILED),
    "RGB as grey": tif(1, values(3, "u1"), photometric="rgb", **TILED),
    "RGB 16-bit as grey": tif(1, values(3, "u2"), photometric="rgb", **TILED),
    "RGBA": tif(3, values(4, "u1") | 1, photometric="rgb", extrasamples=["unassalpha"], **TILED),
    "RGBA, multiplied": tif(4, values(4, "u1") | 1, photometric="rgb", extrasamples=["assocalpha"], **TILED),
    "RGB 16-bit, multiplied": tif(3, values(4, "u2") | 1, photometric="rgb", extrasamples=["assocalpha"], **TILED),
    "MinIsWhite": tif(1, grey("u1"), photometric="miniswhite", **TILED),
    "MinIsWhite 16-bit": tif(1, grey("u2"), photometric="miniswhite", **TILED),
    "JPEG tiles": tif(3, smooth(3), photometric="rgb", compression="jpeg", **TILED),
    "JPEG tiles, grey": tif(1, smooth(1)[..., 0], compression="jpeg", **TILED),
    "JPEG, YCbCr": tif(3, smooth(3), photometric="rgb", subsampling=(2, 2), **YCBCR, **TILED),
    "palette": tif(3, grey("u1"), photometric="palette", colormap=values(256, "u2", False, 3, 1)[..., 0].T, **TILED),
    "CMYK": tif(3, values(4, "u1"), photometric="separated", **TILED),
    "1 bit": (1, lambda p: Image.fromarray(grey("u1") > 99).save(p / "x.tif")),
    "12 bits": (1, twelve_bits),
    "pages as channels": tif(5, values(5, "u2", False), photometric="minisblack"),
    "pages as channels, tiled": tif(5, values(5, "u2", False), photometric="minisblack", **CYX, **TILED),
    "OME-TIFF": tif(2, values(2, "u2", False), name="x.ome.tif", **CYX, **TILED),
    "ImageJ": tif(2, values(2, "u2", False), imagej=True, **CYX),
    "npy": (3, lambda p: np.save(p / "x.npy", values(3, "u1"))),
    "npy, channels first": (3, lambda p: np.save(p / "x.npy", values(3, "u2", False))),
    "npy, grey": (1, lambda p: np.save(p / "x.npy", grey("f4"))),
    "npy, Fortran": (3, lambda p: np.save(p / "x.npy", np.asfortranarray(values(3, "i2")))),
    "npy, Fortran, channels first": (3, lambda p: np.save(p / "x.npy", np.asfortranarray(values(3, ">f8", False)))),
    "OME-Zarr 0.5": (2, lambda p: save_zarr(p / "x.zarr", values(2, "u2", False)[None, :, None], "tczyx", 16)),
    "OME-Zarr 0.4": (1, lambda p: save_zarr(p / "x.zarr", grey("f4"), "yx", 32, 0.4)),
    "PNG": (3, lambda p: Image.fromarray(values(3, "u1")).save(p / "x.png")),
    "JPEG": (3, lambda p: Image.fromarray(smooth(3)).save(p / "x.jpg")),
}
for k in range(2, 9):
    turned = dict(photometric="rgb", extratags=[(274, "H", 1, k, True)], **TILED)
    KINDS[f"orientation {k}"] = tif(3, values(3, "u1" if k % 2 else "u2"), **turned)
PLACES = [(0, 0, H, W), (0, 0, 20, 20), (H - 20, W - 20, 20, 20), (31, 15, 2, 3), (30, 14, 33, 40), (17, 3, 1, 1)]
DECODED_WHOLE = ("1 bit", "PNG", "JPEG")


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_has_the_values_of_the_whole_image(kind, tmp_path):
    in_chans, write = KINDS[kind]
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    for pixels in (Pixels(), Pixels(divide=200.0, clip_low=(0.1,), clip_high=(0.8,))):
        whole, scene = load_image(path, in_chans, pixels), open_scene(str(path), in_chans, pixels)
        assert scene.size == tuple(whole.shape[1:]) and scene.whole == (kind in DECODED_WHOLE)
        for top, left, height, width in PLACES:
            turned = scene.size == (W, H)
            top, left, height, width = (left, top, width, height) if turned else (top, left, height, width)
            window, crop = scene.read(top, left, height, width), whole[:, top : top + height, left : left + width]
            assert window.dtype == crop.dtype and torch.equal(window, crop), (top, left)
        scene.close()


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
def test_nodata_gets_the_mean_of_the_windows_other_pixels(dtype, tmp_path):
    x = values(2, dtype, False)
    x[:, 10:30, 5:40] = 7
    tag = [(42113, "s", 0, "7", True)]
    tifffile.imwrite(tmp_path / "x.tif", x, extratags=tag, **PLANES, **TILED)
    scene = open_scene(str(tmp_path / "x.tif"), 2, Pixels())
    tifffile.imwrite(tmp_path / "part.tif", x[:, 20:50, 30:60], extratags=tag, **PLANES)
    assert torch.equal(scene.read(20, 30, 30, 30), load_image(tmp_path / "part.tif", 2))
    with pytest.raises(ImageError, match="nodata everywhere"):
        scene.read(12, 8, 10, 10)


# ------------------------------------------------------------------------------------------------------------- source


def scenes(folder, *sizes, channels=1, dtype="u1"):
    """Files of random values, of these (height, width)."""
    for i, size in enumerate(sizes):
        x = values(channels, dtype, False, *size)
        tifffile.imwrite(folder / f"{i}.tif", x.squeeze(), **(PLANES if channels > 1 else GREY), **TILED)
    return folder


def open_windows(folder, size, in_chans=1, nodata=None, **more):
    return WindowSource(FolderSource(folder, in_chans, Pixels(nodata)), WindowOptions(size, **more))


def counts(source):
    """Windows of each image."""
    return [sum(source.name(i).startswith(source.source.name(k)) for i in range(len(source))) for k in source.files]


def test_images_count_by_their_area(tmp_path):
    source = open_windows(scenes(tmp_path, (32, 32), (320, 320), (48, 40), (36, 32)), 16)
    assert counts(source) == [4, 400, 8, 4] and len(source) == 416  # of 4, 400, 7.5 and 4.5 times 16 x 16 pixels
    assert source.name(4) == f"{tmp_path}/1.tif, window 1 of 400" and source.name(415).endswith("3.tif, window 4 of 4")
    fewer = open_windows(tmp_path, 16, windows_per_image=25.9)
    assert len(fewer) == 104 and counts(fewer) == [1, 100, 2, 1]
    assert "104 windows of 16 x 16 pixels per epoch, from 4 images" in fewer.left and "too small" not in fewer.left
    assert "3 images too small" in open_windows(tmp_path, 16, windows_per_image=2).left


def test_a_window_follows_from_seed_epoch_and_index_alone(tmp_path):
    source = open_windows(scenes(tmp_path, (50, 60), (64, 40)), 24)
    dataset = PretrainDataset(source, PretrainTransform(16, mean=[0.5], std=[0.25]), (2, 2), 0.5, seed=3)
    again = PretrainDataset(open_windows(tmp_path, 24), dataset.transform, (2, 2), 0.5, seed=3)
    first = [dataset[0, i][0] for i in range(len(dataset))]
    for i in reversed(range(len(first))):
        assert torch.equal(again[0, i][0], first[i]) and not torch.equal(dataset[1, i][0], first[i])
    assert torch.equal(source[2], source[2]) and not torch.equal(source[2], source[3])


def test_all_places_are_drawn_equally_often(tmp_path):
    y, x = np.mgrid[:5, :7]
    np.save(tmp_path / "x.npy", (10 * y + x).astype(np.uint8))
    source = open_windows(tmp_path, 3)
    found = torch.tensor([int(source.read(0, seed=seed)[0, 0, 0]) for seed in range(1500)])
    corners, times = found.unique(return_counts=True)
    assert corners.tolist() == [10 * i + j for i in range(3) for j in range(5)]
    assert (times - 100).abs().max() < 5 * 100**0.5


def test_flat_windows_are_drawn_again(tmp_path):
    x = np.full((160, 160), 200, np.uint8)
    x[:80, :80] = values(1, "u1", height=80, width=80)[..., 0]
    x[80:, 80:] = 0  # no data
    np.save(tmp_path / "x.npy", x)
    source = open_windows(tmp_path, 32, nodata=0, min_content=0.5)
    assert all(content(source.read(0, seed=seed), 0.01) >= 0.5 for seed in range(40))
    plain = open_windows(tmp_path, 32, nodata=0)
    flat = [content(plain.read(0, seed=seed), 0.01) < 0.5 for seed in range(200)]
    assert 0.5 < np.mean(flat) < 0.9
    # nothing but nodata is never taken, and what cannot be had ends after 16 tries with the best
    assert all((plain.read(0, seed=seed) == 200).any() for seed in range(40) if flat[seed])
    none = open_windows(tmp_path, 32, nodata=0, min_content=0.9, content_std=9.0)
    assert torch.equal(none.read(0, seed=5), none.read(0, seed=5))


def test_content_is_the_share_of_cells_that_vary():
    image = torch.zeros(2, 50, 33)
    image[1, :16, 16:32] = torch.rand(16, 16)
    assert content(image, 0.01) == pytest.approx(1 / 6) and content(image, 1.0) == 0
    assert content((image * 255).byte(), 0.01) == pytest.approx(1 / 6)


def test_an_image_of_nodata_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 40), np.uint8))
    with pytest.raises(ImageError, match=r"x.npy, window 1 of 7: 16 windows .*nodata everywhere \(0\)"):
        open_windows(tmp_path, 16, nodata=0)[0]


def test_small_images_are_refused_by_name(tmp_path):
    scenes(tmp_path, (40, 40), (30, 90), (20, 40))
    with pytest.raises(ValueError, match=r"2 of 3 images .* 32 x 32 pixels.*1.tif \(30 x 90\), .* 20"):
        open_windows(tmp_path, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_file_is_one_window_that_is_named(tmp_path):
    scenes(tmp_path, (32, 32), (64, 32))
    (tmp_path / "0.tif").write_bytes(b"II*\0 damaged")
    source = open_windows(tmp_path, 16)
    assert counts(source) == [1, 8]
    with pytest.raises(ImageError, match="0.tif, window 1 of 1: "):
        source[0]
    whole = (tmp_path / "1.tif").read_bytes()
    (tmp_path / "1.tif").write_bytes(whole[:700])
    with pytest.raises(ImageError, match="1.tif, window . of 8: "):
        [source[i] for i in range(1, 9)]


def test_whole_images_are_held_out(tmp_path):
    source = open_windows(scenes(tmp_path, *[(32, 32)] * 6, (64, 64)), 16)
    train, apart = hold_out(source, 0.3, seed=1)
    assert len(train.files) == 5 and len(apart.files) == 2 and {*train.files} | {*apart.files} == {*range(7)}
    names = {train.source.name(k) for k in train.files}
    assert {train.name(i).partition(",")[0] for i in range(len(train))} == names
    assert len(train) + len(apart) == len(source)
    with pytest.raises(ValueError, match="whole images.* 1"):
        hold_out(hold_out(apart, 0.5, 0)[0], 0.5, 0)


def test_sources_without_files_are_refused():
    with pytest.raises(ValueError, match="--window-size"):
        WindowSource(DemoSource(4), WindowOptions(16))


@pytest.mark.parametrize(
    "windows, text",
    [
        (WindowOptions(0), "--window-size .* 0"),
        (WindowOptions(8, -1.0), "--windows-per-image .* -1"),
        (WindowOptions(8, None, 1.0), "--min-content .* 1"),
        (WindowOptions(None, 2.0), "--windows-per-image.*--window-size"),
    ],
)
def test_numbers_out_of_range_are_refused(windows, text):
    with pytest.raises(ValueError, match=text):
        check_windows(windows)


def test_workers_read_the_same(tmp_path):
    save_zarr(tmp_path / "z.zarr", values(2, "u2", False), "cyx", 16)
    scenes(tmp_path, (50, 60), channels=2, dtype="u2")
    source = open_windows(tmp_path, 24, 2)
    assert len(source.files) == 2  # the folder of the Zarr image is one
    here = [source[i] for i in range(len(source))]  # also opens the files, which forked workers must not share
    loader = torch.utils.data.DataLoader(source, num_workers=2, batch_size=None)
    assert all(torch.equal(a, b) for a, b in zip(loader, here, strict=True))


def read_with_limit(folder, queue):
    """Opens and reads windows of 512 x 512 in a process that may have 200 MB more than at its start."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    try:
        source = open_windows(folder, 512, 4, windows_per_image=6)
        queue.put([tuple(source[i].shape) for i in range(len(source))])
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the size of a process")
def test_memory_is_bounded_by_the_window(tmp_path):
    """Images of 1.6 GB, of which next to nothing is on the disk."""
    shape, layout = (20000, 20000, 4), dict(dtype="u1", photometric="minisblack", planarconfig="contig")
    tifffile.memmap(tmp_path / "plain.tif", shape=shape, **layout)
    tile = zlib.compress(bytes(2**18))
    tifffile.imwrite(
        tmp_path / "tiled.tif", (tile for _ in range(79**2)), shape=shape, tile=(256, 256), compression="zlib", **layout
    )
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, shape)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=read_with_limit, args=(tmp_path, queue))
    process.start()
    assert queue.get(timeout=60) == [(4, 512, 512)] * 18
    process.join()


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("width", [40, 16])  # whole rows, and parts of rows
def test_a_file_that_shrinks_is_an_error(tmp_path, suffix, width):
    """As a memory map it would kill the process."""
    x, path = np.random.default_rng(0).integers(0, 256, (32, 40, 5), np.uint8), tmp_path / f"x{suffix}"
    np.save(path, x) if suffix == ".npy" else tifffile.imwrite(path, x, photometric="minisblack", planarconfig="contig")
    scene = open_scene(str(path), 5, PLAIN)
    os.truncate(path, path.stat().st_size - 1 - x[16:].size)
    assert torch.equal(scene.read(0, 0, 15, width), torch.from_numpy(x[:15, :width].transpose(2, 0, 1)))
    with pytest.raises(ImageError, match="truncated"):
        scene.read(10, 40 - width, 22, width)
    scene.close()
