"""The command embed and its function: rows of features for images, in parts, resumed, by several processes."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tifffile
import timm
import torch
from encoders import embed, make_encoder
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_convnextv2.commands.embed import main
from timm_convnextv2.data import DemoSource, MissingPackageError
from timm_convnextv2.data.formats.decode import decode
from timm_convnextv2.features import embed as run
from timm_convnextv2.features import extract, extract_features
from timm_convnextv2.features import rows as writing
from timm_convnextv2.features.encoder import open_encoder
from timm_convnextv2.features.rows import Parts
from timm_convnextv2.runs.progress import ImageProgress


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """Five images in nested folders, larger and smaller than the model's 32 pixels, some not square."""
    folder, source = tmp_path_factory.mktemp("images"), DemoSource(5, size=48)
    for i, name in enumerate(["b.png", "a.bmp", "sub/c.tif", "sub/deep/d, e.png", "z/f.webp"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(source[i].permute(1, 2, 0).numpy())
        image.resize([(48, 48), (40, 64), (20, 24), (32, 32), (70, 50)][i]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


ORDER = ["a.bmp", "b.png", "sub/c.tif", "sub/deep/d, e.png", "z/f.webp"]


def read(output):
    """The matrix, the names of its rows, and the skipped images with their reasons."""
    tables, within = [], None
    if output.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed").read_table(output)
        matrix, within = np.stack(table["embedding"].to_numpy(zero_copy_only=False)), table["file"].to_pylist()
        assert table.column_names == ["file", "embedding"] and not output.with_name(f"{output.name}.csv").exists()
    else:
        matrix = np.load(output) if output.suffix == ".npy" else safetensors.numpy.load_file(output)["embeddings"]
    for end in (".csv", ".skipped.csv"):
        path = output.with_name(output.name + end)
        with open(path, newline="", encoding="utf-8") if path.exists() else open(os.devnull) as f:
            tables.append(list(csv.DictReader(f)))
    return matrix, within or [row["file"] for row in tables[0]], {row["file"]: row["reason"] for row in tables[1]}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_embeddings_are_those_of_the_model(small, images_dir, tmp_path, suffix):
    output = tmp_path / "deep" / f"out{suffix}"
    assert embed(small, images_dir, output, batch_size=2) == (5, {})
    matrix, files, skipped = read(output)
    assert (matrix.shape, matrix.dtype) == ((5, 32), np.float32)
    assert files == ORDER and not skipped
    model = timm.create_model(small, pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model))
    for row, file in zip(torch.from_numpy(matrix.copy()), files, strict=True):
        image = transform(Image.open(images_dir / file).convert("RGB"))[None]
        with torch.no_grad():
            features = model(image)[0]
        # Pillow and torch round differently when they resize; the image of the right size is cropped only
        torch.testing.assert_close(row, features, rtol=0, atol=0.05)
    assert np.abs(matrix - matrix.mean(0)).max() > 0.5  # or the tolerance would say nothing
    beside = [f"{output.name}.csv"] if suffix != ".parquet" else []
    assert sorted(p.name for p in output.parent.iterdir()) == [output.name, *beside]
    (tmp_path / "any").touch()
    assert output.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_embeddings_without_resizing_are_exact(root, tmp_path):
    """In floats, as 16-bit and many channels are: what the model gives for the normalised array itself."""
    make_encoder(root / "five", in_chans=5)
    folder = root / "five"
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "images").mkdir()
    array = np.random.default_rng(0).random((3, 5, 32, 32), dtype=np.float32)
    bands = (array[1] * 65535).astype(np.uint16)
    np.save(tmp_path / "images" / "0.npy", array[0])
    tifffile.imwrite(tmp_path / "images" / "1.tif", bands, photometric="minisblack", planarconfig="separate")
    np.save(tmp_path / "images" / "2.npy", array[2].transpose(1, 2, 0))
    embed(f"local-dir:{folder}", tmp_path / "images", tmp_path / "out.npy", batch_size=3)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    images = torch.from_numpy(np.stack([array[0], bands / np.float32(65535), array[2]]))
    with torch.no_grad():
        expected = model((images - 0.4) / 0.3)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, rtol=1e-5, atol=1e-5)


