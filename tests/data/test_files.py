"""Folders with other files than images, what must not be opened, images that are too large, and missing packages."""

import os
import re
import socket
import sys
import tarfile

import numpy as np
import pytest
import tifffile
from drawn import folder_of
from encoders import make_encoder
from mutations import within
from PIL import Image
from torch.utils.data import DataLoader

from timm_convnextv2 import data
from timm_convnextv2.commands.embed import main as embed_main
from timm_convnextv2.commands.pretrain import main as pretrain_main
from timm_convnextv2.data import (
    DataSet,
    FolderSource,
    ImageError,
    MissingPackageError,
    Pixels,
    PretrainDataset,
    PretrainTransform,
    StreamOrder,
    check_readable,
    collate,
    create_source,
    load_image,
)

RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
SMALL = "--img-size 32 --patch-size 1 --batch-size 4 --epochs 1 --decoder-dim 8 --workers 0 --device cpu".split()
SMALL += ["--model-kwargs", "depths=(1,1,1,1)", "dims=(8,12,16,20)"]
TWO_CHANNELS = ["--in-chans", "2", "--mean", "0.005", "0.005", "--std", "0.002", "0.002", "--max-bad-images", "1"]


def run(command, home, folder, *more, workers="0", in_chans=2):
    """Pretrains on the images (`--dry-run` is for it alone), or embeds them."""
    if command == "pretrain":
        words = [*SMALL, "--output", str(home), "--experiment", "run", "--data-dir", str(folder), *more]
        return pretrain_main([*words, *(TWO_CHANNELS if in_chans == 2 else [])])
    if not (home / "model").exists():
        make_encoder(home / "model", in_chans=in_chans)
    words = ["--model", f"local-dir:{home / 'model'}", "--output", str(home / "out.npy"), "--max-bad-images", "1"]
    more = [word for word in more if word != "--dry-run"]
    return embed_main([*words, "--workers", workers, "--device", "cpu", "--data-dir", str(folder), *more])


# ------------------------------------------------------------------------------------------------------- other files


def test_other_files_are_counted(tmp_path):
    folder_of(tmp_path, 8)
    for i in range(24):
        (tmp_path / f"{i}.DOC").touch()
        (tmp_path / f"{i}.heic").touch()
    source = FolderSource(tmp_path)
    assert source.left.ignored == {".doc": 24, ".heic": 24}
    assert str(source.left) == "48 other files ignored: 24 .doc, 24 .heic"
    (tmp_path / "LICENSE").touch()
    assert str(FolderSource(tmp_path).left).endswith("24 .heic, 1 without extension")
    for i in range(12):
        (tmp_path / f"x.{i:02d}").touch()
    assert str(FolderSource(tmp_path).left).endswith("1 .03, 1 .04, 7 of 7 more kinds")
    assert str(FolderSource(folder_of(tmp_path / "deep", 1)).left) == "" == str(data.DemoSource(8).left)


@pytest.mark.parametrize("command", ["pretrain", "embed"])
def test_commands_say_once_what_they_leave_out(tmp_path, capsys, command):
    folder_of(tmp_path / "images", 8)
    (tmp_path / "images" / "a.doc").touch()
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    with within(60):
        assert run(command, tmp_path, tmp_path / "images", "--dry-run", in_chans=3) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("1 other file ignored: 1 .doc") == 1
    assert len(re.findall(r"1 not opened, no regular file: \S+pipe.jpg \(FIFO\)", out + err)) == 1


# ----------------------------------------------------------------------------------------------------- special files


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # such addresses are short: we are in its folder


def link_to_fifo(path):
    os.mkfifo(path.parent.parent / "fifo")
    path.symlink_to(path.parent.parent / "fifo")


