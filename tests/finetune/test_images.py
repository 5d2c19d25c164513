"""Images of every kind as timm's scripts get them: what reaches the network, against the truth made in numpy."""

import logging
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import timm.data
import torch
from helpers import write_tar
from PIL import Image
from timm.data import AugMixDataset

from timm_convnextv2.finetune import images
from timm_convnextv2.finetune.folders import FolderReader

SIZE = 16
RNG = np.random.default_rng(0)
U8, U16 = (partial(RNG.integers, 0, 256, dtype=np.uint8), partial(RNG.integers, 256, 65536, dtype=np.uint16))


FLOATS = partial(RNG.normal, size=(SIZE, SIZE))


def kind(ending, make):
    """A function that writes an image and returns its truth, float `[C, H, W]`."""

    def write(path):
        path, x = path.with_suffix(ending), make()
        if ending == ".npy":
            np.save(path, x)
        elif ending == ".tif" and x.shape[2:] != (3,):
            tifffile.imwrite(path, x, photometric="minisblack", **({"planarconfig": "contig"} if x.ndim == 3 else {}))
        else:
            Image.fromarray(x).save(path, lossless=True)
        scale = {"u1": 255, "u2": 65535}.get(x.dtype.str[1:], 1)
        return (x.transpose(2, 0, 1) if x.ndim == 3 else x[None]) / scale

    return write


def uint8(channels):
    return partial(U8, (SIZE, SIZE, channels))


grey16_png, grey16_tiff = (kind(ending, partial(U16, (SIZE, SIZE))) for ending in (".png", ".tif"))
float_tiff = kind(".tif", lambda: FLOATS().astype(np.float32))
rgb_png = kind(".png", uint8(3))
KINDS = {
    "16-bit grey png": (grey16_png, 1), "16-bit grey png as 3": (grey16_png, 3), "16-bit grey tiff": (grey16_tiff, 1),
    "float tiff": (float_tiff, 1), "16-bit bands tiff": (kind(".tif", partial(U16, (SIZE, SIZE, 5))), 5),
    "8-bit bands npy": (kind(".npy", uint8(5)), 5), "8-bit rgb npy": (kind(".npy", uint8(3)), 3),
    "rgba png": (kind(".png", uint8(4)), 4), "rgb bmp": (kind(".bmp", uint8(3)), 3),
    "rgb webp": (kind(".webp", uint8(3)), 3), "rgb tiff": (kind(".tif", uint8(3)), 3), "rgb png": (rgb_png, 3),
}  # fmt: skip


def script():
    """What `feed` replaces, as in timm's scripts."""
    names = ("create_dataset", "create_loader", "FastCollateMixup")
    return SimpleNamespace(**{name: getattr(timm.data, name) for name in names})