def test_grey_16_bit_is_not_clipped(root, tmp_path):
    make_encoder(root / "grey", in_chans=1)
    (tmp_path / "images").mkdir()
    grey = DemoSource(1, size=48, in_chans=1)[0][0].numpy()
    Image.fromarray(grey).save(tmp_path / "images" / "8.png")
    tifffile.imwrite(tmp_path / "images" / "16.tif", grey.astype(np.uint16) * 257)
    embed(f"local-dir:{root / 'grey'}", tmp_path / "images", tmp_path / "out.npy")
    sixteen, eight = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(sixteen, eight, atol=0.05)


def test_embeddings_are_repeatable_whatever_the_workers(small, images_dir, tmp_path):
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        embed(small, images_dir, tmp_path / f"{name}.npy", batch_size=2, workers=workers)
    first, *others = ((tmp_path / f"{name}.npy").read_bytes() for name in "abc")
    assert others == [first, first]
    embed(small, images_dir, tmp_path / "d.npy", batch_size=2, img_size=40)
    assert np.abs(np.load(tmp_path / "d.npy") - np.load(tmp_path / "a.npy")).max() > 0.01


@pytest.fixture
def partly_bad(images_dir, tmp_path):
    folder = tmp_path / "partly bad"
    shutil.copytree(images_dir, folder)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:100])
    (folder / "sub" / "deep" / "x\n.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("suffix, batch_size", [(".npy", 1), (".safetensors", 64), (".parquet", 2)])
def test_bad_images_are_skipped_and_listed(small, images_dir, partly_bad, tmp_path, batch_size, suffix):
    output = tmp_path / f"out{suffix}"
    rows, reasons = embed(small, partly_bad, output, batch_size=batch_size, max_bad_images=0.5)
    matrix, files, skipped = read(output)
    assert rows == len(matrix) == 4 and files == [file for file in ORDER if file != "b.png"]
    assert list(skipped) == ["b.png", "sub/deep/x\n.png"] and list(skipped.values()) == list(reasons.values())
    assert "b.png: cannot be decoded" in skipped["b.png"]
    embed(small, images_dir, tmp_path / "all.npy", batch_size=batch_size)
    np.testing.assert_allclose(matrix, np.load(tmp_path / "all.npy")[[0, 2, 3, 4]], atol=1e-5)
    embed(small, images_dir, output, overwrite=True)  # now none is bad: the old list goes
    assert read(output)[2] == {} and len(read(output)[0]) == 5


def test_too_many_bad_images_stop_and_write_nothing(small, partly_bad, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"(?s)2 of 6 images.*b\.png: cannot be decoded"):
        embed(small, partly_bad, tmp_path / "out" / "out.npy", max_bad_images=0.2)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="None of 1 images tried"):
        embed(small, tmp_path / "images", tmp_path / "out.npy", max_bad_images=1.0)
    monkeypatch.setattr(run, "check_readable", lambda source: [])  # it tries some of many only
    with pytest.raises(ValueError, match="1 of 1 images cannot be decoded"):
        embed(small, tmp_path / "images", tmp_path / "out.npy", max_bad_images=1.0)


@pytest.mark.parametrize("where", ["rows", "output"])
def test_a_failure_leaves_the_old_output_alone(small, images_dir, tmp_path, monkeypatch, capsys, where):
    output = tmp_path / "out" / "out.npy"
    embed(small, images_dir, output)
    before = {p.name: p.read_bytes() for p in output.parent.iterdir()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, {"rows": "save_file", "output": "_write_rows"}[where], fail)
        words = ["--model", small, "--data-dir", str(images_dir), "--output", str(output), "--overwrite"]
        assert main([*words, "--device", "cpu", "-j", "0"]) == 2
    err = capsys.readouterr().err
    assert "cannot be written: No space left on device." in err and "Traceback" not in err and err.count("error:") == 1
    assert {p.name: p.read_bytes() for p in output.parent.iterdir() if p.is_file()} == before
    parts = output.with_name("out.npy.parts")
    assert parts.exists() == (where == "output")  # what is finished stays
    embed(small, images_dir, output, overwrite=True, resume=True)
    assert {p.name: p.read_bytes() for p in output.parent.iterdir()} == before


