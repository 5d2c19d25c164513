"""Images and masks: what is read, what is refused, and the transform that moves both together."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from timm_convnextv2.transfer.loop import Samples
from timm_convnextv2.transfer.segmentation.masks import (
    MaskCodes,
    MaskedImages,
    TrainTransform,
    load_mask,
    match_masks,
    open_split,
    read_classes,
    read_colours,
)

CLASSES = ["sea", "land", "sky"]


def write(root, stem, image=None, mask=None, ending=".png"):
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(parents=True, exist_ok=True)
    if image is not None:
        Image.fromarray(image).save(root / "images" / f"{stem}{ending}")
    if mask is not None:
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(root / "masks" / f"{stem}.png")


def image(height=20, width=30):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def indices(height=20, width=30, top=3):
    return np.random.default_rng(1).integers(0, top, (height, width), dtype=np.uint8)


def opened(root, **more):
    suffix = more.pop("suffix", "")
    codes = MaskCodes(**{key: more.pop(key) for key in MaskCodes._fields if key in more})
    return MaskedImages(match_masks(root / "images", root / "masks", suffix), CLASSES, codes=codes, **more)


@pytest.fixture
def root(tmp_path):
    for stem in ("a", "b"):
        write(tmp_path, stem, image(), indices())
    return tmp_path


def test_layouts(tmp_path):
    (tmp_path / "images/training").mkdir(parents=True)
    (tmp_path / "annotations/training").mkdir(parents=True)
    write(tmp_path, "training/a", image())
    Image.fromarray(indices()).save(tmp_path / "annotations/training/a.png")
    assert open_split(tmp_path, "train").masks == [str(tmp_path / "annotations/training/a.png")]
    with pytest.raises(ValueError, match="split 'validation'; expected validation/images and validation/masks"):
        open_split(tmp_path, "validation")


@pytest.mark.parametrize("kind", ["palette", "grey", "16 bit", "two values"])
def test_kinds_of_masks(tmp_path, kind):
    values = indices(top=2)
    image = Image.fromarray(values)
    if kind == "palette":
        image.putpalette([9, 9, 9, 200, 0, 0])
    elif kind == "16 bit":
        values = values.astype(np.uint16) * 1000
        image = Image.fromarray(values)
    elif kind == "two values":
        image = Image.fromarray(values.astype(bool))
    image.save(tmp_path / "mask.png")
    assert np.array_equal(load_mask(tmp_path / "mask.png"), values)


@pytest.mark.parametrize("mode, ending, said", [("RGB", "png", "has colours"), ("L", "jpg", "is a JPEG, whose values")])
def test_masks_that_are_no_indices(tmp_path, mode, ending, said):
    Image.fromarray(indices()).convert(mode).save(tmp_path / f"m.{ending}")
    with pytest.raises(ValueError, match=f"m.{ending} {said}"):
        load_mask(tmp_path / f"m.{ending}")


def test_many_channels_and_16_bit(tmp_path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/a.npy", np.full((5, 20, 30), 32768, dtype=np.uint16))
    write(tmp_path, "a", mask=indices())
    data = opened(tmp_path, in_chans=5)
    data.check()
    image, target = TrainTransform(16, [0.5] * 5)(*data[0])
    assert image.shape == (5, 16, 16) and image.mean() == pytest.approx(0.5, abs=1e-3)


def test_zero_label_of_ade20k(tmp_path):
    mask = indices(top=4)
    mask[0, 0] = 255
    write(tmp_path, "a", image(), mask)
    data = opened(tmp_path, reduce_zero_label=True)
    target = data[0][1].numpy()
    assert data.check().classes.tolist() == [(mask == i).sum() for i in (1, 2, 3)]
    assert (target[mask == 0] == 255).all() and target[0, 0] == 255 and (target[mask == 3] == 2).all()
    with pytest.raises(
        ValueError, match=r"indices of no class \(there are 3, 0 to 2, and 255 for none\): .*a.png has 3"
    ):
        opened(tmp_path).check()


def test_all_faults_in_one_message(root):
    write(root, "c", image(), indices(top=9))
    write(root, "d", image(), indices(21, 30))
    write(root, "e", image(), indices().astype(np.uint8))
    (root / "masks/e.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as caught:
        opened(root).check()
    message = str(caught.value)
    assert re.search(r"1 of 5 masks or their images cannot be read: .*e.png cannot be decoded", message)
    assert re.search(r"1 of 5 masks have another size than their images: .*d.png 21 x 30, image 20 x 30", message)
    assert re.search(r"1 of 5 masks have indices of no class .*c.png has 3, 4, 5, 6, 7", message)


def test_a_turned_photograph_has_the_size_that_is_read(tmp_path):
    write(tmp_path, "a", mask=indices(30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image()).save(tmp_path / "images/a.jpg", exif=exif)
    data = opened(tmp_path)
    data.check()
    assert data[0][0].shape == (3, 30, 20)


def test_images_without_masks_and_the_reverse(root):
    write(root, "lonely", mask=indices())
    assert [path[-10:] for path in opened(root).unused] == ["lonely.png"]
    for i in range(5):
        write(root, f"x{i}", image())
    said = r"5 of 7 images have no mask in '.*masks': \S+x0.png, \S+x1.png, \S+x2.png, \.\.\."
    with pytest.raises(ValueError, match=said):
        opened(root)
    for i in range(5):
        write(root, f"x{i}", mask=indices())
    write(root, "a", image(), ending=".bmp")
    with pytest.raises(ValueError, match="files in .* have the name of another one .*a.png"):
        opened(root)


def test_masks_without_any_class(tmp_path):
    write(tmp_path, "a", image(), np.full((20, 30), 255, dtype=np.uint8))
    with pytest.raises(ValueError, match="no pixel of 1 masks has a class"):
        opened(tmp_path).check()
    with pytest.raises(ValueError, match="ignore index 1 is the index of the class 'land'"):
        opened(tmp_path, ignore_index=1)


@pytest.mark.parametrize(
    "text, said", [("a\n\nb\n", "no name in line 2"), ("a\nb\na\n", "duplicates: a"), ("a\n", "names: ")], ids=str
)
def test_class_names(tmp_path, text, said):
    (tmp_path / "classes.txt").write_text("a\r\nb c\n\n")
    assert read_classes(tmp_path / "classes.txt") == ["a", "b c"]
    (tmp_path / "classes.txt").write_text("a\nb c\n", encoding="utf-16")  # as some shells write a redirect
    assert read_classes(tmp_path / "classes.txt") == ["a", "b c"]
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_classes(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match="cannot be read .* line 1 is the name of index 0"):
        read_classes(tmp_path / "absent.txt")


@pytest.mark.parametrize("size", [16, 64])
def test_image_and_mask_move_together(size):
    """The image shows its mask, so that after any crop and flip they still agree."""
    mask = torch.zeros(40, 48, dtype=torch.int64)
    mask[8:30, 10:25], mask[30:, 30:] = 1, 2
    image = (mask * 100).to(torch.uint8)[None]
    transform = TrainTransform(size, [0.9], scale=(0.5, 2.0), vflip=0.5)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        x, y = transform(image, mask)
        assert x.shape == (1, size, size) and x.dtype == torch.float32 and y.shape == (size, size)
        shown, inside = x[0] * 2.55, y != 255
        # only at edges does the bilinear image lie between two classes; of a mask that is not flipped, 0.5 is usual
        assert (shown - y).abs()[inside].mean() < 0.15
        assert (x[0][~inside] == 0.9).all()
        seen.add(float(x.sum()))
    assert len(seen) > 8


def test_short_side_is_the_size_at_factor_1():
    transform = TrainTransform(20, [0.5], scale=(1.0, 1.0), short_side=20)
    x, y = transform(torch.zeros(1, 40, 80, dtype=torch.uint8), torch.zeros(40, 80, dtype=torch.int64))
    assert (y == 0).all()  # the crop takes the whole height: nothing is filled


def test_samples_depend_on_seed_epoch_and_index_only(root):
    samples = Samples(opened(root), TrainTransform(16, [0.5] * 3), seed=3)
    torch.manual_seed(1)
    first = samples[2, 1]
    state = torch.random.get_rng_state()
    again, other = samples[2, 1], samples[3, 1]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_white_that_does_not_count(root, tmp_path):
    """Foreground stored as 255, in all files or in half of them, beside 0."""
    for name in "ab":
        write(root, name, mask=indices(top=2) * 255)
    with pytest.raises(ValueError, match="2 of 2 masks hold only 0 and 255, .*--mask-values 0 255"):
        opened(root).check()
    write(root, "b", mask=indices(top=2))
    counts, ignored, (note,) = opened(root).check()
    assert "1 of 2 masks hold only 0 and 255" in note and "--mask-values 0 1,255" in note
    assert ignored == pytest.approx((indices(top=2) == 1).mean() / 2)
    counts, ignored, notes = opened(root, values=("0", "1,255", "7")).check()
    assert ignored == 0 and not notes and counts.tolist() == [2 * (indices(top=2) == i).sum() for i in (0, 1)] + [0]
    assert set(opened(root, values=("0", "1,255", "7"))[0][1].unique().tolist()) == {0, 1}
    with pytest.raises(ValueError, match="1 of 2 masks have values of no class: .*b.png has 1"):
        opened(root, values=("0", "255", "7")).check()
    for values, said in (
        (("0", "255"), "one per class, that is 3"),
        (("0", "0", "1"), "same"),
        (("a", "0", "1"), "numb"),
    ):
        with pytest.raises(ValueError, match=said):
            opened(root, values=values)


def test_masks_in_colours_and_with_a_suffix(tmp_path):
    names, colours = read_colours(["sea 0 0 255", "dry land, 0, 128,0", "sky 255 255 255"])
    assert names == ["sea", "dry land", "sky"] and colours == (0x0000FF, 0x008000, 0xFFFFFF)
    values = indices()
    table = np.array([[0, 0, 255], [0, 128, 0], [255, 255, 255]], dtype=np.uint8)
    write(tmp_path, "a", image())
    write(tmp_path, "a_mask", mask=table[values])
    data = opened(tmp_path, colours=colours, suffix="_mask")
    assert np.array_equal(data[0][1].numpy(), values) and data.check().classes.sum() == values.size
    table[2] = 250
    write(tmp_path, "a_mask", mask=table[values])
    with pytest.raises(ValueError, match="masks have colours of no class: .* has #fafafa"):
        data.check()
    with pytest.raises(ValueError, match="1 of 1 images have no mask .*--mask-suffix"):
        opened(tmp_path, colours=colours)
    with pytest.raises(ValueError, match="--mask-colors: lines .*NAME R G B"):
        read_colours(["sea", "land 0 0 256", "sky 1 1 1"])


def grey_png(values, bits):
    """A grey PNG of less than 8 bits, which Pillow does not write."""
    rows = b"".join(b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_indices(tmp_path, bits):
    values = indices(top=2**bits)
    (tmp_path / "m.png").write_bytes(grey_png(values, bits))
    assert np.array_equal(load_mask(tmp_path / "m.png"), values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_masks_whose_zero_is_white_are_not_inverted(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    values = indices(top=2 if dtype is bool else 5).astype(dtype)
    tifffile.imwrite(tmp_path / "m.tif", values, photometric="miniswhite")
    assert np.array_equal(load_mask(tmp_path / "m.tif"), values.astype(np.int64))
