import io
import itertools
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from timm_convnextv2.data import (
    DataSet,
    DemoSource,
    EpochBatchSampler,
    FolderSource,
    ImageError,
    MissingPackageError,
    PretrainDataset,
    PretrainStream,
    PretrainTransform,
    StreamOrder,
    TimmSource,
    TimmStream,
    check_readable,
    collate,
    create_source,
    image_extensions,
    load_image,
    sample_seed,
)
from timm_convnextv2.data.formats.pillow import Reduced, from_pil
from timm_convnextv2.data.samples import dataset as samples_module
from timm_convnextv2.data.sources import timm as timm_source

# a picture whose corners differ, so that a rotation or a swapped axis shows
RGB = np.zeros((6, 8, 3), np.uint8)
RGB[:3, :4], RGB[:3, 4:], RGB[3:, :4], RGB[3:, 4:] = (250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 40)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def picture(seed=0, size=(24, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(path, n, suffix="png"):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture(i).save(path / f"{i:03d}.{suffix}")
    return path


def hwc(x):
    return x.permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "mode, name, options",
    [
        ("1", "x.png", {}),
        ("L", "x.png", {}),
        ("L", "x.jpg", dict(quality=100)),
        ("LA", "x.png", {}),
        ("PA", "x.tif", {}),
        ("P", "x.png", {}),
        ("P", "x.gif", dict(transparency=0)),
        ("P", "x.png", dict(transparency=bytes([0, 255, 0, 128]))),
        ("RGB", "x.bmp", {}),
        ("RGB", "x.webp", dict(lossless=True)),
        ("RGB", "x.tif", {}),
        ("RGBA", "x.png", {}),
        ("RGBA", "x.tif", {}),
        ("CMYK", "x.tif", {}),
        ("YCbCr", "x.jpg", dict(quality=100, subsampling=0)),
        ("YCbCr", "x.tif", dict(compression="tiff_lzw")),  # Pillow 12 cannot read its own uncompressed ones
    ],
)
def test_every_mode_gives_the_channels_asked_for(tmp_path, mode, name, options, in_chans, recwarn):
    image = Image.fromarray(RGB)
    if mode == "PA":
        image = image.quantize(8).convert("PA")
    else:
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name, **options)
    expected = image.convert("RGB" if in_chans == 3 else "L")
    x = load_image(tmp_path / name, in_chans)
    assert x.shape == (in_chans, 6, 8) and x.dtype == torch.uint8
    error = np.abs(hwc(x).squeeze().astype(int) - np.asarray(expected).astype(int))
    assert error.max() <= (12 if name.endswith("jpg") else 1)
    assert not recwarn.list