SPECIAL = {
    "FIFO": (os.mkfifo, "FIFO"),
    "socket": (make_socket, "socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "link to a FIFO": (link_to_fifo, "FIFO"),
    "loop": (lambda path: path.symlink_to(path), "broken link"),
    "dangling": (lambda path: path.symlink_to("gone"), "broken link"),
}


@pytest.mark.parametrize("name", ["x.jpg", "x.npy", "x.tif", "x"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_skipped_counted_and_named(tmp_path, monkeypatch, kind, name):
    folder = folder_of(tmp_path / "images", 2)
    monkeypatch.chdir(folder)
    make, shown = SPECIAL[kind]
    make(folder / name)
    with within(20):
        source = FolderSource(folder)
        assert len(source) == 2 and check_readable(source) == []
        assert (source.left.special, source.left.num_special) == ({str(folder / name): shown}, 1)
        assert source.left.ignored == {}
        # as one that came after the scan
        with pytest.raises(ImageError, match=f"{name}: .*({shown}|No such|Too many)"):
            load_image(folder / name)


def test_folder_in_the_place_of_an_image_and_nothing(tmp_path, monkeypatch):
    (tmp_path / "x.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    Image.fromarray(RGB).save(tmp_path / "y.png")
    for name, words in (("nowhere.png", ""), ("x.png", "is a folder")):
        with pytest.raises(ImageError, match=f"{name}.*{words}"):
            load_image(tmp_path / name)
    info = os.stat(tmp_path / "y.png")
    monkeypatch.setattr(os, "stat", lambda path: info)  # a FIFO that takes the place of an image after the check
    with within(20), pytest.raises(ImageError, match="fifo.png: is a FIFO"):
        load_image(tmp_path / "fifo.png")


def test_many_special_files_are_counted_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_convnextv2.data.paths.walk._NAMED_SPECIAL", 6)
    for i in range(9):
        (tmp_path / f"link{i}.png").symlink_to("gone")
    with pytest.raises(ValueError, match=r"9 not opened.*\.png \(broken link\), 4 more"):
        FolderSource(tmp_path)
    folder_of(tmp_path, 1)
    source = FolderSource(tmp_path)
    assert len(source.left.special) == 6 and source.left.num_special == 9


# ------------------------------------------------------------------------------------------------------------- bombs


def write_bands(path, **options):
    tifffile.imwrite(path, RGB[..., :2], planarconfig="contig", photometric="minisblack", **options)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "bands.tif", "x.npy"])
def test_one_limit_for_all_formats(tmp_path, monkeypatch, name):
    if name == "x.npy":
        np.save(tmp_path / name, RGB)
    elif name == "bands.tif":
        write_bands(tmp_path / name)
    else:
        Image.fromarray(RGB).save(tmp_path / name)
    in_chans = 2 if name == "bands.tif" else 3
    monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)
    for limit in (24 * 32 // 2, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert load_image(tmp_path / name, in_chans).shape == (in_chans, 24, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 // 2 - 1)
    with pytest.raises(ImageError, match=f"{name}: .*limit"):
        load_image(tmp_path / name, in_chans)


def test_only_the_first_image_of_a_file_is_decoded(tmp_path):
    pages = np.zeros((4, 24, 32, 2), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pages, photometric="minisblack", planarconfig="contig", compression="zlib")
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        at, length = tif.pages[3].dataoffsets[0], tif.pages[3].databytecounts[0]
    content = bytearray((tmp_path / "x.tif").read_bytes())
    content[at : at + length] = b"\xff" * length
    (tmp_path / "x.tif").write_bytes(content)
    assert load_image(tmp_path / "x.tif", 2).shape == (2, 24, 32)


# -------------------------------------------------------------------------------------------------- missing packages


@pytest.fixture
def take_imagecodecs(monkeypatch):
    pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")

    def take():
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tifffile"]:
            monkeypatch.delitem(sys.modules, name)

    return take


BANDS = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(16, 16, 2)


def write_packed(path, compression, bands=BANDS):
    tifffile.imwrite(path, bands, compression=compression, planarconfig="contig", photometric="minisblack")


@pytest.mark.parametrize("compression", ["lzw", "zstd", "jpeg2000"])
def test_a_missing_codec_is_a_missing_package(tmp_path, take_imagecodecs, compression):
    write_packed(tmp_path / "x.tif", compression)
    assert load_image(tmp_path / "x.tif", 2).shape == (2, 16, 16)
    take_imagecodecs()
    with pytest.raises(MissingPackageError, match=r"x\.tif: .*compression .*pip install imagecodecs"):
        load_image(tmp_path / "x.tif", 2)
    with pytest.raises(MissingPackageError, match="pip install imagecodecs"):
        check_readable(FolderSource(tmp_path, in_chans=2))


def test_without_imagecodecs_the_plain_ones_are_read(tmp_path, take_imagecodecs):
    for compression in (None, "zlib"):
        write_packed(tmp_path / f"{compression}.tif", compression)
    take_imagecodecs()
    for path in tmp_path.iterdir():
        assert np.allclose(load_image(path, 2).numpy(), BANDS.transpose(2, 0, 1) / 65535)
    content = (tmp_path / "zlib.tif").read_bytes()
    (tmp_path / "zlib.tif").write_bytes(content[:-20])
    with pytest.raises(ImageError, match="zlib.tif: "):  # corrupt is corrupt
        load_image(tmp_path / "zlib.tif", 2)


def packed_bands(folder, packed):
    """Eight images, of which those of these numbers are compressed with LZW."""
    folder.mkdir()
    for i in range(8):
        write_packed(folder / f"{i}.tif", "lzw" if i in packed else None, BANDS + i)
    return folder


@pytest.mark.parametrize("command", ["pretrain", "embed"])
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_commands_tell_a_missing_codec_in_one_message(tmp_path, monkeypatch, capsys, take_imagecodecs, command, when):
    middle = when == "in the middle"
    folder = packed_bands(tmp_path / "images", [5] if middle else range(8))
    if middle:
        passing = {"pretrain": "timm_convnextv2.pretraining.batches", "embed": "timm_convnextv2.features.embed"}
        first = lambda source, visit=None: visit and visit(source[0])  # noqa: E731  (the one that needs it is not tried)
        monkeypatch.setattr(f"{passing[command]}.check_readable", first)
        for name in ("SHOWN_IMAGES", "WATCHED_IMAGES"):
            monkeypatch.setattr(f"timm_convnextv2.pretraining.batches.{name}", 1)
    take_imagecodecs()
    with within(60):
        status = run(command, tmp_path, folder, workers="1")
    err = capsys.readouterr().err
    assert status == (1 if middle and command == "pretrain" else 2)  # 1: it says how to resume, too
    assert err.count("pip install imagecodecs") == 1 and "Traceback" not in err
    assert re.search(rf"timm-convnextv2 {command}: (error: )?\S+\.tif: TIFF with compression LZW; run", err)


def test_a_worker_tells_a_missing_codec_without_its_traceback(tmp_path, take_imagecodecs):
    transform = PretrainTransform(16, mean=[0.5, 0.5], std=[0.2, 0.2])
    dataset = PretrainDataset(FolderSource(packed_bands(tmp_path / "images", [0]), 2), transform, (2, 2), 0.5)
    take_imagecodecs()
    loader = DataLoader(dataset, batch_sampler=[[(0, 0)]], num_workers=1, collate_fn=collate)
    with pytest.raises(MissingPackageError) as info:
        next(iter(loader))
    assert str(info.value).startswith(f"{tmp_path}/images/0.tif: TIFF with compression LZW; run `pip install")
    assert "\n" not in str(info.value)


# ------------------------------------------------------------------------------------------------------------ nodata


@pytest.mark.parametrize("command", ["pretrain", "embed"])
def test_commands_take_nodata(tmp_path, capsys, command):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        x = np.random.default_rng(i).random((2, 24, 32), np.float32)
        x[:, 3:6] = np.finfo(np.float32).min
        np.save(folder / f"{i}.npy", x)
    assert run(command, tmp_path, folder, "--dry-run") == 2
    err = capsys.readouterr().err
    (remedy,) = set(re.findall(r"--nodata=\S+", err))
    assert "smallest float32, which is nodata" in err and remedy == "--nodata=-3.4028235e+38"
    assert run(command, tmp_path, folder, "--dry-run", remedy) == 0
    assert run(command, tmp_path, folder, "--dry-run", "--nodata", "-9999", "--overwrite") == 2
    assert "smallest float32" in capsys.readouterr().err
    if command == "embed":
        rows = np.load(tmp_path / "out.npy")
        assert rows.shape == (8, 32) and np.isfinite(rows).all()


def test_nodata_in_every_kind_of_source(tmp_path):
    x = np.full((8, 8), 5, np.uint8)
    x[0] = 9
    (tmp_path / "a").mkdir()
    Image.fromarray(x).save(tmp_path / "a" / "x.png")
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        tar.add(tmp_path / "a" / "x.png", "x.png")
    files, shards, torchvision = DataSet(), DataSet("wds/", "s-0.tar", 1), DataSet("torch/image_folder")
    for path, data_set in (("a", files), ("s-0.tar", files), ("", shards), ("", torchvision)):
        for nodata, expected in ((None, [5, 9]), (9.0, [5])):
            source = create_source(tmp_path / path, data_set, 1, Pixels(nodata), order=StreamOrder(whole=True))
            image = next(iter(source)) if data_set is shards else source[0]
            assert image.unique().tolist() == expected
