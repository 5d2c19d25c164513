"""DICOM: pydicom's own files, and drawn ones, against pydicom's functions and numpy."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import draw
from PIL import Image

from timm_convnextv2.data import FolderSource, ImageError, MissingPackageError, PageSource, Pixels, load_image
from timm_convnextv2.data.formats.decode import count_pages, open_scene, read_header
from timm_convnextv2.data.measure.sample import measure
from timm_convnextv2.data.sources.open import check_readable, create_source

pydicom = pytest.importorskip("pydicom", reason="the package pydicom is not installed")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.pixels import apply_rescale, apply_windowing, pixel_array  # noqa: E402

bundled = partial(get_testdata_file, download=False)


def random(shape=(7, 9), low=0, high=4095, dtype=np.uint16):
    return np.random.default_rng(0).integers(low, high, shape, dtype, endpoint=True)


def test_hounsfield_units_stay_as_they_are():
    path = bundled("CT_small.dcm")
    ds = pydicom.dcmread(path)
    truth = apply_rescale(pixel_array(ds), ds)
    image = load_image(path, 1)
    assert image.dtype == torch.float32 and np.array_equal(image[0].numpy(), truth) and image.min() < -100
    assert torch.equal(load_image(path, 3), image.repeat(3, 1, 1))
    assert torch.equal(load_image(path, 1, Pixels(divide=1000.0)), (image.double() / 1000).float())
    header = read_header(path)
    assert header == ("DICOM", 128, 128, 1, "int16") and open_scene(path, 1, Pixels()).size == (128, 128)
    part = open_scene(path, 1, Pixels()).read(100, 90, 28, 28)
    assert torch.equal(part, image[:, 100:128, 90:118])


@pytest.mark.parametrize(
    "file", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
)
def test_what_is_not_rescaled_is_divided_by_what_its_bits_hold(file):
    ds = pydicom.dcmread(bundled(file))
    assert (ds.BitsStored, ds.PixelRepresentation) == (16, 1)
    assert np.allclose(load_image(bundled(file), 1)[0], pixel_array(ds) / 32767, atol=1e-7)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_files_window_is_pydicoms(function, photometric, tmp_path):
    tags = dict(RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[3000, 1], WindowWidth=[2500, 2])
    path = draw(tmp_path / "x.dcm", random(), photometric, **tags, VOILUTFunction=function)
    ds = pydicom.dcmread(path)
    truth = (apply_windowing(apply_rescale(pixel_array(ds), ds), ds, index=0) + 100) / 2 / 4095
    truth = 1 - truth if photometric == "MONOCHROME1" else truth
    image = load_image(path, 1, Pixels(dicom_window="file"))
    assert np.allclose(image[0], truth, atol=1e-6) and 0 <= image.min() < image.max() <= 1
    if function == "LINEAR":
        assert torch.equal(load_image(path, 1, Pixels(dicom_window=(3000.0, 2500.0))), image)


def test_monochrome1_is_inverted(tmp_path):
    x = random()
    image = load_image(draw(tmp_path / "x.dcm", x, "MONOCHROME1"), 1)
    assert np.allclose(image[0], 1 - x / 4095, atol=1e-7)
    rescaled = load_image(draw(tmp_path / "y.dcm", x, "MONOCHROME1", RescaleSlope=0.5, RescaleIntercept=-7), 1)
    assert np.allclose(rescaled[0], (4095 - x) * 0.5 - 7)
    signed = random(low=-2048, high=2047, dtype=np.int16)
    image = load_image(draw(tmp_path / "z.dcm", signed, "MONOCHROME1"), 1)
    assert np.allclose(image[0], (-1.0 - signed) / 2047, atol=1e-6)


def test_padding_is_nodata(tmp_path):
    x = random(low=10)
    x[:3], x[3, :2] = 0, 1
    path = draw(tmp_path / "x.dcm", x, PixelPaddingValue=0, PixelPaddingRangeLimit=1)
    image, gone = load_image(path, 1)[0], x <= 1
    assert np.allclose(image[torch.from_numpy(gone)], np.rint(x[~gone].mean()) / 4095)
    assert np.allclose(image[torch.from_numpy(~gone)], x[~gone] / 4095)


def test_colours_are_rgb():
    files = "SC_rgb_rle", "examples_ybr_color", "examples_palette", "SC_ybr_full_422_uncompressed"
    for file in (f"{name}.dcm" for name in files):
        pages = Pixels(page=0)
        image = load_image(bundled(file), 3, pages)
        assert image.dtype == torch.uint8 and len(image.unique()) > 4 and not torch.equal(image[0], image[2])
        assert load_image(bundled(file), 1, pages).shape == (1, *image.shape[1:])
        assert read_header(bundled(file)).channels == 3
    ds = pydicom.dcmread(bundled("SC_rgb_rle.dcm"))
    assert np.array_equal(load_image(bundled("SC_rgb_rle.dcm"), 3).permute(1, 2, 0), pixel_array(ds))


def test_frames_are_refused_or_pages(tmp_path):
    x = random((4, 6, 5))
    path = draw(tmp_path / "x.dcm", x)
    with pytest.raises(ImageError, match="4 frames.*--pages"):
        load_image(path, 1)
    source = PageSource(FolderSource(tmp_path, 1))
    assert count_pages(str(path)) == 4 and len(source) == 4 and source.name(2).endswith("x.dcm, page 2")
    assert all(np.allclose(source[i][0], x[i] / 4095, atol=1e-7) for i in range(4))
    assert np.allclose(load_image(path, 4, Pixels(page="channels")), x / 4095, atol=1e-7)
    assert read_header(path, "channels").channels == 4
    with pytest.raises(ImageError, match="4 pages.*page 4"):
        load_image(path, 1, Pixels(page=4))
    with pytest.raises(ImageError, match="4 channels.*expected 3"):
        load_image(path, 3, Pixels(page="channels"))


def sequence(**values):
    """A functional group: a sequence of one item."""
    item = pydicom.Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return [item]


def test_frames_have_scales_of_their_own(tmp_path):
    """Enhanced multi-frame: 40 HU in two frames, of slope 1 and 2."""
    x = np.stack([np.full((4, 5), 1064, np.uint16), np.full((4, 5), 532, np.uint16)])
    shared = sequence(
        PixelValueTransformationSequence=sequence(RescaleSlope=1, RescaleIntercept=-1024),
        FrameVOILUTSequence=sequence(WindowCenter=40, WindowWidth=2),
    )
    own = sequence(PixelValueTransformationSequence=sequence(RescaleSlope=2, RescaleIntercept=-1024))
    groups = dict(SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=sequence() + own)
    path = draw(tmp_path / "x.dcm", x, **groups)
    assert [load_image(path, 1, Pixels(page=page)).unique().tolist() for page in (0, 1)] == [[40.0], [40.0]]
    assert load_image(path, 2, Pixels(page="channels")).unique().tolist() == [40.0]
    assert load_image(path, 1, Pixels(page=1, dicom_window="file")).unique().tolist() == [1.0]


@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_in_the_other_sign_is_nodata(tmp_path, padding):
    x = random(low=-1900, high=2000, dtype=np.int16)
    x[:2] = -2000
    path = draw(tmp_path / "x.dcm", x)
    ds = pydicom.dcmread(path)
    ds.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    ds.save_as(path)
    assert np.allclose(load_image(path, 1)[0, :2], np.rint(x[2:].mean()) / 2047)


def test_bits_that_differ_are_told_and_divided_alike(tmp_path, capsys):
    for i, bits in enumerate([10, 12, 14, 16]):
        draw(tmp_path / f"{i}.dcm", random(high=1000), bits=bits)
    assert check_readable(FolderSource(tmp_path, 1)) == []
    told = capsys.readouterr().err
    assert all(text in told for text in ("4 ways", "10 bits", "0.dcm", "16 bits", "--divide"))
    source = FolderSource(tmp_path, 1, Pixels(divide=1000.0))
    assert measure(source).kind == "DICOM" and check_readable(source) == [] and capsys.readouterr().err == ""
    assert torch.equal(source[0], source[3])


def test_files_without_extension_are_found_by_their_mark(tmp_path):
    for name in ("IM0001", "1.2.840.113", "DICOMDIR"):
        draw(tmp_path / name, random())
    (tmp_path / "README").write_text("no image")
    for source in (FolderSource(tmp_path, 1), create_source(f"{tmp_path}/*", in_chans=1)):
        assert [source.row_name(i) for i in range(len(source))] == ["1.2.840.113", "IM0001"]
        assert source[0].shape == (1, 7, 9) and str(source.left) == "2 other files ignored: 2 without extension"


@pytest.mark.parametrize(
    "file, window, text",
    [
        ("rtplan.dcm", None, "DICOM without an image .RTPLAN."),
        ("MR_truncated.dcm", None, "cannot be decoded"),
        ("CT_small.dcm", "file", "--dicom-window CENTRE WIDTH"),
    ],
)
def test_what_is_no_image_or_has_no_window_is_refused(file, window, text):
    with pytest.raises(ImageError, match=text):
        load_image(bundled(file), 1, Pixels(dicom_window=window))


def test_types_and_units_are_measured(tmp_path):
    x = random()
    for i in range(2):
        draw(tmp_path / f"{i}.dcm", x)
    found = measure(FolderSource(tmp_path, 1, Pixels()))
    assert (found.kind, found.unit) == ("DICOM (12 bits)", 4095)
    assert found.pixels.mean[0] == pytest.approx(x.mean() / 4095)
    assert float(found.pixels.high[0]) == pytest.approx(x.max() / 4095)


@pytest.mark.parametrize("package, file", [("pydicom", "x.dcm"), ("zarr", "x.zarr")])
def test_missing_packages_are_named(package, file, tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    if package == "pydicom":
        draw(tmp_path / file, random())
    else:
        (tmp_path / file).mkdir()
        (tmp_path / file / "zarr.json").touch()
    for module in ("formats.decode", "paths.walk"):
        monkeypatch.setattr(f"timm_convnextv2.data.{module}.installed", lambda name: name != package)
    left = str(FolderSource(tmp_path, 1).left)
    assert left == f"1 other file ignored: 1 {Path(file).suffix} (to read them: pip install {package})"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"{file}: .*`pip install {package}`"):
        load_image(tmp_path / file, 1)