def test_alpha_is_dropped_for_colours_and_kept_for_four_channels(tmp_path):
    rgba = np.dstack([RGB, np.linspace(0, 255, 48).reshape(6, 8).astype(np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    assert np.array_equal(hwc(load_image(tmp_path / "x.png", 3)), RGB)
    assert np.array_equal(hwc(load_image(tmp_path / "x.png", 4)), rgba)
    Image.fromarray(RGB).save(tmp_path / "y.png")
    with pytest.raises(ImageError, match="y.png.*3 channels.*expected 4 channels.*--in-chans"):
        load_image(tmp_path / "y.png", 4)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "big_endian.tif", "x.pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name, in_chans):
    values = np.array([[0, 255, 256], [4096, 40000, 65535]], np.uint16)
    path = tmp_path / name
    if name == "big_endian.tif":
        pytest.importorskip("tifffile", reason="the package tifffile is not installed").imwrite(
            path, values, byteorder=">", photometric="minisblack"
        )
        with Image.open(path) as image:
            assert image.mode == "I;16B"
    elif name == "x.pgm":
        path.write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
        with Image.open(path) as image:
            assert image.mode.startswith("I")
    else:
        Image.fromarray(values).save(path)
    x = load_image(path, in_chans)
    assert x.dtype == torch.float32 and x.shape == (in_chans, 2, 3)
    assert np.allclose(x.numpy(), values / 65535, atol=1e-7)


def test_mode_i_out_of_16_bits_is_an_error():
    image = Image.fromarray(np.array([[0, 70000]], np.int32))
    assert image.mode == "I"
    with pytest.raises(ImageError, match="70000.*16 bits"):
        from_pil(image, 1)
    image = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert from_pil(image, 1).tolist() == [[[0.0, 1.0]]]


def test_float_pictures_are_kept(tmp_path):
    values = np.array([[-1.5, 0.25], [3.0, 1e4]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(load_image(tmp_path / "x.tif", 1)[0].numpy(), values)
    assert load_image(tmp_path / "x.tif", 3).shape == (3, 2, 2)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="x.tif.*NaN"):
        load_image(tmp_path / "x.tif", 1)


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


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
    image = picture(size=(64, 64))
    np.save(path, np.asarray(image)) if suffix == "npy" else image.save(path)
    load_image(path)
    content = path.read_bytes()
    for length in (len(content) // 2, 3, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match=f"x.{suffix}"):
            load_image(path)


def test_missing_file_and_bomb_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    picture().save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 // 2 - 1)
    with pytest.raises(ImageError, match="large.png.*DecompressionBomb"):
        load_image(tmp_path / "large.png")


@pytest.mark.parametrize(
    "shape, in_chans, expected",
    [
        ((5, 7), 1, lambda a: a[None]),
        ((1, 5, 7), 1, lambda a: a),
        ((5, 7, 3), 3, lambda a: a.transpose(2, 0, 1)),
        ((3, 5, 7), 3, lambda a: a),
        ((12, 5, 7), 12, lambda a: a),
        ((5, 7, 2), 2, lambda a: a.transpose(2, 0, 1)),
        ((4, 5, 4), 4, lambda a: a.transpose(2, 0, 1)),  # ambiguous: channels-last
    ],
)
def test_npy_layouts(tmp_path, shape, in_chans, expected):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", a)
    x = load_image(tmp_path / "x.npy", in_chans)
    assert x.dtype == torch.uint8 and np.array_equal(x.numpy(), expected(a))


@pytest.mark.parametrize(
    "dtype, value, expected",
    [
        ("uint8", 200, 200),
        ("bool", 1, 1.0),
        ("uint16", 65535, 1.0),
        (">u2", 13107, 0.2),
        ("int16", -32767, -1.0),
        ("float16", 0.5, 0.5),
        ("float64", 300.25, 300.25),
    ],
)
def test_npy_units(tmp_path, dtype, value, expected):
    np.save(tmp_path / "x.npy", np.full((2, 2), value, dtype))
    x = load_image(tmp_path / "x.npy", 1)
    assert x.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    assert torch.allclose(x.float(), torch.full((1, 2, 2), float(expected)))


@pytest.mark.parametrize(
    "array, in_chans, words",
    [
        (np.zeros((5, 7), np.uint8), 3, r"\(5, 7\).*expected 3 channels.*--in-chans"),
        (np.zeros((5, 7, 4), np.uint8), 3, r"\(5, 7, 4\).*expected 3 channels"),
        (np.zeros((5, 7), np.int64), 1, "int64.*expected uint8"),
        (np.zeros((5, 7), complex), 1, "complex128"),
        (np.full((5, 7), np.inf), 1, "infinite"),
        (np.full((5, 7), 1e300), 1, "infinite"),
        (np.zeros((0, 7), np.uint8), 1, "empty"),
        (np.array([{}, None], object), 1, "allow_pickle"),
    ],
)
def test_npy_errors(tmp_path, array, in_chans, words):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ImageError, match=f"x.npy.*{words}"):
        load_image(tmp_path / "x.npy", in_chans)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [2, 4, 5, 12])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_multi_band_tiff(tmp_path, dtype, bands, planar):
    tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
    a = (np.random.default_rng(0).random((bands, 5, 7)) * 200).astype(dtype)
    stored = a if planar == "separate" else a.transpose(1, 2, 0)
    extras = ["unspecified"] * (bands - 1)
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="minisblack", planarconfig=planar, extrasamples=extras)
    x = load_image(tmp_path / "x.tif", bands)
    assert np.allclose(x.numpy(), a / (65535 if dtype == "uint16" else 1)) and x.shape == (bands, 5, 7)
    with pytest.raises(ImageError, match=f"x.tif.*{bands} channels.*expected 3 channels"):
        load_image(tmp_path / "x.tif", 3)


def test_multi_band_tiff_is_not_cut_to_rgb(tmp_path):
    # Pillow opens these as RGB and would leave out the other bands without a word
    tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
    a = np.dstack([RGB, RGB[..., :2]])
    tifffile.imwrite(tmp_path / "x.tif", a, photometric="rgb", extrasamples=["unspecified"] * 2)
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == "RGB"
    with pytest.raises(ImageError, match="5 channels.*expected 3"):
        load_image(tmp_path / "x.tif", 3)
    assert np.array_equal(hwc(load_image(tmp_path / "x.tif", 5)), a)


def test_tiff_colours_with_16_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
    rgba = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "rgb.tif", rgba[..., :3], photometric="rgb")
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    for name in ("rgb.tif", "rgba.tif"):
        assert np.allclose(hwc(load_image(tmp_path / name)), rgba[..., :3] / 65535, atol=1e-7)
        luma = rgba[..., :3] @ [0.299, 0.587, 0.114] / 65535
        assert np.allclose(load_image(tmp_path / name, 1)[0], luma, atol=1e-6)
    assert np.allclose(hwc(load_image(tmp_path / "rgba.tif", 4)), rgba / 65535, atol=1e-7)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([rgba[..., :3]] * 2), photometric="rgb")
    assert np.allclose(hwc(load_image(tmp_path / "pages.tif")), rgba[..., :3] / 65535, atol=1e-7)
    # signed: Pillow's mode I, which has lost the type's range
    signed = np.array([[-32767, 0, 32767]], np.int16)
    tifffile.imwrite(tmp_path / "signed.tif", signed, photometric="minisblack")
    assert load_image(tmp_path / "signed.tif", 3)[2].tolist() == [[-1.0, 0.0, 1.0]]


def test_missing_tifffile_names_the_remedy_and_stops_the_run(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "x.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert load_image(tmp_path / "x.tif", 3).shape == (3, 6, 8)
    with pytest.raises(MissingPackageError, match="x.tif.*pip install tifffile"):
        load_image(tmp_path / "x.tif", 2)
    with pytest.raises(MissingPackageError, match="pip install tifffile"):
        check_readable(FolderSource(tmp_path, in_chans=2))


# ----------------------------------------------------------------------------------------------------------- folders


def test_folder_is_nested_sorted_and_follows_links_once(tmp_path):
    root = folder_of(tmp_path / "root", 2)
    folder_of(root / "a" / "deep", 1, "JPG")
    folder_of(root / ".hidden", 1)
    picture().save(root / "a" / "ü b.webp")
    picture().save(root / "._001.png")
    np.save(root / "z.npy", RGB)
    (root / "notes.txt").write_text("no picture")
    (root / "film.mpg").write_text("no picture")
    elsewhere = folder_of(tmp_path / "elsewhere", 1, "tif")
    (root / "link").symlink_to(elsewhere)
    (root / "link2").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    source = FolderSource(root)
    names = [os.path.relpath(source.name(i), root) for i in range(len(source))]
    assert names == ["000.png", "001.png", "z.npy", "a/ü b.webp", "a/deep/000.JPG", "link/000.tif"]
    assert [tuple(source[i].shape[1:]) for i in (0, 2)] == [(24, 32), (6, 8)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.name(i) for i in range(6)] == [source.name(i) for i in range(6)]
    assert torch.equal(copy[3], source[3])
    with pytest.raises(IndexError, match="6"):
        source[6]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such file names")
def test_folder_with_a_name_that_is_not_utf8(tmp_path):
    picture().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    source = FolderSource(tmp_path)
    assert source[0].shape == (3, 24, 32)
    source.name(0).encode()  # safe to print


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist.*--data-dir"):
        FolderSource(tmp_path / "missing")
    picture().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png is a file, expected a folder"):
        FolderSource(tmp_path / "x.png")
    (tmp_path / "none" / "below").mkdir(parents=True)
    (tmp_path / "none" / "a.txt").touch()
    (tmp_path / "none" / "below" / "b.pdf").touch()
    with pytest.raises(ValueError, match=r"No image below.*2 other files.*\.jpg.*\.npy.*\.png"):
        FolderSource(tmp_path / "none")
    with pytest.raises(ValueError, match="in_chans"):
        FolderSource(tmp_path, in_chans=0)


def test_extensions():
    extensions = set(image_extensions())
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".npy"} <= extensions
    assert not extensions & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".hdf", ".wmf", ".grib", ".txt"}