def loaded(root, in_chans, *, workers=0, dataset=lambda d: d, **options):
    """The images and targets of one epoch through a fed script's data set and loader."""
    fed = script()
    images.feed(fed, images.Reading(in_chans))
    data = dataset(fed.create_dataset("", root=str(root), split="train", is_training=True, input_img_mode="RGB"))
    mean, std = [0.1 * (k + 1) for k in range(in_chans)], [0.2 + 0.1 * k for k in range(in_chans)]
    options = dict(batch_size=4, mean=mean, std=std, num_workers=workers, device=torch.device("cpu")) | options
    loader = fed.create_loader(data, input_size=(in_chans, SIZE, SIZE), **options)
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("prefetcher", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_reaches_the_network_is_the_truth(kind, prefetcher, tmp_path):
    write, in_chans = KINDS[kind]
    truth = []
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        truth += [write(tmp_path / "train" / label / f"{i}") for i in range(2)]
    found, targets = loaded(tmp_path, in_chans, crop_pct=1.0, use_prefetcher=prefetcher)
    mean, std = (0.1 * (np.arange(in_chans) + 1), 0.2 + 0.1 * np.arange(in_chans))
    expected = (np.stack(truth) - mean[:, None, None]) / std[:, None, None]  # broadcasts grey to all channels
    assert found.dtype == torch.float32 and targets.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.fixture
def mixed(tmp_path):
    """8-bit JPEGs and 16-bit TIFFs side by side."""
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(U8((20, 24, 3))).save(tmp_path / "train" / label / f"{i}.jpg")
            tifffile.imwrite(tmp_path / "train" / label / f"{i}.tif", U16((20, 24)))
    return tmp_path


TRAIN = dict(is_training=True, re_prob=0.5, auto_augment="rand-m9", scale=(0.5, 1.0), vflip=0.5, interpolation="random")
MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=2)
WAYS = {
    "plain": dict(TRAIN),
    "color jitter": {**TRAIN, "auto_augment": None, "color_jitter": 0.4, "grayscale_prob": 0.2},
    "no prefetcher": {**TRAIN, "use_prefetcher": False},
    "workers": {**TRAIN, "workers": 2},
    "no augmentation": {**TRAIN, "no_aug": True},
    "sizes": {**TRAIN, "input_size_choices": [SIZE, SIZE]},
    "augmix": {**TRAIN, "num_aug_splits": 2, "dataset": partial(AugMixDataset, num_splits=2)},
    "mixup": {**TRAIN, "mixup": MIXUP}, "mixup elem": {**TRAIN, "mixup": {**MIXUP, "mode": "elem"}},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_mixed_kinds_are_all_there_and_augmented(way, mixed):
    options = dict(WAYS[way])
    if mixup := options.pop("mixup", None):
        options["collate_fn"] = images.CollateMixup(**mixup)
    found, targets = loaded(mixed, 3, **options)
    assert len(found) == 16 * (2 if way == "augmix" else 1) and torch.isfinite(found).all()
    assert found.std() > 0.3 and found.amax() < 8  # neither black nor in units of 255
    if way in ("plain", "workers"):
        assert sorted(targets.tolist()) == [0] * 8 + [1] * 8


def test_what_is_left_out_is_said_once(mixed, caplog):
    with caplog.at_level(logging.WARNING):
        loaded(mixed, 3, **TRAIN)
        loaded(mixed, 3, is_training=True, color_jitter=None)
    assert [r.message for r in caplog.records] == ["Left out for images that are not 8-bit RGB or grey: RandAugment."]


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("way", ["plain", "no prefetcher", "mixup", "color jitter"])
def test_8_bit_images_are_as_timm_gives_them(way, in_chans, tmp_path):
    """Bit for bit, with the same random draws."""
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(U8((24, 20, 3))).save(tmp_path / "train" / label / f"{i}.jpg")
            Image.fromarray(U8((24, 20))).save(tmp_path / "train" / label / f"{i}.png")
    results = []
    for fed in (False, True):
        options = dict(WAYS[way])
        mixup = options.pop("mixup", None)
        fake = script()
        if fed:
            images.feed(fake, images.Reading(in_chans))
        if mixup:
            options["collate_fn"] = fake.FastCollateMixup(**mixup)
        timm.utils.random_seed(0)
        mode = "RGB" if in_chans == 3 else "L"
        data = fake.create_dataset("", root=str(tmp_path), split="train", input_img_mode=mode)
        loader = fake.create_loader(
            data, (in_chans, SIZE, SIZE), 4, mean=(0.5,) * in_chans, std=(0.2,) * in_chans, num_workers=0,
            device=torch.device("cpu"), **options,
        )  # fmt: skip
        results.append([tensor for batch in loader for tensor in batch])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(results[0]) == 8


def test_rotation_and_grey_are_those_of_pretraining(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(U8((8, 16, 3))).save(tmp_path / "a" / "0.png", exif=exif)
    image, target = images.Images(FolderReader(tmp_path))[0]
    assert image.size == (8, 16) and image.mode == "RGB" and target == 0


def test_corrupt_images_are_replaced_or_named(mixed, caplog):
    (mixed / "train" / "a" / "1.tif").write_bytes(b"II*\0")
    data = images.Images(FolderReader(mixed / "train"))
    bad = next(i for i in range(16) if data.name(i).endswith("a/1.tif"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(torch.as_tensor(np.array(data[bad][0])), torch.as_tensor(np.array(data[bad + 1][0])))
    assert str(mixed / "train" / "a" / "1.tif") in caplog.text
    assert images.Images(data.reader, images.Reading(kept=images.Kept(1)))[bad] == (None, bad)
    with pytest.raises(ValueError, match="has 3 channels.*expected 5"):
        images.probe(images.Images(data.reader, images.Reading(5)))
    assert images.probe(data) == "not 8-bit with 3 channels"


def test_border_crop_is_refused_for_tensors(mixed):
    with pytest.raises(ValueError, match="--crop-mode border"):
        loaded(mixed, 3, crop_mode="border")


# ------------------------------------------------------------------------------- tars, torchvision's, streams: labelled


def samples(kinds, n):
    """(file name, content, class, truth) of images of the same channels, in turns."""
    for i in range(n):
        with tempfile.TemporaryDirectory() as folder:
            truth = kinds[i % len(kinds)](Path(folder) / f"{i:04d}")
            (path,) = Path(folder).iterdir()
            yield path.name, path.read_bytes(), i % 2, truth


def write_wds(root, found):
    labels = {f"{name.partition('.')[0]}.cls": str(label).encode() for name, _, label, _ in found}
    write_tar(
        root / "train-0000.tar", dict(sorted({**{name: content for name, content, *_ in found}, **labels}.items()))
    )
    return "wds/", root, "train-0000.tar"


def write_tar_set(root, found):
    images = {f"{'ab'[label]}/{name}": content for name, content, label, _ in found}
    write_tar(root / "x.tar", {**images, "a/readme.txt": b"x"})
    return "", root / "x.tar", "train"


def write_torch(root, found):
    for name, content, label, _ in found:
        (root / "train" / "ab"[label]).mkdir(parents=True, exist_ok=True)
        (root / "train" / "ab"[label] / name).write_bytes(content)
    return "torch/image_folder", root, "train"


def write_hfids(root, found):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    table = dict(
        image=[dict(path=name, bytes=content) for name, content, *_ in found], label=[label for _, _, label, _ in found]
    )
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    (root / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "set" / "train-0.parquet")
    return f"hfids/{root / 'set'}", root / "cache", "train"


SETS = {"wds": write_wds, "tar": write_tar_set, "torch": write_torch, "hfids": write_hfids}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", SETS)
def test_labelled_data_sets_are_decoded_alike(kind, in_chans, tmp_path, capsys, monkeypatch):
    """16 bits are not clipped, TIFF is not dropped, and labels stay with their images."""
    if kind == "wds":
        pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    kinds = [grey16_png, grey16_tiff, float_tiff] if in_chans == 1 else [rgb_png, grey16_tiff]
    found = list(samples(kinds, 6))
    name, root, split = SETS[kind](tmp_path, found)
    fed = script()
    images.feed(fed, images.Reading(in_chans))
    data = fed.create_dataset(
        name, root=str(root), split=split, input_img_mode="RGB", num_samples=6, batch_size=6, is_training=False
    )
    loader = fed.create_loader(
        data, (in_chans, SIZE, SIZE), 6, mean=(0.0,) * in_chans, std=(1.0,) * in_chans, crop_pct=1.0, num_workers=0,
        device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(x) == 6
    for _, _, label, truth in found:
        expected = torch.as_tensor(np.broadcast_to(truth, (in_chans, SIZE, SIZE)).astype(np.float32))
        (match,) = [i for i in range(6) if torch.allclose(x[i], expected, atol=2e-6)]
        assert y[match] == label
    if kind == "tar":
        assert "x.tar: 1 other file ignored: 1 .txt" in capsys.readouterr().out


def test_bad_images_of_a_stream_are_left_out(tmp_path, caplog):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    found = [(name, b"junk" if i == 1 else c, *rest) for i, (name, c, *rest) in enumerate(samples([grey16_png], 4))]
    name, root, split = write_wds(tmp_path, found)
    open_ = partial(images.create_dataset, name, root=str(root), split=split, num_samples=4)
    assert len(list(open_(reading=images.Reading(1)))) == 3 and "0001.png" in caplog.text


def test_tfds_gives_1_or_3_channels():
    with pytest.raises(ValueError, match="1 or 3 channels, got 5"):
        images.create_dataset("tfds/x", reading=images.Reading(5))
