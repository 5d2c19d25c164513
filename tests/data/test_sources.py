"""Sources of images: folders, timm's data sets, streams, and how they are chosen."""

import os
import pickle
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import RGB, UPRIGHT, encoded, folder_of, hwc, no_sleep, noise  # noqa: F401  a fixture
from helpers import write_tar
from PIL import Image
from torch.utils.data import DataLoader

from timm_convnextv2.data import (
    DataSet,
    DemoSource,
    FolderSource,
    ImageError,
    MissingPackageError,
    PretrainStream,
    PretrainTransform,
    StreamOrder,
    TimmSource,
    TimmStream,
    check_readable,
    collate,
    create_source,
    image_extensions,
)
from timm_convnextv2.data.samples import dataset as samples_module
from timm_convnextv2.data.sources import timm as timm_source


def test_folder_is_nested_sorted_and_follows_links_once(tmp_path):
    root = folder_of(tmp_path / "root", 2)
    folder_of(root / "a" / "deep", 1, "JPG")
    folder_of(root / ".hidden", 1)
    noise().save(root / "a" / "ü b.webp")
    noise().save(root / "._001.png")
    np.save(root / "z.npy", RGB)
    (root / "notes.txt").write_text("no picture")
    (root / "film.mpg").write_text("no picture")
    elsewhere = folder_of(tmp_path / "elsewhere", 1, "tif")
    (root / "link").symlink_to(elsewhere)
    (root / "link2").symlink_to(elsewhere)
    (root / "y.png").symlink_to(elsewhere / "000.tif")
    (elsewhere / "loop").symlink_to(root)
    source = FolderSource(root)
    names = [os.path.relpath(source.name(i), root) for i in range(len(source))]
    assert names == ["000.png", "001.png", "y.png", "z.npy", "a/ü b.webp", "a/deep/000.JPG", "link/000.tif"]
    assert [tuple(source[i].shape[1:]) for i in (2, 3)] == [(24, 32), (6, 8)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.name(i) for i in range(7)] == [source.name(i) for i in range(7)]
    assert torch.equal(copy[4], source[4])
    with pytest.raises(IndexError, match="7"):
        source[7]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such file names")
def test_folder_with_a_name_that_is_not_utf8(tmp_path):
    noise().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    source = FolderSource(tmp_path)
    assert source[0].shape == (3, 24, 32) and source.name(0).encode()  # safe to print


def test_folder_errors(tmp_path):
    noise().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png is a"):
        FolderSource(tmp_path / "x.png")
    (tmp_path / "none" / "below").mkdir(parents=True)
    (tmp_path / "none" / "a.txt").touch()
    (tmp_path / "none" / "below" / "b.pdf").touch()
    with pytest.raises(ValueError, match=r"2 other files.*\.jpg.*\.npy.*\.png"):
        FolderSource(tmp_path / "none")
    with pytest.raises(ValueError, match="in_chans"):
        FolderSource(tmp_path, in_chans=0)


def test_extensions():
    extensions = set(image_extensions())
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".npy"} <= extensions
    assert not extensions & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".hdf", ".wmf", ".grib", ".txt"}


@pytest.fixture
def grey16(tmp_path):
    """Two class folders with a 16-bit and a rotated image, which torchvision and timm alone would get wrong."""
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