# -------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture
def grey16(tmp_path):
    """Two class folders with a 16-bit and a rotated picture, which torchvision and timm alone would get wrong."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    Image.fromarray(np.array([[0, 40000]], np.uint16)).save(root / "a" / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RGB).save(root / "b" / "turned.png", exif=exif)
    return root


def check_grey16(source):
    assert len(source) == 2
    by_name = {os.path.basename(source.name(i)): source[i] for i in range(2)}
    assert set(by_name) == {"deep.png", "turned.png"}
    assert np.allclose(by_name["deep.png"], np.broadcast_to([[0, 40000 / 65535]], (3, 1, 2)))
    assert np.array_equal(hwc(by_name["turned.png"]), UPRIGHT[6](RGB))
    pickle.dumps(source)


@pytest.mark.parametrize("name", ["torch/image_folder", "Torch/folder", ""])
def test_timm_folders(grey16, name):
    check_grey16(TimmSource(DataSet(name), grey16))


def test_timm_tar_is_safe_in_workers(grey16):
    with tarfile.open(grey16.parent / "x.tar", "w") as tar:
        tar.add(grey16, "x")
    source = create_source(grey16.parent / "x.tar")
    assert isinstance(source, TimmSource)
    check_grey16(source)
    # what the reader opened before the fork must not be shared by the workers
    assert source.reader.tar_state.tf is None


def test_timm_torchvision_pictures(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"".join(n.to_bytes(4, "big") for n in (2051, 3, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(n.to_bytes(4, "big") for n in (2049, 3)) + bytes(3))
    source = create_source(tmp_path, DataSet("torch/mnist"), in_chans=1)
    assert len(source) == 3 and np.array_equal(source[2][0].numpy(), images[2])
    assert source.name(2) == "torch/mnist sample 2"


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A parquet data set with a column of pictures and nothing else; the second one is broken."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    buffers = []
    for image in (Image.fromarray(RGB), None, Image.fromarray(np.array([[0, 40000]], np.uint16))):
        buffer = io.BytesIO()
        if image:
            image.save(buffer, "png")
        buffers.append(dict(path="broken.png" if image is None else None, bytes=buffer.getvalue() or b"junk"))
    (tmp_path / "set").mkdir()
    features = datasets.Features(picture=datasets.Image())
    datasets.Dataset.from_dict(dict(picture=buffers), features=features).to_parquet(tmp_path / "set/train-0.parquet")
    return tmp_path / "set"


def test_hfds_without_labels(parquet):
    source = create_source(parquet.parent / "cache", DataSet(f"hfds/{parquet}", input_key="picture"))
    assert len(source) == 3 and np.array_equal(hwc(source[0]), RGB)
    assert np.allclose(source[2], np.broadcast_to([[0, 40000 / 65535]], (3, 1, 2)))
    assert source.name(0).endswith("sample 0") and source.name(1) == "broken.png"
    ((index, message),) = check_readable(source)
    assert index == 1 and message.startswith("broken.png: ")
    assert torch.equal(pickle.loads(pickle.dumps(source))[0], source[0])
    with pytest.raises(ValueError, match="no image in column 'image'.*input_key.*: picture"):
        create_source(parquet.parent / "cache", DataSet(f"hfds/{parquet}"))
    with pytest.raises(ValueError, match="timm cannot open.*nosplit"):
        create_source(parquet.parent / "cache", DataSet(f"hfds/{parquet}", "nosplit", input_key="picture"))


def test_empty_timm_data_set(monkeypatch):
    monkeypatch.setattr(timm_source, "open_dataset", lambda *args, **kwargs: [])
    with pytest.raises(ValueError, match="'train'.*torch/empty.* has no sample"):
        TimmSource(DataSet("torch/empty"))


def test_hfids_without_labels(parquet):
    stream = TimmStream(
        DataSet(f"hfids/{parquet}", train_num_samples=3, input_key="picture"),
        parquet.parent / "cache",
        order=StreamOrder(3),
    )
    samples = []
    for _, load in stream.undecoded():
        try:
            samples.append(load())
        except ImageError as error:
            samples.append(error)
    assert sum(isinstance(sample, ImageError) for sample in samples) == 1
    assert sorted(tuple(s.shape) for s in samples if torch.is_tensor(s)) == [(3, 1, 2), (3, 6, 8)]
    assert any(s.dtype == torch.float32 for s in samples if torch.is_tensor(s))


def shards(root, n, per_shard=6, broken=()):
    root.mkdir()
    for shard in range(n):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as tar:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                buffer = io.BytesIO()
                Image.fromarray(np.full((8, 8), 1000 * i, np.uint16)).save(buffer, "png")
                content = b"junk" if i in broken else buffer.getvalue()
                info = tarfile.TarInfo(f"{i:04d}.png")  # no label beside it
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return root


def stream_over(root, n, workers, batch_size=3, **kwargs):
    """Loader and data set over all of `n` shards of six pictures, mean 0 and std 1."""
    source = create_source(
        root, DataSet("wds/", f"train-{{0000..{n - 1:04d}}}.tar", 6 * n), 1, order=StreamOrder(batch_size)
    )
    transform = PretrainTransform(8, mean=(0.0,), std=(1.0,))
    dataset = PretrainStream(source, transform, (4, 4), 0.5, **kwargs)
    source.set_loader_cfg(workers)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=collate, drop_last=True, generator=generator
    )
    return dataset, loader


@pytest.mark.parametrize("workers", [0, 2])
def test_wds_without_labels(tmp_path, workers):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    dataset, loader = stream_over(shards(tmp_path / "s", 2, broken=(3, 7)), 2, workers)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert dataset.source.reader.epoch_count.value == epoch  # the reader shuffles by it
        batches = list(loader)
        assert len(batches) == len(loader) == len(dataset) // 3 == 4
        images = torch.cat([images for images, _, _ in batches])
        masks = torch.cat([masks for _, masks, _ in batches])
        seen = set((images[:, 0, 4, 4] * 65.535).round().int().tolist())
        assert seen == set(range(12)) - {3, 7}  # 16-bit, and all pictures but the broken ones
        bad = [message for _, _, bad in batches for _, message in bad]
        assert len(bad) == 2 and any("0003.png" in message for message in bad)
        assert masks.flatten(1).sum(1).tolist() == [8] * 12 and len(masks.unique(dim=0)) > 6
        epochs.append(masks)
    assert not torch.equal(*epochs)


def test_wds_stream_errors(tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    monkeypatch.setattr(samples_module, "_MAX_BAD_IN_A_ROW", 10)
    root = shards(tmp_path / "s", 2, broken=range(12))
    with pytest.raises(ValueError, match="10 images in a row.*\n.*png"):
        list(stream_over(root, 2, 0)[1])
    with pytest.raises(ValueError, match="no sample to worker 1 of 2.*fewer --workers"):
        list(stream_over(shards(tmp_path / "good", 1), 1, 2)[1])
    with pytest.raises(ValueError, match="num_samples"):
        create_source(root, DataSet("wds/", "train-0000.tar"))
    with pytest.raises(ValueError, match="--data-dir"):
        create_source(None, DataSet("wds/", "train-0000.tar"))
    source = create_source(root, DataSet("wds/", "train-0000.tar", 6, input_key="jpg"))
    with pytest.raises(ImageError, match="0000.*input key jpg"):
        next(iter(source))


def test_ranks_of_a_stream_never_draw_the_same_masks():
    class Stream:
        def __init__(self, rank):
            self.rank = rank

        def undecoded(self):
            for i in range(20):
                yield f"image {i}", lambda choose: torch.zeros(1, 8, 8)

    masks = [mask for rank in (0, 1) for _, mask, _ in PretrainStream(Stream(rank), lambda x: x, (8, 8), 0.5)]
    assert len({mask.numpy().tobytes() for mask in masks}) == 40


def test_stream_starts_with_a_bad_picture():
    class Stream:
        rank = 0

        def undecoded(self):
            yield "first", lambda choose: broken("first: broken")
            yield "second", lambda choose: torch.full((1, 8, 8), 7, dtype=torch.uint8)
            yield "third", lambda choose: broken("broken")

    def broken(message):
        raise ImageError(message)

    dataset = PretrainStream(Stream(), lambda x: x.float(), (2, 2), 0.5)
    images, _, bad = zip(*dataset, strict=True)
    assert [x.mean().item() for x in images] == [7, 7, 7]
    assert bad == ([(0, "first: broken")], [], [(2, "third: broken")])


@pytest.mark.parametrize(
    "prefix, module, package", [("hfds", "datasets", "datasets"), ("wds", "webdataset", "webdata")]
)
def test_missing_reader_package(tmp_path, monkeypatch, prefix, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f"timm.data.readers.reader_{prefix}")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        create_source(tmp_path, DataSet(f"{prefix}/x", "train-0.tar", 1))


# --------------------------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize(
    "in_chans, dtype", [(3, torch.uint8), (1, torch.uint8), (3, torch.float32), (5, torch.float32)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_transform_shape_and_units(in_chans, dtype, interpolation):
    mean, std = [0.1 * (c + 1) for c in range(in_chans)], [0.5] * in_chans
    transform = PretrainTransform((16, 24), interpolation=interpolation, mean=mean, std=std)
    image = torch.full((in_chans, 40, 30), 51 if dtype == torch.uint8 else 0.2, dtype=dtype)
    x = transform(image)
    assert x.shape == (in_chans, 16, 24) and x.dtype == torch.float32 and x.is_contiguous()
    expected = (0.2 - torch.tensor(mean)) / 0.5
    assert torch.allclose(x, expected[:, None, None].expand_as(x), atol=1e-5)


@pytest.mark.parametrize("option, dim", [("hflip", 2), ("vflip", 1)])
def test_transform_flips(option, dim):
    image = torch.arange(3 * 8 * 8).view(3, 8, 8).float()
    off = dict(scale=(1, 1), ratio=(1, 1), hflip=0.0, vflip=0.0, interpolation="nearest", mean=(0,) * 3, std=(1,) * 3)
    assert torch.equal(PretrainTransform(8, **off)(image), image)
    assert torch.equal(PretrainTransform(8, **{**off, option: 1.0})(image), image.flip(dim))


def test_transform_crops_within_scale():
    # a ramp along x: the range of values shows the width of the crop
    image = torch.linspace(0, 1, 200).expand(1, 200, 200)
    transform = PretrainTransform(
        50, scale=(0.25, 0.25), ratio=(1, 1), interpolation="nearest", mean=(0.0,), std=(1.0,)
    )
    widths = [x.max() - x.min() for x in (transform(image) for _ in range(10))]
    assert all(abs(float(w) - 0.5) < 0.02 for w in widths)
    torch.manual_seed(0)
    first = transform(image)
    torch.manual_seed(0)
    assert torch.equal(first, transform(image)) and not torch.equal(first, transform(image))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(img_size=0), "img_size"),
        (dict(scale=(0.5, 0.2)), "scale.*0.5, 0.2"),
        (dict(scale=(0.0, 1.0)), "scale"),
        (dict(ratio=(2, 1)), "ratio"),
        (dict(hflip=1.5), "hflip.*1.5"),
        (dict(interpolation="random"), "'bilinear', 'bicubic' or 'nearest'.*random"),
        (dict(mean=(0.5,), std=(1, 1)), "same length"),
        (dict(mean=(0.5,), std=(0,)), "positive"),
    ],
)
def test_transform_errors(options, words):
    with pytest.raises(ValueError, match=words):
        PretrainTransform(**{"img_size": 32, **options})


def test_transform_wants_one_mean_per_channel():
    with pytest.raises(ValueError, match="1 channels.*3 numbers.*--mean"):
        PretrainTransform(32)(torch.zeros(1, 40, 40))


# ------------------------------------------------------------------------------------------------ samples and batches


def test_sample_seed_is_fixed_and_well_mixed():
    assert sample_seed(0, 0, 0) == SEED_000 and sample_seed(np.int64(1), 2, 3) == sample_seed(1, 2, 3)
    seeds = {sample_seed(*key) for key in itertools.product(range(10), range(10), range(10))}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({sample_seed(1, 23, 4), sample_seed(12, 3, 4), sample_seed(1, 2, 34)}) == 3
    bits = np.array([[seed >> b & 1 for b in range(63)] for seed in seeds]).mean(0)
    assert np.abs(bits - 0.5).max() < 0.08


SEED_000 = 9169699564768075551


def run(source, epoch=0, workers=0, start_batch=0, seed=0, batch_size=4, rank=0, world_size=1):
    """Batches of one epoch as a list of (images, masks, bad)."""
    dataset = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.6, seed)
    sampler = EpochBatchSampler(len(dataset), batch_size, seed, rank, world_size)
    sampler.set_epoch(epoch, start_batch)
    options = dict(num_workers=workers, collate_fn=collate, generator=torch.Generator())
    return list(DataLoader(dataset, batch_sampler=sampler, **options))


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in pairs)


def test_samples_do_not_depend_on_workers_or_resume():
    source = DemoSource(14, 48)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = run(source, epoch=3)
    assert torch.equal(torch.get_rng_state(), before)  # the model's own random numbers go on as if nothing happened
    torch.manual_seed(2)
    assert len(expected) == 3
    images, masks, bad = expected[0]
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert masks.shape == (4, 4, 4) and masks.dtype == torch.bool and bad == []
    assert masks.flatten(1).sum(1).tolist() == [10] * 4  # True = removed, 6 of 16 visible
    assert same(run(source, 3, workers=1), expected)
    assert same(run(source, 3, workers=2), expected)
    assert same(run(source, 3, start_batch=2), expected[2:])
    assert run(source, 3, start_batch=3) == []
    for other in (run(source, 4), run(source, 3, seed=1)):
        assert not same(other, expected)


def test_sample_changes_with_epoch_and_seed():
    source = DemoSource(2, 48)
    dataset = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.5)
    image, mask, bad = dataset[0, 1]
    assert torch.equal(image, dataset[0, 1][0]) and torch.equal(mask, dataset[0, 1][1]) and bad == []
    other = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.5, seed=1)
    for image2, mask2, _ in (dataset[1, 1], other[0, 1]):
        assert not torch.equal(image, image2) and not torch.equal(mask, mask2)


def test_sample_leaves_accelerators_alone(monkeypatch):
    def fail(seed):
        raise AssertionError("reseeds the GPU in the training process")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    PretrainDataset(DemoSource(1, 32), PretrainTransform(32), (2, 2), 0.5)[0, 0]


def test_persistent_workers_follow_the_epoch():
    source = DemoSource(8, 32)
    dataset = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.6)
    sampler = EpochBatchSampler(8, 4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=collate, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert same(list(loader), run(source, epoch))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_joint_batch(world_size):
    source = DemoSource(26, 32)
    joint = run(source, 1, batch_size=4 * world_size)
    parts = [run(source, 1, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(joint)} == {26 // (4 * world_size)}
    for b, (images, masks, _) in enumerate(joint):
        for rank, part in enumerate(parts):
            assert torch.equal(part[b][0], images[rank::world_size])
            assert torch.equal(part[b][1], masks[rank::world_size])


def test_sampler_permutes_and_drops_the_incomplete_batch():
    sampler = EpochBatchSampler(23, 5)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 4 and all(len(batch) == 5 for batch in batches)
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch} and all(type(i) is int for _, i in keys)
        epochs.append([i for _, i in keys])
        assert len(set(epochs[-1])) == 20 and set(epochs[-1]) < set(range(23))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    sampler.set_epoch(1, start_batch=3)
    assert len(sampler) == 4 and [i for batch in sampler for _, i in batch] == epochs[1][15:]
    batches = iter(sampler)
    sampler.set_epoch(5)  # must not reach into an epoch that has begun
    assert next(batches)[0][0] == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (dict(num_samples=50, batch_size=64), "64 images on 1 process .*50; the largest --batch-size.* 50"),
        (dict(num_samples=50, batch_size=32, world_size=2), "needs 64 images.*largest --batch-size.* 25"),
        (dict(num_samples=1, batch_size=1, world_size=2), "2 processes cannot share 1 image;"),
        (dict(num_samples=9, batch_size=0), "batch_size 0"),
        (dict(num_samples=9, batch_size=1, rank=1), "rank 1"),
    ],
)
def test_sampler_errors(args, words):
    with pytest.raises(ValueError, match=words):
        EpochBatchSampler(**args)


def test_sampler_start_outside_the_epoch():
    with pytest.raises(ValueError, match=r"0\.\.2 .*got 3"):
        EpochBatchSampler(8, 4).set_epoch(0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_replaced_and_reported(tmp_path, workers):
    good = folder_of(tmp_path / "good", 6)
    bad = folder_of(tmp_path / "bad", 6)
    for i in (1, 2, 5):
        (bad / f"{i:03d}.png").write_bytes(b"junk")
    reported = []
    for images, _, bad_ones in run(FolderSource(bad), batch_size=3, workers=workers):
        assert images.isfinite().all()
        reported += bad_ones
    assert sorted(i for i, _ in reported) == [1, 2, 2, 5]  # 2 again as the first replacement of 1
    assert all(f"{i:03d}.png" in message and "cannot be decoded" in message for i, message in reported)
    # 1 is replaced by 3, and 5 by 0, under their own random numbers
    dataset = PretrainDataset(FolderSource(bad), PretrainTransform(32), (4, 4), 0.6)
    whole = PretrainDataset(FolderSource(good), PretrainTransform(32), (4, 4), 0.6)
    for index, instead in ((1, 3), (5, 0)):
        image, mask, _ = dataset[2, index]
        whole.source.__class__ = type(
            "Swapped", (FolderSource,), {"path": lambda s, i, k=instead: f"{s.root}/00{k}.png"}
        )
        assert torch.equal(image, whole[2, index][0]) and torch.equal(mask, whole[2, index][1])
        whole.source.__class__ = FolderSource


def test_many_bad_pictures_in_a_row(tmp_path, monkeypatch):
    """A damaged stretch is passed over and reported whole; --max-bad-images decides about the run. All is too many."""
    folder_of(tmp_path, 42)
    for i in range(40):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    dataset = PretrainDataset(FolderSource(tmp_path), PretrainTransform(32), (4, 4), 0.6)
    assert [i for i, _ in dataset[0, 1][2]] == list(range(1, 40))
    for i in (40, 41):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="(?s)42 images in a row.*000.png.*041.png"):
        dataset[0, 0]
    monkeypatch.setattr(samples_module, "_MAX_BAD_IN_A_ROW", 10)
    with pytest.raises(ValueError, match="(?s)10 images in a row.*000.png.*009.png"):
        dataset[0, 0]


def test_dataset_complains_about_the_mask_at_once():
    with pytest.raises(ValueError, match="mask_ratio"):
        PretrainDataset(DemoSource(4), PretrainTransform(32), (2, 2), 1.0)


# ------------------------------------------------------------------------------------------------- reduced decoding


PLAIN = dict(mean=(0,) * 3, std=(1,) * 3)  # results in [0, 1]


def photograph(height, width, seed=0):
    """Objects under texture whose amplitude falls with frequency, as in photographs."""
    side = -(-max(height, width) // 50) * 50  # quick to transform
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side), np.float32)) / frequency, s=(side, side))
    rgb = DemoSource(8, side)[seed % 8].permute(1, 2, 0).numpy() + 25 * texture[..., None] / texture.std()
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)[:height, :width])


class Full(FolderSource):
    """What pretraining did before JPEGs were decoded at reduced size."""

    def read(self, i, choose=None, seed=None):
        return super().read(i)


class Reductions(FolderSource):
    """Notes by how much each picture was reduced."""

    def read(self, i, choose=None, seed=None):
        loaded = super().read(i, choose)
        self.seen = getattr(self, "seen", [])
        self.seen.append(loaded.size[0] / loaded.frame[2] if isinstance(loaded, Reduced) else 1)
        return loaded


def psnr(a, b):
    return -10 * float((a - b).square().mean().clamp_min(1e-12).log10())


def samples_of(root, source, transform, epochs=4, in_chans=3):
    dataset = PretrainDataset(source(root, in_chans), transform, (4, 4), 0.5)
    return [dataset[epoch, i] for epoch in range(epochs) for i in range(len(dataset))], dataset.source


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for i, (quality, subsampling) in enumerate([(75, 2), (90, 2), (90, 0), (95, 1)]):
        photograph(900, 1203, i).save(root / f"{i}.jpg", quality=quality, subsampling=subsampling)
    photograph(903, 901, 4).convert("L").save(root / "4.jpg", quality=90)
    photograph(1201, 903, 5).save(root / "5.jpg", quality=90, progressive=True)
    return root


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_reduced_jpegs_agree_with_full_ones(photographs, in_chans, interpolation):
    # not square, so that a swap of the axes shows
    mean, std = (0,) * in_chans, (1,) * in_chans
    transform = PretrainTransform((48, 80), interpolation=interpolation, vflip=0.5, mean=mean, std=std)
    full, _ = samples_of(photographs, Full, transform, 3, in_chans)
    reduced, source = samples_of(photographs, Reductions, transform, 3, in_chans)
    assert {2, 4, 8} <= set(source.seen) <= {1, 2, 4, 8}
    values = []
    for a, b in zip(full, reduced, strict=True):
        assert b[0].shape == (in_chans, 48, 80) and b[0].dtype == torch.float32 and b[0].is_contiguous()
        assert torch.equal(a[1], b[1]) and a[2] == b[2] == []
        values.append(psnr(a[0], b[0]))
    assert np.median(values) > 44 and min(values) > 40, values
    again, _ = samples_of(photographs, FolderSource, transform, 3, in_chans)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(reduced, again, strict=True))


def test_reduced_crops_are_the_same_boxes(tmp_path):
    """Pictures of their own coordinates: the samples tell where the crop lies, to a fraction of an output pixel."""
    height, width = 1003, 1205  # which no reduction divides
    y, x = np.mgrid[:height, :width]
    ramps = np.dstack([255 * y / height, 255 * x / width, np.full_like(y, 128.0)])
    Image.fromarray(ramps.round().astype(np.uint8)).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    transform = PretrainTransform(64, **PLAIN)
    full, _ = samples_of(tmp_path, Full, transform, epochs=12)
    reduced, source = samples_of(tmp_path, Reductions, transform, epochs=12)
    assert {4, 8} <= set(source.seen)
    for a, b in zip(full, reduced, strict=True):
        # per channel: position of the box, and half its extent, in shares of the picture; a full-size pixel is 1e-3
        for c, dim in ((0, 0), (1, 1)):
            off = (a[0] - b[0])[c]
            assert abs(float(off.mean())) < 1e-3
            assert abs(float(off.narrow(dim, 2, 30).mean() - off.narrow(dim, 32, 30).mean())) < 5e-4


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_reduced_jpegs_are_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    photograph(901, 1101).save(tmp_path / "x.jpg", quality=90, exif=exif)
    transform = PretrainTransform((48, 64), **PLAIN)
    full, _ = samples_of(tmp_path, Full, transform)
    reduced, source = samples_of(tmp_path, Reductions, transform)
    assert min(source.seen) > 1
    assert min(psnr(a[0], b[0]) for a, b in zip(full, reduced, strict=True)) > 42
    upright = load_image(tmp_path / "x.jpg")
    assert upright.shape == ((3, 1101, 901) if orientation > 4 else (3, 901, 1101))  # nobody else gets less
    # where in the pixels the picture lies, to the fraction
    loaded = source.read(0, lambda size: 8)
    assert loaded.size == upright.shape[1:] and loaded.pixels.shape == (
        (3, 138, 113) if orientation > 4 else (3, 113, 138)
    )
    top, left, height, width = loaded.frame
    assert (height, width) == tuple(side / 8 for side in loaded.size)
    beyond = (loaded.pixels.shape[1] - height, loaded.pixels.shape[2] - width)
    assert (top, left) == (beyond[0] * (orientation in (3, 4, 7, 8)), beyond[1] * (orientation in (2, 3, 6, 7)))


def test_how_far_a_jpeg_is_reduced():
    whole = dict(scale=(1, 1), ratio=(1, 1), **PLAIN)
    for side, expected in [(20, 1), (299, 1), (300, 2), (599, 2), (600, 4), (1199, 4), (1200, 8), (9000, 8)]:
        assert PretrainTransform(100, **whole).reduction((side, side)) == expected
    assert PretrainTransform((100, 50), **whole).reduction((600, 600)) == 4
    assert PretrainTransform((50, 100), **whole).reduction((600, 600)) == 4
    assert PretrainTransform((100, 50), **whole).reduction((599, 599)) == 2
    assert PretrainTransform(100, interpolation="nearest", **whole).reduction((9000, 9000)) == 1


@pytest.mark.parametrize(
    "name, mode, size, options",
    [
        ("small.jpg", "RGB", (70, 80), {}),
        ("small_grey.jpg", "L", (70, 80), {}),
        ("cmyk.jpg", "CMYK", (600, 700), {}),
        ("large.png", "RGB", (600, 700), {}),
        ("palette.png", "P", (600, 700), {}),
        ("large.webp", "RGB", (600, 700), {}),
        ("large.tif", "RGB", (600, 700), dict(compression="jpeg")),
        ("large.npy", "RGB", (600, 700), {}),
        ("deep.png", "I;16", (600, 700), {}),
    ],
)
def test_other_pictures_are_not_reduced(tmp_path, name, mode, size, options):
    image = photograph(*size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif name.endswith("npy"):
        np.save(tmp_path / name, np.asarray(image))
    else:
        image = image.convert(mode)
    if not name.endswith("npy"):
        image.save(tmp_path / name, **options)
    transform = PretrainTransform(32, **PLAIN)
    (full, _), (reduced, source) = (samples_of(tmp_path, kind, transform) for kind in (Full, Reductions))
    assert set(source.seen) == {1}
    # and as torchvision makes them, which is what earlier versions did
    steps = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1.0), (3 / 4, 4 / 3), v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0,) * 3, (1,) * 3),
    ])  # fmt: skip
    for epoch, (a, b) in enumerate(zip(full, reduced, strict=True)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample_seed(0, epoch, 0))
            assert torch.equal(steps(load_image(tmp_path / name)), b[0])


@pytest.mark.parametrize("progressive", [False, True])
def test_bad_jpegs_are_as_bad_when_reduced(tmp_path, progressive):
    photograph(300, 400).save(tmp_path / "x.jpg", quality=90, progressive=progressive)
    content = (tmp_path / "x.jpg").read_bytes()
    source = FolderSource(tmp_path)

    def verdict(load):
        try:
            load()
        except ImageError as error:
            return str(error)

    verdicts = set()
    lengths = [0, 3, 300, 700, *range(1000, len(content), len(content) // 10), *range(len(content) - 3, len(content))]
    for length in lengths:
        (tmp_path / "x.jpg").write_bytes(content[:length])
        full, reduced = verdict(lambda: source[0]), verdict(lambda: source.read(0, lambda size: 8))
        assert full == reduced
        verdicts.add(full is None)
    assert False in verdicts
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    photograph(300, 400, 1).save(tmp_path / "y.jpg")
    dataset = PretrainDataset(source := FolderSource(tmp_path), PretrainTransform(32, **PLAIN), (4, 4), 0.5)
    image, _, bad = dataset[0, 0]
    ((index, message),) = bad
    assert index == 0 and "x.jpg" in message and "truncated" in message
    # under the random numbers of the bad one
    whole = PretrainDataset(Full(tmp_path), dataset.transform, (4, 4), 0.5)[0, 0]
    assert psnr(image, whole[0]) > 42 and len(source) == 2


def test_no_channels_but_those_asked_for_when_reduced(tmp_path):
    photograph(300, 400).save(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="x.jpg.*3 channels.*expected 4"):
        FolderSource(tmp_path, 4).read(0, lambda size: 2)
    with pytest.raises(ValueError, match="3 channels.*1 numbers.*--mean"):
        PretrainTransform(32, mean=(0,), std=(1,))(FolderSource(tmp_path).read(0, lambda size: 2))


def test_phone_pictures_of_several_frames_are_reduced(tmp_path):
    first, second = photograph(480, 640), photograph(480, 640, 1)
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second], quality=90)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO"
    transform = PretrainTransform(48, **PLAIN)
    (full, _), (reduced, source) = (samples_of(tmp_path, kind, transform) for kind in (Full, Reductions))
    assert min(source.seen) > 1
    assert min(psnr(a[0], b[0]) for a, b in zip(full, reduced, strict=True)) > 42


def test_reduced_samples_are_repeatable_and_leave_the_generator_alone(tmp_path):
    for i in range(8):
        photograph(300 + 40 * i, 420, i).save(tmp_path / f"{i}.jpg")
    source = Reductions(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = run(source, epoch=2)
    assert max(source.seen) > 1 and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(run(source, 2, workers=2), expected) and same(run(source, 2, start_batch=1), expected[1:])
    assert not same(run(source, 3), expected)


def test_transforms_that_cannot_tell_get_whole_pictures(tmp_path):
    photograph(300, 400).save(tmp_path / "x.jpg")
    shapes = []
    PretrainDataset(FolderSource(tmp_path), lambda x: shapes.append(x.shape) or x, (4, 4), 0.5)[0, 0]
    assert shapes == [(3, 300, 400)]


def test_timm_sources_reduce(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    photograph(600, 800).save(tmp_path / "root" / "a" / "x.jpg", quality=90)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "root", "x")
    transform = PretrainTransform(48, **PLAIN)
    expected, _ = samples_of(tmp_path / "root", FolderSource, transform)
    for source in (TimmSource(DataSet("torch/image_folder"), tmp_path / "root"), create_source(tmp_path / "x.tar")):
        dataset = PretrainDataset(source, transform, (4, 4), 0.5)
        assert all(torch.equal(dataset[epoch, 0][0], a[0]) for epoch, a in enumerate(expected))
        assert source.read(0, lambda size: 8).pixels.shape == (3, 75, 100)
        assert source[0].shape == (3, 600, 800)


def test_streams_reduce_and_read_stand_ins_again(tmp_path):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    contents = [b"junk"]
    for size in ((600, 800), (300, 400)):
        photograph(*size).save(buffer := io.BytesIO(), "jpeg", quality=90)
        contents += [buffer.getvalue(), b"junk"]
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for i, content in enumerate(contents):
            info = tarfile.TarInfo(f"{i:04d}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    transform = PretrainTransform(32, **PLAIN)
    reduction, asked = transform.reduction, []

    def samples(choose):
        transform.reduction = choose
        source = TimmStream(DataSet("wds/", "train-0000.tar", 5, input_key="jpg"), tmp_path)
        return list(PretrainStream(source, transform, (4, 4), 0.5))

    reduced = samples(lambda size: asked.append(reduction(size)) or asked[-1])
    assert len(reduced) == 5 and sum(bool(bad) for _, _, bad in reduced) == 3
    # once for each sample: stand-ins have the size that their own crop needs
    assert len(asked) == 5 and min(asked) > 1 and len(set(asked)) > 1
    for a, b in zip(samples(lambda size: 1), reduced, strict=True):
        assert torch.equal(a[1], b[1]) and [i for i, _ in a[2]] == [i for i, _ in b[2]]
        assert 40 < psnr(a[0], b[0]) < 100


# ----------------------------------------------------------------------------------------------------- entry points


def test_check_readable(tmp_path):
    folder_of(tmp_path, 9)
    source = FolderSource(tmp_path)
    assert check_readable(source) == []
    for i in range(1, 9):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    assert [i for i, _ in check_readable(source)] == list(range(1, 9))
    assert [i for i, _ in check_readable(source, tries=3)] == [3, 6]
    (tmp_path / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)None of 9 images.*000\.png.*001\.png.*002\.png") as info:
        check_readable(source)
    assert "003.png" not in str(info.value)


def test_check_readable_wrong_channels(tmp_path):
    folder_of(tmp_path, 2)
    with pytest.raises(ValueError, match="3 channels.*expected 12 channels.*--in-chans"):
        check_readable(FolderSource(tmp_path, in_chans=12))


def test_create_source(tmp_path):
    folder_of(tmp_path / "root" / "train", 2)
    folder_of(tmp_path / "root" / "cat", 3)
    source = create_source(tmp_path / "root", in_chans=1)
    assert isinstance(source, FolderSource) and len(source) == 5 and source[0].shape == (1, 24, 32)
    demo = create_source(data_set=DataSet("embedded", train_num_samples=9))
    held_out = create_source(data_set=DataSet("embedded", "validation"))
    assert isinstance(demo, DemoSource) and (len(demo), len(held_out)) == (9, 2048)
    assert not torch.equal(demo[0], held_out[0])
    with pytest.raises(ValueError, match="--data-dir.*embedded"):
        create_source()
    with pytest.raises(ValueError, match="Unknown data set 'imagenet'.*hfds/"):
        create_source(tmp_path, DataSet("imagenet"))
    with pytest.raises(ValueError, match="Unknown data set 'imagenet'"):
        TimmSource(DataSet("imagenet"), tmp_path)
    with pytest.raises(ValueError, match="stream.*TimmStream"):
        TimmSource(DataSet("wds/x"), tmp_path)
    with pytest.raises(ValueError, match="hfds/x.*TimmSource"):
        TimmStream(DataSet("hfds/x"), tmp_path)
    with pytest.raises(ValueError, match="input_key"):
        TimmSource(DataSet("torch/cifar10", input_key="x"), tmp_path)
    with pytest.raises(ValueError, match="timm cannot open.*torch/cifar10.*not found"):
        TimmSource(DataSet("torch/cifar10"), tmp_path)


def test_everything_below_the_folder_is_used(tmp_path):
    folder_of(tmp_path / "train" / "class", 2)
    folder_of(tmp_path / "val", 3)
    assert len(create_source(tmp_path)) == 5


def test_import_is_cheap():
    code = (
        "import sys, timm_convnextv2.data as d; d.DemoSource(1)[0]; "
        "print([m for m in ('tifffile', 'datasets', 'matplotlib', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
