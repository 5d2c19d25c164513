"""Every kind of image file, as it reaches the network of each command, against the truth made in numpy.

A command is a reader: `(folder, in_chans, pixels) -> (image, reason)`, with the one image of the folder as it goes into
the network, float32 `[C, S, S]` with mean 0 and std 1 taken off, or None and why it was left out. Add yours to READERS.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from drawn import RGB, UPRIGHT, hwc, noise
from PIL import Image, TiffImagePlugin

from timm_convnextv2.commands import main as cli
from timm_convnextv2.data import (
    FolderSource,
    ImageError,
    MissingPackageError,
    Pixels,
    PretrainDataset,
    PretrainTransform,
    check_readable,
    load_image,
)
from timm_convnextv2.data.formats.pillow import from_pil
from timm_convnextv2.data.samples.batches import map_batches, preprocessing
from timm_convnextv2.finetune import images
from timm_convnextv2.finetune.folders import FolderReader

tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")

S = 16  # side of the images in pixels
LUMA = np.array([0.299, 0.587, 0.114])


# ----------------------------------------------------------------------------------------------------------- commands

Reader = Callable[[Path, int, float | None], tuple[torch.Tensor | None, str]]


def pretrain(folder, in_chans, pixels):
    whole = dict(scale=(1, 1), ratio=(1, 1), hflip=0.0, mean=[0.0] * in_chans, std=[1.0] * in_chans)
    source = FolderSource(folder, in_chans, pixels)
    dataset = PretrainDataset(source, PretrainTransform(S, **whole), (2, 2), 0.5)
    try:
        return dataset[0, 0][0], ""
    except ValueError as error:
        return None, str(error)


def embed(folder, in_chans, pixels):
    config = dict(input_size=(in_chans, S, S), interpolation="bicubic", crop_pct=1.0, crop_mode="center")
    transform = preprocessing({**config, "mean": [0.0] * in_chans, "std": [1.0] * in_chans})
    (batch,) = map_batches(FolderSource(folder, in_chans, pixels), transform, 1, [0], 0)
    return batch.items[0].image, str(batch.items[0].error or "")


def finetune(folder, in_chans, pixels):
    """What finetune, validate and predict hand to timm's scripts, through its loader and evaluation transform."""
    (file,) = folder.iterdir()
    (folder / "class").mkdir()
    file.rename(folder / "class" / file.name)
    dataset = images.Images(FolderReader(folder), images.Reading(in_chans, pixels, images.Kept(0)))
    loader = images.create_loader(
        dataset, (in_chans, S, S), 1, mean=(0.0,) * in_chans, std=(1.0,) * in_chans, interpolation="bicubic",
        crop_pct=1.0, num_workers=0, persistent_workers=False, device=torch.device("cpu"),
    )  # fmt: skip
    try:
        ((x, _),) = loader
    except ValueError as error:
        return None, str(error)
    return x[0], ""


READERS: dict[str, Reader] = {"pretrain": pretrain, "embed": embed, "finetune": finetune}


# -------------------------------------------------------------------------------------------------------------- files


def values(shape, dtype, seed=0):
    """Numbers over the whole range of the type, the same at no two places of a symmetry."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min + 1, info.max, shape, dtype=dtype, endpoint=True)


RGB8, RGB16 = values((S, S, 3), np.uint8), values((S, S, 3), np.uint16)
ALPHA8 = np.tile(np.linspace(1, 255, S).astype(np.uint8), (S, 1))
GREY8, GREY16 = RGB8[..., 1], values((S, S), np.uint16, 1)
SIGNED, FLOAT = values((S, S), np.int16), values((S, S), np.float32)
BANDS = values((5, S, S), np.uint16)
CYX8, CUBE = values((3, S, S), np.uint8), values((S, S, S), np.uint8)
SMOOTH = np.indices((S, S)).sum(0).astype(np.uint8)[..., None] * np.array([4, 6, 8], np.uint8)  # survives JPEG
HOLES = np.zeros((S, S), bool)
HOLES[2:5, 3:9] = True


def holed(x, value):
    """`[H, W]` or `[C, H, W]` with a value in the holes."""
    return np.where(HOLES, np.asarray(value, x.dtype), x)


def mended(x):
    """The truth of it: the mean of each channel's other pixels."""
    channels = x.astype(np.float64).reshape(-1, S, S)
    means = channels[:, ~HOLES].mean(1)
    if x.dtype.kind in "iu":
        means = np.rint(means)
    return np.where(HOLES, means[:, None, None], channels)