def test_a_missing_package_is_no_bad_image(small, images_dir, tmp_path, monkeypatch):
    def decode_but_one(path, *args):
        if path.endswith("b.png"):
            raise MissingPackageError("run `pip install tifffile`")
        return decode(path, *args)

    monkeypatch.setattr("timm_convnextv2.data.sources.files.decode", decode_but_one)
    monkeypatch.setattr(run, "check_readable", lambda source: [])
    with pytest.raises(MissingPackageError, match="pip install tifffile"):
        embed(small, images_dir, tmp_path / "out.npy", max_bad_images=1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(output="out.pt"), r"expected a file whose name ends in \.npy, \.safetensors or \.parquet"),
        (dict(output="folder.npy"), "expected a file"),
        (dict(output="there.npy"), r"there\.npy' exists.*--overwrite"),
        (dict(output="table.npy"), r"table\.npy\.csv' exists"),
        (dict(output="images/out.npy"), "lies among the images"),
        (dict(data_dir="absent"), "does not exist"),
        (dict(data_dir="folder.npy"), "No image below"),
        (dict(data_dir="there.npy"), "there.npy is a file"),
        (dict(model="local-dir:absent"), "'local-dir:absent' cannot be loaded"),
        (dict(img_size=4), "--img-size 4 is smaller than the model's stride, 8"),
        (dict(device="nowhere"), "--device nowhere cannot be used"),
        (dict(batch_size=0), "--batch-size must be at least 1"),
        (dict(max_bad_images=2), "--max-bad-images must be at most 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_embed_refuses(small, images_dir, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.npy").mkdir()
    Path("there.npy").touch()
    Path("table.npy.csv").touch()
    Path("images").symlink_to(images_dir)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        embed(**dict(model=small, data_dir="images", output="out.npy") | changes)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_parquet_without_its_package_is_refused_first(small, images_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pyarrow.*pip install pyarrow"):
        embed("local-dir:absent", images_dir, tmp_path / "out.parquet")


def test_any_model_of_timm(images_dir, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    assert embed(f"local-dir:{tmp_path / 'resnet'}", images_dir, tmp_path / "x.npy", img_size=64, batch_size=2) == (
        5,
        {},
    )
    assert np.load(tmp_path / "x.npy").shape == (5, 512)


def test_the_demo_data(small, tmp_path):
    embed(small, None, tmp_path / "a.npy", dataset="demo", num_images=9, batch_size=4)
    matrix, files, _ = read(tmp_path / "a.npy")
    assert matrix.shape == (9, 32) and files == [DemoSource(9).name(i) for i in range(9)]
    embed(small, None, tmp_path / "b.npy", dataset="demo", num_images=9, batch_size=4, split="test")
    assert np.abs(np.load(tmp_path / "b.npy") - matrix).max() > 0.1


def test_mixed_precision_is_close_and_stored_in_float32(small, images_dir, tmp_path):
    for name in "ab":
        embed(small, images_dir, tmp_path / f"{name}.npy", amp=name == "b")
    a, b = (np.load(tmp_path / f"{name}.npy") for name in "ab")
    assert b.dtype == np.float32 and not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.1)


def test_all_stages_are_the_rows_of_python(small, images_dir, tmp_path):
    embed(small, images_dir, tmp_path / "rows.npy", all_stages=True, batch_size=2)
    encoder = open_encoder(small, device="cpu")
    rows, names, _ = encoder.embed(images_dir, all_stages=True, progress=False)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), rows, atol=1e-5)
    batch = torch.stack([encoder.transform(encoder.load_image(images_dir / name)) for name in names])
    np.testing.assert_allclose(rows, extract_features(encoder.model, [batch], all_stages=True), atol=1e-5)
    assert rows.shape == (5, 2 * sum(stage["num_chs"] for stage in encoder.model.feature_info))


