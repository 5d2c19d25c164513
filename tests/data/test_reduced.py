"""JPEGs decoded at reduced size give the samples of whole ones."""

import tarfile

import numpy as np
import pytest
import torch
from drawn import PLAIN, UPRIGHT, encoded, photograph, run, same
from helpers import write_tar
from PIL import Image
from torchvision.transforms import v2

from timm_convnextv2.data import (
    DataSet,
    FolderSource,
    ImageError,
    PretrainDataset,
    PretrainStream,
    PretrainTransform,
    TimmSource,
    TimmStream,
    create_source,
    load_image,
    sample_seed,
)
from timm_convnextv2.data.formats.pillow import Reduced


class Full(FolderSource):
    """Decodes every image at full size."""

    def read(self, i, choose=None, seed=None):
        return super().read(i)


class Reductions(FolderSource):
    """Notes by how much each image was reduced."""

    def read(self, i, choose=None, seed=None):
        loaded = super().read(i, choose)
        factor = loaded.size[0] / loaded.frame[2] if isinstance(loaded, Reduced) else 1
        self.seen = [*getattr(self, "seen", []), factor]
        return loaded


def psnr(a, b):
    return -10 * float((a - b).square().mean().clamp_min(1e-12).log10())


def samples_of(root, source, transform, epochs=4, in_chans=3):
    dataset = PretrainDataset(source(root, in_chans), transform, (4, 4), 0.5)
    return [dataset[epoch, i] for epoch in range(epochs) for i in range(len(dataset))], dataset.source


def compare(root, transform, **options):
    """The quality of each reduced sample against that of the whole image, and the reductions."""
    (full, _), (reduced, source) = (samples_of(root, kind, transform, **options) for kind in (Full, Reductions))
    assert all(torch.equal(a[1], b[1]) and a[2] == b[2] == [] for a, b in zip(full, reduced, strict=True))
    return [psnr(a[0], b[0]) for a, b in zip(full, reduced, strict=True)], source.seen, reduced


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for i, (quality, subsampling) in enumerate([(75, 2), (90, 2), (90, 0), (95, 1)]):
        photograph(900, 1203, i).save(root / f"{i}.jpg", quality=quality, subsampling=subsampling)
    photograph(903, 901, 4).convert("L").save(root / "4.jpg", quality=90)
    photograph(1201, 903, 5).save(root / "5.jpg", quality=90, progressive=True)
    frames = photograph(900, 1203, 6), photograph(900, 1203, 7)  # as phones write them
    frames[0].save(root / "6.jpg", "MPO", save_all=True, append_images=frames[1:], quality=90)
    return root


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_reduced_jpegs_agree_with_full_ones(photographs, in_chans, interpolation):
    # not square, so that a swap of the axes shows
    mean, std = (0,) * in_chans, (1,) * in_chans
    transform = PretrainTransform((48, 80), interpolation=interpolation, vflip=0.5, mean=mean, std=std)
    values, seen, reduced = compare(photographs, transform, epochs=3, in_chans=in_chans)
    assert {2, 4, 8} <= set(seen) <= {1, 2, 4, 8}
    assert np.median(values) > 44 and min(values) > 40, values
    again, _ = samples_of(photographs, FolderSource, transform, 3, in_chans)
    for a, b in zip(reduced, again, strict=True):
        assert torch.equal(a[0], b[0]) and b[0].shape == (in_chans, 48, 80) and b[0].is_contiguous()