def pillow(x, name="x.png", mode=None, **options):
    """Writes with Pillow; an orientation goes into EXIF."""

    def write(folder):
        image = Image.fromarray(x) if not isinstance(x, Image.Image) else x
        if mode:
            image = image.quantize(256) if mode == "P" else image.convert(mode)
        if "orientation" in options:
            options["exif"] = exif = Image.Exif()
            exif[274] = options.pop("orientation")
        image.save(folder / name, **options)

    return write


def tiff(x, **options):
    return lambda folder: tifffile.imwrite(folder / "x.tif", x, **options)


def mono(x, **options):
    return tiff(x, photometric="minisblack", **options)


def tagged(x, nodata, **options):
    """With GDAL's nodata tag."""
    return tiff(x, extratags=[(42113, "s", 0, nodata, True)], **options)


def npy(x):
    return lambda folder: np.save(folder / "x.npy", x)


def raw(data):
    return lambda folder: (folder / "x.png").write_bytes(data)


def sub_ifd(first, second):
    """A second image in a sub-IFD of the first."""

    def write(folder):
        with tifffile.TiffWriter(folder / "x.tif") as file:
            file.write(first, subifds=1, photometric="minisblack")
            file.write(second, subfiletype=int(second.size < first.size), photometric="minisblack")

    return write


def pgm_16(folder):
    (folder / "x.pgm").write_bytes(f"P5 {S} {S} 65535\n".encode() + GREY16.astype(">u2").tobytes())


def thumbnail_first(folder):
    with tifffile.TiffWriter(folder / "x.tif") as file:
        file.write(RGB8[::2, ::2], subfiletype=1, photometric="rgb")
        file.write(RGB8, photometric="rgb")


def min_is_white_12(folder):
    """12 bits in 12 bits."""
    bits = np.unpackbits((GREY16 >> 4).astype(">u2").view(np.uint8).reshape(S, S, 2), axis=2).reshape(S, S, 16)
    packed = np.packbits(bits[:, :, 4:].reshape(S, -1), axis=1).tobytes()
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    tags = {256: S, 257: S, 258: 12, 259: 1, 262: 0, 273: 0, 277: 1, 278: S, 279: len(packed)}
    for tag, value in tags.items():
        ifd[tag] = value
    with open(folder / "x.tif", "wb") as file:
        ifd.save(file)
        file.write(packed)


class Kind(NamedTuple):
    """A file and what must come of it: `truth`, `[C, S, S]` in units of the network's input, or a reason."""

    write: Callable[[Path], None]
    in_chans: int
    truth: np.ndarray | str
    nodata: float | None = None
    tolerance: float = 1e-6


def chw(x):
    return x.transpose(2, 0, 1)


def grey(x, in_chans=3):
    return np.broadcast_to(x, (in_chans, S, S))


def colours(image):
    return chw(np.asarray(image.convert("RGB"))) / 255


FMIN = float(np.finfo(np.float32).min)
LA8 = np.dstack([GREY8, ALPHA8])
RGBA8, RGBA16 = np.dstack([RGB8, ALPHA8]), np.dstack([RGB16, ALPHA8.astype(np.uint16) * 257])
PREMULTIPLIED = np.rint(RGB16 * (RGBA16[..., 3:] / 65535)).astype(np.uint16)
CMYK, YCBCR = (Image.fromarray(RGB8).convert(mode) for mode in ("CMYK", "YCbCr"))
PALETTE = Image.fromarray(RGB8).quantize(64)
IJ, CONTIG, PLANES = (
    dict(imagej=True),
    *(dict(photometric="minisblack", planarconfig=kind) for kind in ("contig", "separate")),
)
RGB_AND_TWO = tiff(np.dstack([RGB8, RGB8[..., :2]]), photometric="rgb", extrasamples=["unspecified"] * 2)