def test_a_data_set_of_the_hub(small, images_dir, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    files = [str(images_dir / name) for name in ORDER]
    column = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": column}).save_to_disk(tmp_path / "saved")
    embed(small, images_dir, tmp_path / "folder.npy", batch_size=2)
    embed(small, None, tmp_path / "hfds.npy", dataset=f"hfds/{tmp_path / 'saved'}", split="test", batch_size=2)
    np.testing.assert_array_equal(np.load(tmp_path / "hfds.npy"), np.load(tmp_path / "folder.npy"))


@pytest.fixture
def shards(images_dir, tmp_path):
    """Nineteen images in three shards of WebDataset, one of them damaged, without labels."""
    wds = pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    (tmp_path / "shards").mkdir()
    source, png = DemoSource(19, size=48), tmp_path / "x.png"
    names = []
    for shard, numbers in enumerate([range(8), range(8, 9), range(9, 19)]):
        path = tmp_path / "shards" / f"s-{shard}.tar"
        with wds.TarWriter(str(path)) as writer:
            for i in numbers:
                Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(png)
                content = png.read_bytes()
                writer.write({"__key__": f"{i:03d}", "png": content[:99] if i == 5 else content})
                names.append(f"{path}/{i:03d}.png")
    return tmp_path / "shards", names


def test_a_stream_is_embedded_once_in_its_order(small, shards, tmp_path):
    folder, names = shards
    options = dict(dataset="wds/", split="s-{0..2}.tar", batch_size=4, max_bad_images=0.1)
    for name, workers in (("a", 0), ("b", 3)):
        rows, skipped = embed(small, folder, tmp_path / f"{name}.npy", workers=workers, **options)
        assert rows == 18 and list(skipped) == [5]
    matrix, files, bad = read(tmp_path / "a.npy")
    assert files == [name for i, name in enumerate(names) if i != 5] and list(bad) == [names[5]]
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    (tmp_path / "images").mkdir()
    source = DemoSource(19, size=48)
    for i in range(19):
        Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i:03d}.png")
    (tmp_path / "images" / "005.png").write_bytes(b"")
    embed(small, tmp_path / "images", tmp_path / "c.npy", batch_size=4, max_bad_images=0.1)
    np.testing.assert_array_equal(matrix, np.load(tmp_path / "c.npy"))
    with pytest.raises(ValueError, match="gave 19 images, expected 20"):  # a damaged shard would lose some
        embed(small, folder, tmp_path / "e.npy", num_images=20, **options)
    assert embed(small, folder, tmp_path / "e.npy", num_images=19, resume=True, **options)[0] == 18
    with pytest.raises(ValueError, match="1 of 19 images cannot be decoded"):
        embed(small, folder, tmp_path / "d.npy", **{**options, "max_bad_images": 0.05})


@pytest.fixture
def whole(small, images_dir, tmp_path):
    """What a run that is not interrupted writes."""
    embed(small, images_dir, tmp_path / "whole.npy", batch_size=1)
    return (tmp_path / "whole.npy").read_bytes(), (tmp_path / "whole.npy.csv").read_bytes()


class _Stopped(OSError):
    pass


def stopped_after(monkeypatch, count, *args, **options):
    """A run that ends once it has written so many parts."""
    write = Parts.write

    def stop(self, number, part):
        if len(self.finished()) == count:
            raise _Stopped
        write(self, number, part)

    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        patch.setattr(Parts, "write", stop)
        embed(*args, batch_size=1, **options)


