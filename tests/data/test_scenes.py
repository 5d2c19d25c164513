"""Scenes: tiles that were never written, masks and alpha beside the pixels, against the truth made in numpy."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_convnextv2.data import FolderSource, ImageError, PageSource, Pixels, check_readable, load_image
from timm_convnextv2.data.formats.decode import count_pages, open_scene
from timm_convnextv2.data.measure.sample import measure
from timm_convnextv2.transfer.segmentation.masks import load_mask

tifffile = pytest.importorskip("tifffile", reason="the package tifffile is not installed")
pytest.importorskip("imagecodecs", reason="the package imagecodecs is not installed")

S = 48
ABSENT = np.zeros((S, S), bool)
ABSENT[16:32, :] = True
X = np.random.default_rng(0).integers(8, 200, (S, S, 5), np.uint16)
RGB = X[..., :3].astype(np.uint8)
PLACES = [(0, 0, S, S), (10, 5, 30, 20), (40, 40, 8, 8)]


def leave_out(path, rows):
    """Makes the strips or tiles in these rows absent, as GDAL's SPARSE_OK does: offset and size 0."""
    with tifffile.TiffFile(path, mode="r+b") as tif:
        page = tif.pages[0]
        wide = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        high = page.tilelength if page.is_tiled else page.rowsperstrip
        for tag in (page.tags.get(code) for code in (273, 279, 324, 325)):
            if tag is not None:
                kept = [0 if (i // wide) * high in rows else value for i, value in enumerate(np.atleast_1d(tag.value))]
                tag.overwrite(kept if len(kept) > 1 else kept[0])


def filled(x, gone, nodata):
    """`[C, H, W]` in 0..1: the mean of the other pixels, or 0, in place of the gone ones."""
    x = np.moveaxis(np.atleast_3d(x), 2, 0)
    mean = np.rint(x[:, ~gone].mean(1)) if nodata else np.zeros(len(x))
    return np.where(gone, mean[:, None, None], x) / np.iinfo(x.dtype).max


def check(path, in_chans, truth):
    whole, scene = load_image(path, in_chans), open_scene(str(path), in_chans, Pixels())
    whole = whole.float() / 255 if whole.dtype == torch.uint8 else whole
    assert np.allclose(whole, truth, atol=1e-6)
    for top, left, height, width in PLACES:
        part = scene.read(top, left, height, width)
        kept = ~ABSENT[top : top + height, left : left + width]
        part = part.float() / 255 if part.dtype == torch.uint8 else part
        assert np.allclose(part[:, kept], truth[:, top : top + height, left : left + width][:, kept], atol=1e-6)
    scene.close()


TILES, STRIPS, ZLIB = dict(tile=(16, 16)), dict(rowsperstrip=16), dict(compression="zlib")
MONO, CHANNELS = dict(photometric="minisblack"), dict(photometric="minisblack", planarconfig="contig")


@pytest.mark.parametrize("nodata", [None, "7"])
@pytest.mark.parametrize(
    "packed", [{}, dict(compression="zlib"), dict(compression="lzw")], ids=["plain", "zlib", "lzw"]
)
@pytest.mark.parametrize("layout", [TILES, STRIPS], ids=["tiles", "strips"])
@pytest.mark.parametrize(
    "x, in_chans, options",
    [(RGB[..., 0], 1, MONO), (RGB[..., 0], 3, MONO), (RGB, 3, dict(photometric="rgb")), (X, 5, CHANNELS)],
)
def test_absent_tiles_are_nodata_or_0(tmp_path, x, in_chans, options, layout, packed, nodata):
    tags = [(42113, "s", 0, nodata, True)] if nodata else []
    tifffile.imwrite(tmp_path / "x.tif", x, **options, **layout, **packed, extratags=tags, metadata=None)
    leave_out(tmp_path / "x.tif", {16})
    truth = filled(x, ABSENT, nodata)
    check(tmp_path / "x.tif", in_chans, np.broadcast_to(truth, (in_chans, S, S)))


def test_an_absent_image_is_0_and_not_the_bytes_of_the_header(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", X[..., 0], **MONO, metadata=None)
    leave_out(tmp_path / "x.tif", {0})
    assert not load_image(tmp_path / "x.tif", 1).any()
    assert not open_scene(str(tmp_path / "x.tif"), 1, Pixels()).read(3, 4, 5, 6).any()


def test_absent_tiles_of_a_palette_are_its_first_colour(tmp_path):
    colours = np.random.default_rng(1).integers(0, 65535, (3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", RGB[..., 0], photometric="palette", colormap=colours, **TILES)
    leave_out(tmp_path / "x.tif", {16})
    image = load_image(tmp_path / "x.tif", 3)
    assert torch.equal(image[:, 20], image[:, 20, :1].expand(3, S)) and len(image[0].unique()) > 9
    assert image[:, 20, 0].tolist() == [int(c) >> 8 for c in colours[:, 0]]


@pytest.mark.parametrize("packed", [{}, ZLIB], ids=["plain", "zlib"])
def test_absent_tiles_of_segmentation_masks_are_0(tmp_path, packed):
    classes = RGB[..., 0] % 5
    tifffile.imwrite(tmp_path / "x.tif", classes, **MONO, **TILES, **packed, metadata=None)
    leave_out(tmp_path / "x.tif", {16})
    assert np.array_equal(load_mask(tmp_path / "x.tif"), np.where(ABSENT, 0, classes))


# ---------------------------------------------------------------------------------------------------- masks and alpha


def write_masked(path, x, pages=1, **options):
    """Pages with GDAL's internal masks."""
    with tifffile.TiffWriter(path) as file:
        for _ in range(pages):
            file.write(x, metadata=None, **options)
            file.write(~ABSENT, subfiletype=4, photometric=4, metadata=None, **ZLIB)


@pytest.mark.parametrize(
    "x, in_chans, options",
    [
        (RGB[..., 0], 1, MONO | TILES),
        (RGB, 3, dict(photometric="rgb")),
        (X, 5, CHANNELS | TILES | ZLIB),
    ],
)
def test_masked_pixels_are_nodata(tmp_path, x, in_chans, options):
    write_masked(tmp_path / "x.tif", x, **options)
    check(tmp_path / "x.tif", in_chans, filled(x, ABSENT, True))
    assert count_pages(str(tmp_path / "x.tif")) == len(PageSource(FolderSource(tmp_path, in_chans))) == 1
    with pytest.raises(ImageError, match="nodata everywhere.*mask"):
        open_scene(str(tmp_path / "x.tif"), in_chans, Pixels()).read(16, 0, 16, S)


def test_masks_of_jpeg_scenes_and_of_pages(tmp_path):
    y, x = np.mgrid[:S, :S]
    smooth = np.dstack([100 + y, 100 + x, 200 - y]).astype(np.uint8)
    jpeg = dict(photometric="rgb", compression="jpeg", compressionargs={"outcolorspace": "ycbcr", "level": 100})
    write_masked(tmp_path / "x.tif", smooth, pages=2, **jpeg, **TILES)
    source = PageSource(FolderSource(tmp_path, 3))
    assert len(source) == 2
    for i in range(2):
        assert np.abs(source[i].numpy() / 255 - filled(smooth, ABSENT, True)).max() < 6 / 255
    assert float(measure(source).pixels.missing[0]) == 2 * ABSENT.sum()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("chans", [1, 3])
def test_alpha_0_is_nodata_in_scenes(tmp_path, dtype, chans):
    x, alpha = X[..., :chans].astype(dtype), np.where(ABSENT, 0, np.iinfo(dtype).max).astype(dtype)
    options = dict(
        extrasamples=["unassalpha"], planarconfig="contig", photometric="rgb" if chans == 3 else "minisblack"
    )
    tifffile.imwrite(tmp_path / "x.tif", np.dstack([x, alpha]), **options, metadata=None, **TILES)
    check(tmp_path / "x.tif", chans, filled(x, ABSENT, True))
    assert float(measure(FolderSource(tmp_path, chans)).pixels.missing[0]) == ABSENT.sum()
    if chans == 3:  # alpha that is a channel is data
        assert np.array_equal(load_image(tmp_path / "x.tif", 4)[3] == 0, ABSENT)


def test_alpha_0_that_is_dropped_is_told(tmp_path, capsys):
    for i in range(2):
        alpha = np.where(ABSENT & (i > 0), 0, 255).astype(np.uint8)
        Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / f"{i}.png")
    check_readable(FolderSource(tmp_path, 3))
    told = capsys.readouterr().err
    assert "1 of 2" in told and "33%" in told and "1.png" in told
    check_readable(FolderSource(tmp_path, 4))
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------- other files


OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="48" SizeY="48" SizeZ="1" SizeC="2" SizeT="1">
<Channel ID="Channel:0:0" SamplesPerPixel="1"/><Channel ID="Channel:0:1" SamplesPerPixel="1"/>
<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="x.ome.tif">urn:uuid:1</UUID></TiffData>
<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="../secret.tif">urn:uuid:2</UUID></TiffData>
</Pixels></Image></OME>"""


def test_other_files_that_a_tiff_names_are_never_opened(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    tifffile.imwrite(tmp_path / "a/x.ome.tif", X[..., 0], **MONO, description=OME, metadata=None)
    tifffile.imwrite(tmp_path / "secret.tif", X[..., 1], **MONO)
    opened, init = [], tifffile.TiffFile.__init__

    def noting(self, file, **more):
        opened.append(file)
        init(self, file, **more)

    monkeypatch.setattr(tifffile.TiffFile, "__init__", noting)
    with pytest.raises(ImageError, match="names other files"):
        load_image(tmp_path / "a/x.ome.tif", 2)
    assert opened and not [file for file in opened if isinstance(file, str)]