KINDS = {
    # 8-bit
    "png rgb": Kind(pillow(RGB8), 3, chw(RGB8) / 255),
    "png rgb as grey": Kind(pillow(RGB8), 1, (RGB8 @ LUMA)[None] / 255, tolerance=1.1 / 255),
    "png grey": Kind(pillow(GREY8), 3, grey(GREY8 / 255)),
    "png grey as grey": Kind(pillow(GREY8), 1, GREY8[None] / 255),
    "png bilevel": Kind(pillow(GREY8 > 99), 1, (GREY8 > 99)[None] * 1.0),
    "png palette": Kind(pillow(PALETTE), 3, colours(PALETTE)),
    "png palette, one clear": Kind(pillow(PALETTE, transparency=bytes([0, 255, 0, 128])), 3, colours(PALETTE)),
    "gif, one clear": Kind(pillow(PALETTE, "x.gif", transparency=0), 3, colours(PALETTE)),
    "png alpha": Kind(pillow(RGBA8), 3, chw(RGB8) / 255),
    "png alpha kept": Kind(pillow(RGBA8), 4, chw(RGBA8) / 255),
    "png grey alpha": Kind(pillow(LA8), 3, grey(GREY8 / 255)),
    "png 4 channels missing": Kind(pillow(RGB8), 4, "has 3 channels.*expected 4 channels.*--in-chans"),
    "png turned": Kind(pillow(RGB8, orientation=6), 3, chw(np.rot90(RGB8, -1)) / 255),
    "webp": Kind(pillow(RGB8, "x.webp", lossless=True), 3, chw(RGB8) / 255),
    "bmp": Kind(pillow(RGB8, "x.bmp"), 3, chw(RGB8) / 255),
    "jpeg": Kind(pillow(SMOOTH, "x.jpg", quality=100, subsampling=0), 3, chw(SMOOTH) / 255, tolerance=3 / 255),
    "jpeg grey": Kind(pillow(SMOOTH[..., 2], "x.jpg", quality=100), 3, grey(SMOOTH[..., 2] / 255), tolerance=3 / 255),
    "jpeg turned": Kind(
        pillow(SMOOTH[:, ::-1], "x.jpg", quality=100, subsampling=0, orientation=3),
        3, chw(SMOOTH[::-1]) / 255, tolerance=3 / 255,
    ),
    "jpeg cmyk": Kind(
        pillow(SMOOTH, "x.jpg", mode="CMYK", quality=100, subsampling=0), 3, chw(SMOOTH) / 255, tolerance=4 / 255),
    "jpeg with 2 channels asked for": Kind(pillow(SMOOTH, "x.jpg"), 2, "3 channels.*expected 2"),
    # 16-bit
    "png 16": Kind(pillow(GREY16), 3, grey(GREY16 / 65535)),
    "pgm 16": Kind(pgm_16, 3, grey(GREY16 / 65535)),
    "tiff 16": Kind(mono(GREY16, metadata=None), 1, GREY16[None] / 65535),
    "tiff 16 big-endian": Kind(mono(GREY16, byteorder=">"), 3, grey(GREY16 / 65535)),
    "tiff 16 white is 0": Kind(tiff(GREY16, photometric="miniswhite"), 3, grey(1 - GREY16 / 65535)),
    "tiff 8 white is 0": Kind(tiff(GREY8, photometric="miniswhite"), 3, grey(1 - GREY8 / 255)),
    "tiff 12 packed, white is 0": Kind(min_is_white_12, 1, 1 - (GREY16 >> 4)[None] / 4095),
    "tiff rgb 16": Kind(tiff(RGB16, photometric="rgb"), 3, chw(RGB16) / 65535),
    "tiff rgb 16 as grey": Kind(tiff(RGB16, photometric="rgb"), 1, (RGB16 @ LUMA)[None] / 65535),
    "tiff rgba 16": Kind(tiff(RGBA16, photometric="rgb", extrasamples=["unassalpha"]), 3, chw(RGB16) / 65535),
    "tiff rgba 16 kept": Kind(tiff(RGBA16, photometric="rgb", extrasamples=["unassalpha"]), 4, chw(RGBA16) / 65535),
    "tiff rgba 16 multiplied": Kind(
        tiff(np.dstack([PREMULTIPLIED, RGBA16[..., 3]]), photometric="rgb", extrasamples=["assocalpha"]),
        3, chw(np.minimum(PREMULTIPLIED * (65535 / RGBA16[..., 3:]), 65535)) / 65535, tolerance=1e-5,
    ),
    # signs and floats
    "tiff int16": Kind(mono(SIGNED), 1, SIGNED[None] / 32767),
    "tiff int8": Kind(tiff(values((S, S), np.int8), photometric="minisblack"), 3, grey(values((S, S), np.int8) / 127)),
    "tiff int16 white is 0": Kind(tiff(SIGNED, photometric="miniswhite"), 1, "int16 with MinIsWhite"),
    "tiff float": Kind(mono(FLOAT, metadata=None), 3, grey(FLOAT)),
    "tiff float16": Kind(mono(FLOAT.astype(np.float16)), 1, FLOAT.astype(np.float16)[None]),
    "tiff float64": Kind(mono(FLOAT.astype(np.float64) - 7), 1, FLOAT[None] - 7.0),
    "tiff float white is 0": Kind(tiff(FLOAT, photometric="miniswhite"), 1, "float32 with MinIsWhite"),
    "tiff uint32": Kind(mono(GREY16.astype(np.uint32)), 1, "uint32, expected"),
    # colours and bands
    "tiff rgb": Kind(tiff(RGB8, photometric="rgb"), 3, chw(RGB8) / 255),
    "tiff rgb planar": Kind(tiff(CYX8, photometric="rgb", planarconfig="separate"), 3, CYX8 / 255),
    "tiff rgb turned": Kind(
        tiff(RGB8, photometric="rgb", extratags=[(274, "H", 1, 8, True)]), 3, chw(np.rot90(RGB8)) / 255),
    # Pillow opens it as RGB and leaves out the other bands
    "tiff rgb and two": Kind(RGB_AND_TWO, 5, chw(np.dstack([RGB8, RGB8[..., :2]])) / 255),
    "tiff rgb and two, too many": Kind(RGB_AND_TWO, 3, "5 channels.*expected 3"),
    "tiff palette": Kind(pillow(PALETTE, "x.tif"), 3, colours(PALETTE)),
    "tiff palette alpha": Kind(pillow(PALETTE.convert("PA"), "x.tif"), 3, colours(PALETTE)),
    "tiff rgba": Kind(pillow(RGBA8, "x.tif"), 3, chw(RGB8) / 255),
    "tiff ycbcr": Kind(pillow(YCBCR, "x.tif", compression="tiff_lzw"), 3, colours(YCBCR), tolerance=1.1 / 255),
    "tiff cmyk": Kind(pillow(CMYK, "x.tif"), 3, colours(CMYK)),
    "tiff grey alpha": Kind(tiff(LA8, **CONTIG, extrasamples=["unassalpha"]), 3, grey(GREY8 / 255)),
    "tiff bands": Kind(tiff(np.moveaxis(BANDS, 0, 2), **CONTIG), 5, BANDS / 65535),
    "tiff bands planar": Kind(tiff(BANDS, **PLANES), 5, BANDS / 65535),
    "tiff bands tiled": Kind(tiff(np.moveaxis(BANDS, 0, 2), **CONTIG, tile=(16, 16)), 5, BANDS / 65535),
    "tiff bands as pages": Kind(mono(BANDS), 5, BANDS / 65535),
    "tiff bands and alpha": Kind(
        tiff(np.moveaxis(BANDS, 0, 2), photometric="rgb", extrasamples=["unspecified", "unassalpha"]),
        4, BANDS[:4] / 65535,
    ),
    "tiff bands, too many": Kind(tiff(BANDS, **PLANES), 3, "5 channels"),
    # axes
    "imagej cyx": Kind(tiff(CYX8, **IJ, metadata={"axes": "CYX"}), 3, CYX8 / 255),
    "imagej cyx, too few": Kind(tiff(CYX8[:2], **IJ, metadata={"axes": "CYX"}), 3, "2 channels.*expected 3"),
    "imagej cyx as grey": Kind(tiff(CYX8, **IJ, metadata={"axes": "CYX"}), 1, "3 channels.*expected 1"),
    "imagej cyx packed": Kind(tiff(BANDS, **IJ, metadata={"axes": "CYX"}, compression="zlib"), 5, BANDS / 65535),
    "imagej zyx": Kind(tiff(CYX8, **IJ, metadata={"axes": "ZYX"}), 3, r"depth \(Z: 3\) is not a channel.*axis C"),
    "imagej zyx as grey": Kind(tiff(CYX8, **IJ, metadata={"axes": "ZYX"}), 1, "depth .*not a channel"),
    "imagej tyx": Kind(tiff(BANDS, **IJ, metadata={"axes": "TYX"}), 5, r"time \(T: 5\) is not a channel"),
    "imagej tcyx": Kind(tiff(np.stack([CYX8] * 2), **IJ, metadata={"axes": "TCYX"}), 3, r"time \(T: 2\)"),
    "ome cyx": Kind(tiff(BANDS, ome=True, metadata={"axes": "CYX"}), 5, BANDS / 65535),
    "ome zyx": Kind(tiff(BANDS, ome=True, metadata={"axes": "ZYX"}), 5, r"\(Z: 5\) is not a channel.*--pages"),
    "array without axes": Kind(mono(CYX8), 3, CYX8 / 255),
    "array in one page": Kind(mono(CYX8, truncate=True), 3, CYX8 / 255),
    "array without axes, too few": Kind(mono(CYX8[:2]), 3, "axes QYX.*expected 3"),
    "pages of colours": Kind(tiff(np.stack([RGB8] * 3), photometric="rgb", metadata=None), 3, chw(RGB8) / 255),
    "pages of grey": Kind(mono(BANDS[:2], metadata=None), 3, grey(BANDS[0] / 65535)),
    "pages of grey as grey": Kind(mono(BANDS, metadata=None), 1, BANDS[:1] / 65535),
    "pages, as many as channels": Kind(mono(CYX8, metadata=None), 3, "3 pages.*axes CYX"),
    # nodata
    "float minimum": Kind(
        mono(holed(FLOAT, FMIN)), 1, r"contains -3.4028235e\+38 in 7 %.*smallest float32.*--nodata=-3.4028235e\+38 "),
    "float minimum, named": Kind(mono(holed(FLOAT, FMIN)), 1, mended(FLOAT), -3.4028235e38),
    "float minimum, another named": Kind(mono(holed(FLOAT, FMIN)), 1, "smallest", -9999),
    "float64 minimum": Kind(npy(holed(FLOAT.astype(float), -1.7976931348623157e308)[None]), 1, "smallest float64"),
    "netcdf's": Kind(npy(holed(FLOAT, 9.96921e36)), 1, r"contains 9.96921e\+36 .*too large for a pixel"),
    "infinity": Kind(npy(holed(FLOAT, -np.inf)), 1, "infinite values in 7 %.*--nodata=-inf"),
    "infinity, named": Kind(npy(holed(FLOAT, np.inf)), 1, mended(FLOAT), np.inf),
    "nan": Kind(npy(holed(BANDS.astype(np.float32), np.nan)), 5, "contains NaN in 7 %.*--nodata=nan"),
    "nan, named": Kind(npy(holed(BANDS.astype(np.float32), np.nan)), 5, mended(BANDS.astype(np.float32)), np.nan),
    "nan beside another": Kind(
        npy(np.where(np.eye(S) * HOLES > 0, np.float32(np.nan), holed(FLOAT, -9999))), 1, mended(FLOAT), -9999.0),
    "sentinel": Kind(npy(holed(FLOAT, -9999)), 1, "contains -9999 in 7 %.*most likely nodata.*--nodata=-9999"),
    "sentinel of int16": Kind(mono(holed(SIGNED // 9, -32768)), 1, "-32768.*nodata"),
    "sentinel of one band": Kind(
        npy(np.concatenate([BANDS.astype(np.float32), holed(FLOAT, -999)[None]])), 6, "contains -999 .*nodata"),
    "sentinel that is data": Kind(npy(holed(FLOAT, -9999)), 1, holed(FLOAT, -9999)[None], np.nan),
    "-9999 among others": Kind(npy(FLOAT * -2e4 - 9999 * (FLOAT == 0)), 1, FLOAT[None] * -2e4),
    "uint16 0, named": Kind(npy(holed(BANDS, 0)), 5, mended(BANDS) / 65535, 0),
    "uint8 0 of single channels": Kind(npy(CYX8 // 2 * 2), 3, CYX8 // 2 * 2 / 255, 0),
    "png 0, named": Kind(pillow(holed(chw(RGB8), 0).transpose(1, 2, 0)), 3, mended(chw(RGB8)) / 255, 0),
    "nodata everywhere": Kind(npy(np.full((S, S), -9999, np.float32)), 1, "nodata everywhere.*-9999", -9999),
    "a band of nodata": Kind(
        npy(np.stack([FLOAT, np.full((S, S), -9999, np.float32)])), 2, "nodata everywhere in channel 2", -9999),
    "tag of float": Kind(
        tagged(holed(FLOAT, FMIN), "-3.40282346638529e+38", photometric="minisblack"), 1, mended(FLOAT)),
    "tag of float, nan": Kind(tagged(holed(FLOAT, np.nan), "nan", photometric="minisblack"), 3, grey(mended(FLOAT))),
    "tag of int16": Kind(tagged(holed(SIGNED, -32768), "-32768", photometric="minisblack"), 1, mended(SIGNED) / 32767),
    "tag of bands": Kind(tagged(holed(BANDS, 0), "0", **PLANES), 5, mended(BANDS) / 65535),
    "tag of rgb": Kind(
        tagged(holed(chw(RGB8), 0).transpose(1, 2, 0), "0", photometric="rgb"), 3, mended(chw(RGB8)) / 255),
    "tag of 16-bit grey": Kind(
        tagged(holed(GREY16, 65535), "65535", photometric="miniswhite"), 1, 1 - mended(GREY16) / 65535),
    "tag out of range": Kind(tagged(GREY8, "-9999", photometric="minisblack"), 1, GREY8[None] / 255),
    "tag that is no number": Kind(tagged(GREY8, "none", photometric="minisblack"), 1, "tag .42113. 'none'"),
    "tag of a palette": Kind(pillow(PALETTE, "x.tif", tiffinfo={42113: "0"}), 3, "nodata tag.*for P values"),
    # sub-IFDs and thumbnails
    "pyramid": Kind(sub_ifd(GREY16, GREY16[::2, ::2]), 1, GREY16[None] / 65535),
    "image in a sub-ifd": Kind(sub_ifd(GREY16[::2, ::2], GREY16), 1, r"larger image in a sub-IFD \(16 x 16\)"),
    "thumbnail first": Kind(thumbnail_first, 3, "thumbnail as its first page"),
    # compressions
    **{
        f"tiff {compression}": Kind(
            tiff(np.moveaxis(BANDS, 0, 2), **CONTIG, compression=compression),
            5, BANDS / 65535,
        )
        for compression in ("lzw", "zstd", "zlib", "lzma", "packbits")
    },
    "tiff lzw predicted": Kind(
        tiff(RGB16, photometric="rgb", compression="lzw", predictor=True), 3, chw(RGB16) / 65535),
    "tiff jpeg 2000": Kind(tiff(RGB8, photometric="rgb", compression="jpeg2000"), 3, chw(RGB8) / 255),
    "tiff webp": Kind(
        tiff(RGB8, photometric="rgb", compression="webp", compressionargs={"lossless": True}), 3, chw(RGB8) / 255),
    # arrays
    "npy grey": Kind(npy(GREY8), 1, GREY8[None] / 255),
    "npy last": Kind(npy(RGB8), 3, chw(RGB8) / 255),
    "npy last of two": Kind(npy(RGB8[..., :2]), 2, chw(RGB8[..., :2]) / 255),
    "npy first of one": Kind(npy(GREY8[None]), 1, GREY8[None] / 255),
    "npy first": Kind(npy(BANDS), 5, BANDS / 65535),
    "npy of either layout": Kind(npy(CUBE), S, chw(CUBE) / 255),
    "npy fortran": Kind(npy(np.asfortranarray(BANDS)), 5, BANDS / 65535),
    "npy big-endian": Kind(npy(BANDS.astype(">u2")), 5, BANDS / 65535),
    "npy bool": Kind(npy(GREY8 > 99), 1, (GREY8 > 99)[None] * 1.0),
    "npy float64": Kind(npy(FLOAT.astype(np.float64)), 1, FLOAT[None]),
    "npy float16": Kind(npy(FLOAT.astype(np.float16)), 1, FLOAT.astype(np.float16)[None]),
    "npy int16": Kind(npy(SIGNED), 1, SIGNED[None] / 32767),
    "npy uint32": Kind(npy(GREY16.astype(np.uint32)), 1, "uint32, expected"),
    "npy complex": Kind(npy(np.zeros((S, S), complex)), 1, "complex128"),
    "npy beyond float32": Kind(npy(np.full((S, S), 1e300)), 1, "infinite"),
    "npy empty": Kind(npy(np.zeros((0, S), np.uint8)), 1, "empty"),
    "postscript named png": Kind(
        raw(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n"), 3, "of no format that Pillow reads"),
    "hdf5 named png": Kind(raw(b"\x89HDF\r\n\x1a\n" + bytes(500)), 3, "of no format that Pillow reads"),
    "npy of objects": Kind(npy(np.array([{}, None], object)), 1, "allow_pickle"),
    "npy grey for colours": Kind(npy(GREY8), 3, r"\(16, 16\).*expected 3 channels"),
}  # fmt: skip


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_reaches_the_network(tmp_path, kind, command, recwarn):
    write, in_chans, truth, nodata, tolerance = KINDS[kind]
    write(tmp_path)
    (name,) = (path.name for path in tmp_path.iterdir())
    image, reason = READERS[command](tmp_path, in_chans, Pixels(nodata))
    if isinstance(truth, str):
        assert image is None
        assert name in reason and re.search(truth, reason), reason
        return
    assert not [w for w in recwarn if "PIL" in w.filename or "Transparency" in str(w.message)]
    assert reason == "" and image.shape == (in_chans, S, S) and image.dtype == torch.float32
    error = np.abs(image.numpy() - truth) / np.maximum(1, np.abs(truth))
    assert error.max() <= tolerance, error.max()
    assert command != "pretrain" or image.is_contiguous()


# ------------------------------------------------------------------------------------------------------------- besides


def test_mode_i_out_of_16_bits_is_an_error():
    with pytest.raises(ImageError, match="70000.*16 bits"):
        from_pil(Image.fromarray(np.array([[0, 70000]], np.int32)), 1)
    assert from_pil(Image.fromarray(np.array([[0, 65535]], np.int32)), 1).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(hwc(load_image(tmp_path / "x.png")), UPRIGHT[orientation](RGB))
    # the same through each of the two TIFF decoders
    for raw, unit in ((RGB, 1), (RGB * np.uint16(257), 255)):
        tags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(tmp_path / "x.tif", raw, photometric="rgb", extratags=tags)
        assert np.allclose(hwc(load_image(tmp_path / "x.tif").float()) * unit, UPRIGHT[orientation](RGB), atol=1e-3)


WRITERS = {suffix: lambda path, image: image.save(path) for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif")}
WRITERS["npy"] = lambda path, image: np.save(path, np.asarray(image))
for options in ({}, {"compression": "zlib"}, {"compression": "lzw"}, {"tile": (16, 16)}):
    bands = {**CONTIG, **options}
    WRITERS[f"bands{options}.tif"] = lambda path, image, how=bands: tifffile.imwrite(path, image, **how)


@pytest.mark.parametrize("kind", WRITERS)
def test_truncated_file_raises(tmp_path, kind):
    path, in_chans = tmp_path / f"x.{kind.rpartition('.')[2]}", 5 if kind.startswith("bands") else 3
    WRITERS[kind](path, np.moveaxis(BANDS, 0, 2) if in_chans == 5 else noise(size=(64, 64)))
    load_image(path, in_chans)
    content = path.read_bytes()
    for length in (*[len(content) - 9] * (in_chans == 5), len(content) // 2, 3, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match=path.name):
            load_image(path, in_chans)


TWELVE_BANDS = np.random.default_rng(0).integers(0, 4000, (20, 24, 12), np.uint16)


@pytest.mark.parametrize("missing", [False, True], ids=["tifffile", "no tifffile"])
def test_many_bands_are_read_in_silence_or_name_the_remedy(tmp_path, monkeypatch, caplog, capfd, missing):
    """Pillow logs an error about 12 bands whenever it opens such a file, which Python prints to stderr."""
    (tmp_path / "d").mkdir()
    for name in "ab":
        tifffile.imwrite(tmp_path / f"d/{name}.tif", TWELVE_BANDS, photometric="minisblack", planarconfig="contig")
    if missing:
        Image.fromarray(RGB).save(tmp_path / "x.tif")
        monkeypatch.setitem(sys.modules, "tifffile", None)
        assert load_image(tmp_path / "x.tif", 3).shape == (3, 6, 8)
        with pytest.raises(MissingPackageError, match="a.tif.*pip install tifffile"):
            check_readable(FolderSource(tmp_path / "d", in_chans=12))
    tiny = ["--img-size", "32", "--patch-size", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    for command, *words in (
        ["check", "-j", "0", "--img-size", "8", "--output", str(tmp_path / "c.json")],
        ["stats", "-j", "0", "--output", str(tmp_path / "s.json")],
        ["pretrain", *tiny, "--in-chans", "12", "--output", str(tmp_path / "o"), "--dry-run", "--model", "atto"],
    ):
        status = cli.main([command, str(tmp_path / "d"), *words])
        err = capfd.readouterr().err
        if missing:
            assert status == 2 and "pip install tifffile imagecodecs" in err
            assert max(err.count("a.tif"), err.count("b.tif")) == 1
        else:
            assert status in (0, 1)
    assert not [record for record in caplog.records if record.name.startswith("PIL")]
    with pytest.raises(OSError):
        Image.open(tmp_path / "d/a.tif")  # by another program: Pillow speaks as ever
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["PIL.TiffImagePlugin"]


def test_stats_names_an_unreadable_file_once(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.png").write_text("no image")
    assert cli.main(["stats", str(tmp_path / "d"), "-j", "0", "--output", str(tmp_path / "s.json")]) == 2
    assert capsys.readouterr().err.count("x.png") == 1