def test_reduced_crops_are_the_same_boxes(tmp_path):
    """Pictures of their own coordinates: the samples tell where the crop lies, to a fraction of an output pixel."""
    height, width = 1003, 1205  # which no reduction divides
    y, x = np.mgrid[:height, :width]
    ramps = np.dstack([255 * y / height, 255 * x / width, np.full_like(y, 128.0)])
    Image.fromarray(ramps.round().astype(np.uint8)).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    transform = PretrainTransform(64, **PLAIN)
    (full, _), (reduced, source) = (samples_of(tmp_path, kind, transform, 12) for kind in (Full, Reductions))
    assert {4, 8} <= set(source.seen)
    for a, b in zip(full, reduced, strict=True):
        # per channel: position of the box, and half its extent, in shares of the image; a full-size pixel is 1e-3
        for c, dim in ((0, 0), (1, 1)):
            off = (a[0] - b[0])[c]
            assert abs(float(off.mean())) < 1e-3
            assert abs(float(off.narrow(dim, 2, 30).mean() - off.narrow(dim, 32, 30).mean())) < 5e-4


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_reduced_jpegs_are_turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    photograph(901, 1101).save(tmp_path / "x.jpg", quality=90, exif=exif)
    values, seen, _ = compare(tmp_path, PretrainTransform((48, 64), **PLAIN))
    assert min(seen) > 1 and min(values) > 42
    upright = load_image(tmp_path / "x.jpg")
    assert upright.shape == ((3, 1101, 901) if orientation > 4 else (3, 901, 1101))  # nobody else gets less
    # where in the pixels the image lies, to the fraction
    loaded = FolderSource(tmp_path).read(0, lambda size: 8)
    assert loaded.size == upright.shape[1:]
    assert loaded.pixels.shape == ((3, 138, 113) if orientation > 4 else (3, 113, 138))
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
def test_other_images_are_not_reduced(tmp_path, name, mode, size, options):
    image = photograph(*size)
    if name.endswith("npy"):
        np.save(tmp_path / name, np.asarray(image))
    elif mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / name)
    else:
        image.convert(mode).save(tmp_path / name, **options)
    reduced, source = samples_of(tmp_path, Reductions, PretrainTransform(32, **PLAIN))
    assert set(source.seen) == {1}
    # as torchvision makes them
    steps = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1.0), (3 / 4, 4 / 3), v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0,) * 3, (1,) * 3),
    ])  # fmt: skip
    for epoch, sample in enumerate(reduced):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample_seed(0, epoch, 0))
            assert torch.equal(steps(load_image(tmp_path / name)), sample[0])


@pytest.mark.parametrize("progressive", [False, True])
def test_bad_jpegs_are_as_bad_when_reduced(tmp_path, progressive):
    photograph(300, 400).save(tmp_path / "x.jpg", quality=90, progressive=progressive)
    content = (tmp_path / "x.jpg").read_bytes()
    source = FolderSource(tmp_path)

    def verdict(choose):
        try:
            source.read(0, choose)
        except ImageError as error:
            return str(error)

    size = len(content)
    for length in [0, 3, 300, 700, *range(1000, size, size // 10), *range(size - 3, size)]:
        (tmp_path / "x.jpg").write_bytes(content[:length])
        assert verdict(None) == verdict(lambda size: 8)
        assert length > 1000 or verdict(None)
    (tmp_path / "x.jpg").write_bytes(content[: size // 2])
    photograph(300, 400, 1).save(tmp_path / "y.jpg")
    dataset = PretrainDataset(source := FolderSource(tmp_path), PretrainTransform(32, **PLAIN), (4, 4), 0.5)
    image, _, bad = dataset[0, 0]
    ((index, message),) = bad
    assert index == 0 and "x.jpg" in message and "truncated" in message
    # under the random numbers of the bad one
    whole = PretrainDataset(Full(tmp_path), dataset.transform, (4, 4), 0.5)[0, 0]
    assert psnr(image, whole[0]) > 42 and len(source) == 2


def test_channels_and_transforms_of_reduced_images(tmp_path):
    photograph(300, 400).save(tmp_path / "x.jpg")
    shapes = []
    PretrainDataset(FolderSource(tmp_path), lambda x: shapes.append(x.shape) or x, (4, 4), 0.5)[0, 0]
    assert shapes == [(3, 300, 400)]  # a transform without `reduction` gets the whole image
    with pytest.raises(ImageError, match="x.jpg.*3 channels.*expected 4"):
        FolderSource(tmp_path, 4).read(0, lambda size: 2)
    with pytest.raises(ValueError, match="3 channels.*--mean.* 1 number:"):
        PretrainTransform(32, mean=(0,), std=(1,))(FolderSource(tmp_path).read(0, lambda size: 2))
    with pytest.raises(ValueError, match="1 channel,.*--mean.* 3 numbers"):
        PretrainTransform(32)(torch.zeros(1, 40, 40))


def test_reduced_samples_are_repeatable_and_leave_the_generator_alone(tmp_path):
    for i in range(8):
        photograph(300 + 40 * i, 420, i).save(tmp_path / f"{i}.jpg")
    source, before = Reductions(tmp_path), torch.get_rng_state()
    expected = run(source, epoch=2)
    assert max(source.seen) > 1 and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(run(source, 2, workers=2), expected) and same(run(source, 2, start_batch=1), expected[1:])


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
        contents += [encoded(photograph(*size), "jpeg", quality=90), b"junk"]
    write_tar(tmp_path / "train-0000.tar", {f"{i:04d}.jpg": content for i, content in enumerate(contents)})
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