def test_a_run_resumes_where_it_stopped(small, images_dir, whole, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    stopped_after(monkeypatch, 3, small, images_dir, output)
    assert not output.exists() and len(list(tmp_path.glob("out.npy.parts/0*.safetensors"))) == 3
    with pytest.raises(ValueError, match="holds 3 finished parts.*--resume.*--overwrite"):
        embed(small, images_dir, output, batch_size=1)
    for changes, message in (
        (dict(batch_size=2), "another batch_size; batch_size was 1 and is 2"),
        (dict(img_size=40), r"another input_size; input_size was \[3, 32, 32\]"),
        (dict(amp=True), "another amp"),
        (dict(all_stages=True), "another all_stages; all_stages was False and is True"),
        (dict(split="other"), "another split"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(small, images_dir, output, **{"batch_size": 1, "resume": True, **changes})
    seen = []
    compute = extract.compute_rows
    monkeypatch.setattr(extract, "compute_rows", lambda *a: seen.append(1) or compute(*a))
    embed(small, images_dir, output, batch_size=1, resume=True)
    assert len(seen) == 2  # of five
    assert (output.read_bytes(), output.with_name("out.npy.csv").read_bytes()) == whole
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob(".*"))


def test_other_weights_or_images_are_not_resumed(root, images_dir, tmp_path, monkeypatch):
    model, images, output = tmp_path / "model", tmp_path / "images", tmp_path / "out.npy"
    make_encoder(model)
    shutil.copytree(images_dir, images)
    stopped_after(monkeypatch, 3, f"local-dir:{model}", images, output)
    (images / "b.png").rename(images / "bb.png")
    with pytest.raises(ValueError, match="another names"):
        embed(f"local-dir:{model}", images, output, batch_size=1, resume=True)
    (images / "bb.png").rename(images / "b.png")
    weights = {k: v.copy() for k, v in safetensors.numpy.load_file(model / "model.safetensors").items()}
    weights["stem.0.bias"][3] += 1e-3
    safetensors.numpy.save_file(weights, model / "model.safetensors")
    with pytest.raises(ValueError, match="another weights"):
        embed(f"local-dir:{model}", images, output, batch_size=1, resume=True)
    embed(f"local-dir:{model}", images, output, batch_size=1, overwrite=True)
    embed(f"local-dir:{model}", images, tmp_path / "new.npy", batch_size=1)
    assert output.read_bytes() == (tmp_path / "new.npy").read_bytes()


@pytest.mark.parametrize("step", range(1, 5))
def test_cut_off_while_the_output_appears(small, partly_bad, tmp_path, monkeypatch, step):
    """Before, between and after the three files: resumed, it is as if nothing had happened."""
    options = dict(batch_size=1, max_bad_images=0.5)
    embed(small, partly_bad, tmp_path / "whole.npy", **options)
    files = ["whole.npy", "whole.npy.csv", "whole.npy.skipped.csv"]
    expected = [(tmp_path / name).read_bytes() for name in files]
    output = tmp_path / "out.npy"
    output.write_bytes(b"old")
    replace, moves = os.replace, []

    def cut(source, target):
        if Path(target).parent == tmp_path:
            moves.append(target)
            if len(moves) == step:
                raise _Stopped
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(_Stopped):
            embed(small, partly_bad, output, overwrite=True, **options)
    assert output.exists() == (step == 4)  # the rows are the last to appear, and never the old ones beside new names
    rows, skipped = embed(small, partly_bad, output, resume=True, **options)
    assert (rows, len(skipped)) == (4, 2)
    assert [(tmp_path / name.replace("whole", "out")).read_bytes() for name in files] == expected
    assert not list(tmp_path.glob("*.parts"))


def test_bad_images_of_the_run_before_count(small, partly_bad, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    stopped_after(monkeypatch, 3, small, partly_bad, output, max_bad_images=0.2)
    with pytest.raises(ValueError, match="2 of 6 images cannot be decoded"):
        embed(small, partly_bad, output, batch_size=1, max_bad_images=0.2, resume=True)
    assert embed(small, partly_bad, output, batch_size=1, max_bad_images=0.4, resume=True)[0] == 4


def start(options, *, rank=0, size=1, port=0, stdout=None, stderr=None):
    """The command in a process of its own, forked: what takes long is to import torch."""

    def child():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for number, path in ((1, stdout), (2, stderr)):
            if path:
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = main([*map(str, options), "--device", "cpu", "-j", "0"])
        sys.stdout.flush()
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process


def test_killed_and_resumed(small, images_dir, whole, tmp_path, monkeypatch):
    """SIGKILL in the middle of the command itself."""
    output = tmp_path / "out.npy"
    options = ["--model", small, "--data-dir", images_dir, "--output", output, "-b", "1"]
    with monkeypatch.context() as patch:
        compute = extract.compute_rows
        patch.setattr(extract, "compute_rows", lambda *a: (time.sleep(0.2), compute(*a))[1])
        process = start(options)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out.npy.parts/0*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not output.exists()
    assert main([*map(str, options), "-j", "0", "--device", "cpu", "--resume"]) == 0
    assert (output.read_bytes(), output.with_name("out.npy.csv").read_bytes()) == whole


def test_two_processes_do_not_mix_their_rows(small, root, images_dir, whole, tmp_path, monkeypatch, capsys):
    """Two models into one output gave rows of both, with exit status 0."""
    make_encoder(root / "other", depths=(1, 1, 2, 1))
    output = tmp_path / "out.npy"
    options = ["--data-dir", images_dir, "--output", output, "-b", "1", "--overwrite"]
    with monkeypatch.context() as patch:
        compute = extract.compute_rows
        patch.setattr(extract, "compute_rows", lambda *a: (time.sleep(0.2), compute(*a))[1])
        process = start(["--model", small, *options])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.npy.parts/0*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    words = ["--model", f"local-dir:{root / 'other'}", *options, "-j", "0", "--device", "cpu"]
    assert main([*map(str, words)]) == 2
    assert "out.npy.parts is in use by process" in capsys.readouterr().err
    process.join()
    assert (output.read_bytes(), output.with_name("out.npy.csv").read_bytes()) == whole


def test_a_damaged_part_is_computed_again(small, images_dir, whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.npy"
    stopped_after(monkeypatch, 3, small, images_dir, output)
    parts = sorted(tmp_path.glob("out.npy.parts/0*.safetensors"))
    for part, place in zip(parts[:2], (-1, -40), strict=True):  # a bit of the rows
        content = bytearray(part.read_bytes())
        content[place] ^= 1
        part.write_bytes(content)
    embed(small, images_dir, output, batch_size=1, resume=True)
    assert (output.read_bytes(), output.with_name("out.npy.csv").read_bytes()) == whole


def in_processes(tmp_path, size, *options):
    """Statuses, stdout and stderr of the command in several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    running = [start(options, rank=r, size=size, port=port, stdout=out, stderr=err) for r in range(size)]
    for process in running:
        process.join(120)
    texts = [path.read_text() for path in (out, err)]
    out.unlink(), err.unlink()
    return [process.exitcode for process in running], *texts


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_write_what_one_writes(small, images_dir, whole, tmp_path, size):
    output = tmp_path / "out.npy"
    options = ("--model", small, "--data-dir", images_dir, "--output", output, "-b", "1")
    statuses, out, err = in_processes(tmp_path, size, *options)
    assert statuses == [0] * size, err
    assert out.count("5 rows; 0 images skipped") == 1
    assert (output.read_bytes(), output.with_name("out.npy.csv").read_bytes()) == whole
    statuses, out, err = in_processes(tmp_path, size, *options)
    assert statuses == [2] * size and err.count("error:") == 1
    assert f"timm-convnextv2 embed: error: --output '{output}' exists" in err


def test_bad_images_of_all_processes_count(small, partly_bad, tmp_path):
    output = tmp_path / "out.npy"
    options = ("--model", small, "--data-dir", partly_bad, "--output", output, "-b", "1")
    statuses, _, err = in_processes(tmp_path, 2, *options, "--max-bad-images", "0.3")
    assert statuses == [2, 2] and err.count("2 of 6 images cannot be decoded") == 1
    assert not output.exists()
    statuses, _, err = in_processes(tmp_path, 2, *options, "--max-bad-images", "0.4", "--resume")
    assert statuses == [0, 0] and err.count("skipped: ") == 2
    embed(small, partly_bad, tmp_path / "one.npy", batch_size=1, max_bad_images=0.4)
    for end in ("", ".csv", ".skipped.csv"):
        assert (tmp_path / f"out.npy{end}").read_bytes() == (tmp_path / f"one.npy{end}").read_bytes()


def test_two_processes_share_a_stream(small, shards, tmp_path):
    folder, _ = shards
    stream = dict(dataset="wds/", split="s-{0..2}.tar", batch_size=1, max_bad_images=0.1)
    embed(small, folder, tmp_path / "one.npy", **stream)
    statuses, _, err = in_processes(
        tmp_path, 2, "--model", small, "--data-dir", folder, "--output", tmp_path / "two.npy", "-b", "1",
        "--dataset", "wds/", "--split", "s-{0..2}.tar", "--max-bad-images", "0.1",
    )  # fmt: skip
    assert statuses == [0, 0], err
    for end in ("", ".csv", ".skipped.csv"):
        assert (tmp_path / f"one.npy{end}").read_bytes() == (tmp_path / f"two.npy{end}").read_bytes()


def test_embed_from_the_shell(small, partly_bad, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    command = ["--model", small, "--data-dir", str(partly_bad), "--output", str(output), "--workers", "0"]
    command += ["--device", "cpu", "--max-bad-images", "0.5"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(re.escape(f"{output}: 4 rows; 2 images skipped; ") + r"[\d.]+ images/s\n.*\n", out)
    assert out.endswith(f"skipped: {output}.csv, {output}.skipped.csv\n")
    assert err.startswith(f"1 other file ignored: 1 .txt\nskipped: {partly_bad}/b.png: cannot be decoded (")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"timm-convnextv2 embed: error: --output '{output}' exists")
    assert not out and err.count("error") == 1


def test_progress_in_images_per_second(capsys):
    bar = ImageProgress(10, interval=0.0)
    bar.update(4)
    assert re.fullmatch(r"4/10 images  [\d.]+ images/s\n", capsys.readouterr().err)
    ImageProgress(10, enabled=False, interval=0.0).update(4)
    assert capsys.readouterr().err == ""
