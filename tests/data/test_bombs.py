"""Small files that would fill the memory: refused before, or while, they inflate."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zlib

import numpy as np
import pytest
from dicom_files import draw
from PIL import Image

from timm_convnextv2.data import ImageError, Pixels, load_image
from timm_convnextv2.data.formats.decode import faults_named, open_scene

LIMIT, MEGABYTES = 2**16, 40  # pixels; what the bombs hold


def zarr_folder(path, codec, data=b"", chunks=(16, 16), name="0.0"):
    path.mkdir()
    about = dict(zarr_format=2, shape=[16, 16], chunks=chunks, dtype="|u1", fill_value=0, order="C", filters=None)
    (path / ".zarray").write_text(json.dumps(about | {"compressor": codec and {"id": codec}}))
    if data:
        (path / name).write_bytes(data)
    return path


def big_chunk(path):
    return zarr_folder(path / "x.zarr", "zlib", zlib.compress(bytes(5000**2)), chunks=(5000, 5000))


def inflating(codec, compress):
    return lambda path: zarr_folder(path / "x.zarr", codec, compress(bytes(MEGABYTES * 2**20)))


def numcodec(codec):
    def compress(data):
        numcodecs = pytest.importorskip("numcodecs", reason="the package numcodecs is not installed")
        return bytes(numcodecs.get_codec({"id": codec}).encode(data))

    return inflating(codec, compress)


def deflated_dicom(path):
    pydicom = pytest.importorskip("pydicom", reason="the package pydicom is not installed")
    file = draw(path / "x.dcm", np.ones((16, 16), np.uint16))
    ds = pydicom.dcmread(file)
    ds.add_new(0x00091001, "OB", bytes(MEGABYTES * 2**20))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    ds.save_as(file)
    return file


def large_tile(compression):
    def write(path):
        tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
        pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")
        x = np.zeros((4000, 4000), np.uint8)
        options = dict(photometric="minisblack", compression=compression, rowsperstrip=4000, metadata=None)
        tifffile.imwrite(path / "x.tif", x, **options)
        with tifffile.TiffFile(path / "x.tif", mode="r+b") as tif:
            for tag in (256, 257, 278):
                tif.pages[0].tags[tag].overwrite(16)
        return path / "x.tif"

    return write


BOMBS = {
    "Zarr, large chunk": big_chunk,
    "Zarr, zlib": inflating("zlib", zlib.compress),
    "Zarr, gzip": inflating("gzip", gzip.compress),
    "Zarr, bz2": inflating("bz2", bz2.compress),
    "Zarr, lzma": inflating("lzma", lzma.compress),
    "Zarr, blosc": numcodec("blosc"),
    "Zarr, lz4": numcodec("lz4"),
    "Zarr, zstd": numcodec("zstd"),
    "DICOM, deflated": deflated_dicom,
    "TIFF, JPEG 2000": large_tile("jpeg2000"),
    "TIFF, JPEG": large_tile("jpeg"),
}


@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_inflates_beyond_the_limit(tmp_path, monkeypatch, kind, windows):
    if kind.startswith("Zarr"):
        pytest.importorskip("zarr", reason="the package zarr is not installed")
    path = BOMBS[kind](tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)
    tracemalloc.start()
    try:
        # libtiff has an error of its own
        with pytest.raises(ImageError, match=r"x\..*(limit|bomb|decoder error)"), faults_named(str(path)):
            open_scene(str(path), 1, Pixels()).read(0, 0, 8, 8) if windows else load_image(path, 1)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 2**20 / 2
    finally:
        tracemalloc.stop()