def test_timm_torchvision_images(tmp_path):
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
    """A parquet data set with a column of images and nothing else; the second one is broken."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    deep = encoded(np.array([[0, 40000]], np.uint16))
    images = [(None, encoded(RGB)), ("broken.png", b"junk"), (None, deep)]
    buffers = [dict(path=path, bytes=content) for path, content in images]
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
    with pytest.raises(ValueError, match="'image'.*input_key.*: picture"):
        create_source(parquet.parent / "cache", DataSet(f"hfds/{parquet}"))
    with pytest.raises(ValueError, match="nosplit"):
        create_source(parquet.parent / "cache", DataSet(f"hfds/{parquet}", "nosplit", input_key="picture"))


def test_empty_timm_data_set(monkeypatch):
    monkeypatch.setattr(timm_source, "open_dataset", lambda *args, **kwargs: [])
    with pytest.raises(ValueError, match="'train'.*torch/empty"):
        TimmSource(DataSet("torch/empty"))


def test_hfids_without_labels(parquet):
    stream = TimmStream(
        DataSet(f"hfids/{parquet}", num_images=3, input_key="picture"),
        parquet.parent / "cache",
        order=StreamOrder(3),
    )
    samples = []
    for name, load in stream.undecoded():
        if "broken" in name:
            with pytest.raises(ImageError):
                load()
        else:
            samples.append(load())
    assert sorted(tuple(s.shape) for s in samples) == [(3, 1, 2), (3, 6, 8)]
    assert {s.dtype for s in samples} == {torch.uint8, torch.float32}


def shards(root, n, per_shard=6, broken=()):
    root.mkdir()
    for shard in range(n):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        images = {i: b"junk" if i in broken else encoded(np.full((8, 8), 1000 * i, np.uint16)) for i in numbers}
        write_tar(root / f"train-{shard:04d}.tar", {f"{i:04d}.png": x for i, x in images.items()})  # without labels
    return root


def stream_over(root, n, workers, batch_size=3, **kwargs):
    """Loader and data set over all of `n` shards of six images, mean 0 and std 1."""
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
        assert seen == set(range(12)) - {3, 7}  # 16-bit, and all images but the broken ones
        bad = [message for _, _, bad in batches for _, message in bad]
        assert len(bad) == 2 and any("0003.png" in message for message in bad)
        assert masks.flatten(1).sum(1).tolist() == [8] * 12 and len(masks.unique(dim=0)) > 6
        epochs.append(masks)
    assert not torch.equal(*epochs)


def test_wds_stream_errors(tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    monkeypatch.setattr(samples_module, "_MAX_BAD_IN_A_ROW", 10)
    root = shards(tmp_path / "s", 2, broken=range(12))
    with pytest.raises(ValueError, match="10 images.*\n.*png"):
        list(stream_over(root, 2, 0)[1])
    with pytest.raises(ValueError, match="worker 1 of 2.*--workers"):
        list(stream_over(shards(tmp_path / "good", 1), 1, 2)[1])
    with pytest.raises(ValueError, match="num_samples"):
        create_source(root, DataSet("wds/", "train-0000.tar"))
    with pytest.raises(ValueError, match="--data-dir"):
        create_source(None, DataSet("wds/", "train-0000.tar"))
    source = create_source(root, DataSet("wds/", "train-0000.tar", 6, input_key="jpg"))
    with pytest.raises(ImageError, match="0000.*input key"):
        next(iter(source))


def stream_of(loads, grid, rank=0):
    source = SimpleNamespace(rank=rank, undecoded=lambda: iter(loads))
    return [*PretrainStream(source, lambda x: x.float(), grid, 0.5)]


def test_ranks_of_a_stream_never_draw_the_same_masks():
    loads = [(f"image {i}", lambda choose: torch.zeros(1, 8, 8)) for i in range(20)]
    masks = [mask for rank in (0, 1) for _, mask, _ in stream_of(loads, (8, 8), rank)]
    assert len({mask.numpy().tobytes() for mask in masks}) == 40


def test_stream_starts_with_a_bad_image():
    def broken(message):
        raise ImageError(message)

    loads = [
        ("first", lambda choose: broken("first: broken")),
        ("second", lambda choose: torch.full((1, 8, 8), 7, dtype=torch.uint8)),
        ("third", lambda choose: broken("broken")),
    ]
    images, _, bad = zip(*stream_of(loads, (2, 2)), strict=True)
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


def test_check_readable(tmp_path):
    folder_of(tmp_path, 9)
    source = FolderSource(tmp_path)
    assert check_readable(source) == []
    with pytest.raises(ValueError, match="3 channels.*expected 12 channels.*--in-chans"):
        check_readable(FolderSource(tmp_path, in_chans=12))
    for i in range(1, 9):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    assert [i for i, _ in check_readable(source)] == list(range(1, 9))
    assert [i for i, _ in check_readable(source, tries=3)] == [3, 6]
    (tmp_path / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)None of 9 images.*000\.png.*001\.png.*002\.png") as info:
        check_readable(source)
    assert "003.png" not in str(info.value)


def test_create_source(tmp_path):
    folder_of(tmp_path / "root" / "train", 2)
    folder_of(tmp_path / "root" / "cat", 3)
    source = create_source(tmp_path / "root", in_chans=1)
    assert isinstance(source, FolderSource) and len(source) == 5 and source[0].shape == (1, 24, 32)
    demo = create_source(data_set=DataSet("demo", num_images=9))
    held_out = create_source(data_set=DataSet("demo", "validation"))
    assert isinstance(demo, DemoSource) and (len(demo), len(held_out)) == (9, 2048)
    assert not torch.equal(demo[0], held_out[0])
    for call, words in (
        (lambda: create_source(), "--data-dir.*demo"),
        (lambda: create_source(tmp_path, DataSet("imagenet")), "'imagenet'.*hfds/"),
        (lambda: TimmSource(DataSet("imagenet"), tmp_path), "'imagenet'"),
        (lambda: TimmSource(DataSet("wds/x"), tmp_path), "stream.*TimmStream"),
        (lambda: TimmStream(DataSet("hfds/x"), tmp_path), "hfds/x.*TimmSource"),
        (lambda: TimmSource(DataSet("torch/cifar10", input_key="x"), tmp_path), "input_key"),
        (lambda: TimmSource(DataSet("torch/cifar10"), tmp_path), "torch/cifar10"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
