"""Small files that would fill the memory: refused before, or while, they inflate."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from dicom_files import draw
from PIL import Image
from zarr_files import new_array

from timm_convnextv2.data import ImageError, Pixels, load_image
from timm_convnextv2.data.formats.decode import faults_named, open_scene

TIFF = dict(photometric="minisblack", compression="zlib")
LIMIT, MEGABYTES = 2**16, 40  # pixels; what the bombs hold


def sparse_npy(*shape):
    def write(path):
        with open(path / "x.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            file.truncate(file.tell() + int(np.prod(shape)))  # takes no space
        return path / "x.npy"

    return write


def png(path):
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header, pixels = 2 * (5000).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0]), zlib.compress(bytes(1000))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path / "x.png"


def tiff(**options):
    def write(path):
        shape = (5000, 5000, 2) if "planarconfig" in options else (5000, 5000)
        tifffile.imwrite(path / "x.tif", np.zeros(shape, np.uint8), **options, **TIFF)
        return path / "x.tif"

    return write


def inflating(codec, compress, size=MEGABYTES * 2**20, side=16):
    def write(path):
        (path / "x.zarr").mkdir()
        about = dict(zarr_format=2, shape=[16, 16], chunks=(side, side), dtype="|u1", fill_value=0, order="C")
        about |= {"filters": None, "compressor": {"id": codec}}
        (path / "x.zarr/.zarray").write_text(json.dumps(about))
        (path / "x.zarr/0.0").write_bytes(compress(bytes(size)))
        return path / "x.zarr"

    return write


def numcodec(codec):
    def compress(data):
        numcodecs = pytest.importorskip("numcodecs", reason="the package numcodecs is not installed")
        return bytes(numcodecs.get_codec({"id": codec}).encode(data))

    return inflating(codec, compress)


def sharded(path):
    options = dict(shape=(16, 16), chunks=(8, 8), shards=(16, 16), dtype="u1")
    new_array(path / "x.zarr", 3, **options, compressors={"name": "gzip", "configuration": {}})[...] = np.eye(16)
    file, bomb = path / "x.zarr/c/0/0", gzip.compress(bytes(MEGABYTES * 2**20))
    index = file.read_bytes()[-16 * 4 - 4 :]
    file.write_bytes(bomb + np.array([0, len(bomb)], "<u8").tobytes() + index[16:])
    return path / "x.zarr"


def large_plain_tile(path):
    tifffile.imwrite(path / "x.tif", np.ones((16, 16), np.uint8), tile=(4000, 4000), compression="zlib")
    return path / "x.tif"


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
    "npy": sparse_npy(5000, 5000),
    "npy, channels last": sparse_npy(5000, 5000, 1),
    "npy, channels first": sparse_npy(1, 5000, 5000),
    "PNG": png,
    "TIFF by Pillow": tiff(rowsperstrip=100),
    "TIFF by tifffile": tiff(planarconfig="contig", rowsperstrip=100),
    "TIFF, tiles of bands": tiff(planarconfig="contig", tile=(512, 512)),
    "Zarr, large chunk": inflating("zlib", zlib.compress, 5000**2, 5000),
    "Zarr, zlib": inflating("zlib", zlib.compress),
    "Zarr, gzip": inflating("gzip", gzip.compress),
    "Zarr, bz2": inflating("bz2", bz2.compress),
    "Zarr, lzma": inflating("lzma", lzma.compress),
    "Zarr, blosc": numcodec("blosc"),
    "Zarr, lz4": numcodec("lz4"),
    "Zarr, zstd": numcodec("zstd"),
    "Zarr, shards": sharded,
    "DICOM, deflated": deflated_dicom,
    "TIFF, tile larger than the image": large_plain_tile,
    "TIFF, JPEG 2000": large_tile("jpeg2000"),
    "TIFF, JPEG": large_tile("jpeg"),
}


# a window of an uncompressed array, or of small tiles, is read alone
PARTS = [kind for kind in BOMBS if not kind.startswith("npy")]


@pytest.mark.parametrize("kind, windows", [(kind, False) for kind in BOMBS] + [(kind, True) for kind in PARTS])
def test_nothing_inflates_beyond_the_limit(tmp_path, monkeypatch, kind, windows):
    if kind.startswith("Zarr"):
        pytest.importorskip("zarr", reason="the package zarr is not installed")
    path, in_chans = BOMBS[kind](tmp_path), 2 if kind in ("TIFF by tifffile", "TIFF, tiles of bands") else 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)
    tracemalloc.start()
    try:
        # libtiff has an error of its own, which older Pillow names by its number
        with pytest.raises(ImageError, match=r"x\..*(limit|bomb|decoder error|OSError: -2)"), faults_named(str(path)):
            open_scene(str(path), in_chans, Pixels()).read(0, 0, 8, 8) if windows else load_image(path, in_chans)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 2**20 / 2
    finally:
        tracemalloc.stop()
