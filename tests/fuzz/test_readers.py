"""Every reader of files that others may have made, given damaged ones: a result, or one documented error.

One table: what a reader reads, as the real writer writes it; how it is read; the errors it documents. Seeded; -m slow
has thousands of mutations.
"""

import contextlib
import csv
import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dicom_files import draw
from helpers import RECIPES, assert_same, write_tar
from mutations import ODD, damage_bytes, damage_content, within
from PIL import Image
from safetensors.torch import save_file
from zarr_files import new_array

from timm_convnextv2.checkpoint import CheckpointError, load_checkpoint
from timm_convnextv2.config import build, read_yaml
from timm_convnextv2.data import DemoSource, ImageError, ImagePaths, MissingPackageError, create_source, load_image
from timm_convnextv2.data.formats.decode import read_header
from timm_convnextv2.data.paths.find import find_files
from timm_convnextv2.data.paths.lists import read_list
from timm_convnextv2.features.compare import MADE_WITH, _finished
from timm_convnextv2.finetune.config import RECIPES as FOLDER
from timm_convnextv2.pretraining.config import PretrainConfig
from timm_convnextv2.recipes import load_recipe
from timm_convnextv2.report.classes import FILE as CLASSES
from timm_convnextv2.report.classes import ClassResult, ClassResults, write_classes
from timm_convnextv2.report.classes import read_classes as read_results
from timm_convnextv2.report.html import write_report
from timm_convnextv2.runs.group import Processes
from timm_convnextv2.transfer.detection.coco import DetectionImages, open_coco
from timm_convnextv2.transfer.segmentation.masks import load_mask, read_classes

OF_CLASSES = [ClassResult("a", 3, 0.5, "b (10 %)", [1.0, 0.5]), ClassResult("b", 0, None)]
RESULTS = ClassResults("IoU", "pixels", OF_CLASSES, [[2, 1], [0, 0]])
IMAGE_ERRORS = (ImageError, MissingPackageError)
PIXELS = DemoSource(1, 32)[0].permute(1, 2, 0).numpy()


class Reader(NamedTuple):
    """`make(folder)` writes files; `read(folder)` reads them. `damaged`: the files that are mutated (a pattern)."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (ValueError,)
    damaged: str = "x*"
    count: int = 200
    structured: bool = False  # values of JSON are mutated as well


def image(name: str, write: Callable[[Path], Any], count: int = 200, damaged: str = "x*") -> Reader:
    def read(folder: Path) -> None:
        path = folder / name
        with contextlib.suppress(*IMAGE_ERRORS):
            read_header(path)
        assert load_image(path, 3).shape[0] == 3

    return Reader(lambda folder: write(folder / name), read, IMAGE_ERRORS, damaged, count)


def pil(name: str, **how: Any) -> Reader:
    return image(name, lambda path: Image.fromarray(PIXELS).save(path, **how))


def tiff(name: str, **how: Any) -> Reader:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    return image(name, lambda path: tifffile.imwrite(path, PIXELS, **how))


def zarr(version: int) -> Reader:
    def write(path: Path) -> None:
        new_array(path, version, shape=PIXELS.shape, chunks=(16, 16, 3), dtype="u1")[...] = PIXELS

    return image("x.zarr", write, 50, "x.zarr/**/*")


def coco(folder: Path) -> None:
    for name in "ab":
        Image.fromarray(PIXELS).save(folder / f"{name}.png")
    square, runs = [[2, 1, 4, 1, 4, 4, 2, 4]], dict(size=[32, 32], counts=[17, 3, 29, 3, 972])
    box = dict(category_id=7, bbox=[2, 1, 2, 3])
    found = [dict(box, id=1, image_id=5, segmentation=square), dict(box, id=2, image_id=9, segmentation=runs, area=7)]
    images = [dict(id=i, file_name=f"{n}.png", height=32, width=32) for i, n in ((5, "a"), (9, "b"))]
    categories = [dict(id=7, name="cat"), dict(id=3, name="ant")]
    (folder / "x.json").write_text(json.dumps(dict(images=images, annotations=found, categories=categories)))


def read_coco(folder: Path) -> None:
    opened = open_coco(folder / "x.json", folder, drop_wrong=True)
    for one in opened.images:
        target = DetectionImages(opened).target(one)
        assert len(target["masks"]) == len(target["labels"]) and torch.isfinite(target["boxes"]).all()


def names(folder: Path) -> list[str]:
    return [f"{folder}/{name}.png" for name in ("a", "b", "caf\u00e9", "a b")]


def write_csv(folder: Path) -> None:
    with open(folder / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "weight"), *((name, 2.5) for name in names(folder))])


def write_parquet(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"path": names(folder), "weight": [1.0, 2.0, 3.0, 4.0]}), folder / "x.parquet")


def listed(name: str) -> Callable[[Path], Any]:
    return lambda folder: len(read_list(str(folder / name))[0])


def index(folder: Path) -> None:
    """Of images that stay where they are; only the index is damaged."""
    for name in "ab":
        Image.fromarray(PIXELS).save(folder / f"{name}.png")
    find_index(folder)


def find_index(folder: Path) -> None:
    """Whatever changes, the checksum tells."""
    paths = ImagePaths((str(folder),), None, str(folder / "x.index"))
    find_files(paths, "", 1.0, Processes())


def tar(folder: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(PIXELS).save(data, format="png")
    write_tar(folder / "x.tar", {f"{name}.png": data.getvalue() for name in ("a", "d/b", "../c")})


def read_tar(folder: Path) -> None:
    source = create_source(str(folder / "x.tar"), in_chans=3)
    for i in range(len(source)):
        with contextlib.suppress(*IMAGE_ERRORS):
            source[i]


def report(folder: Path, run: Path) -> None:
    for name in ("args.yaml", "summary.csv", "collapse.csv", "probe.json"):
        shutil.copy(run / name, folder / name)


def checkpoint(**how: Any) -> Callable[[Path], None]:
    content = {"state_dict": {"w": torch.arange(300.0)}, "epoch": 3, "arch": "x", "args": {"lr": [0.1, None, "a"]}}
    return lambda folder: torch.save(content, folder / "x.pth.tar", **how)


def read_checkpoint(folder: Path) -> None:
    """Checksums tell: what is read is what was saved."""
    assert_same(load_checkpoint(folder / "x.pth.tar")["state_dict"], {"w": torch.arange(300.0)})


def config_of(folder: Path) -> None:
    (folder / "x.yaml").write_text("epochs: 10\nlr: 1e-3\nmean: [0.1, auto, 0.2]\nmodel-kwargs: {depths: [1, 2]}\n")


def made_with(folder: Path) -> None:
    (folder / MADE_WITH).write_text(json.dumps({"options": ["--lr", "1"], "epochs": 3, "weights": "ab"}, indent=1))


def read_made_with(folder: Path) -> None:
    found = _finished(folder)
    assert found is None or isinstance(found, dict)


READERS: dict[str, Callable[[], Reader]] = {
    "png": lambda: pil("x.png"),
    "png interlaced": lambda: image("x.png", lambda p: Image.fromarray(PIXELS[:, :, 0]).save(p, bits=4)),
    "jpeg": lambda: pil("x.jpg", progressive=True),
    "gif": lambda: pil("x.gif"),
    "bmp": lambda: pil("x.bmp"),
    "ppm": lambda: pil("x.ppm"),
    "webp": lambda: pil("x.webp"),
    "jpeg 2000": lambda: pil("x.jp2"),
    "tga": lambda: pil("x.tga"),
    "tiff": lambda: tiff("x.tif"),
    "tiff in tiles": lambda: tiff("x.tif", tile=(16, 16), compression="zlib", predictor=True),
    "npy": lambda: image("x.npy", lambda p: np.save(p, PIXELS)),
    "dicom": lambda: image("x.dcm", lambda p: draw(p, PIXELS[:, :, 0].astype(np.uint16))),
    "zarr 2": lambda: zarr(2),
    "zarr 3": lambda: zarr(3),
    "mask": lambda: Reader(
        lambda f: Image.fromarray(PIXELS[:, :, 0] // 64).save(f / "x.png"), lambda f: load_mask(f / "x.png")),
    "classes": lambda: Reader(
        lambda f: (f / "x.txt").write_text("sea 1 2 3\nland 4 5 6\n"), lambda f: read_classes(f / "x.txt")),
    "coco": lambda: Reader(coco, read_coco, structured=True),
    "list of names": lambda: Reader(
        lambda f: (f / "x.txt").write_text("\n".join(names(f))), listed("x.txt")),
    "list in csv": lambda: Reader(write_csv, listed("x.csv")),
    "list in parquet": lambda: Reader(write_parquet, listed("x.parquet")),
    "index": lambda: Reader(index, find_index),
    "tar": lambda: Reader(tar, read_tar, (*IMAGE_ERRORS, ValueError), count=100),
    "checkpoint": lambda: Reader(checkpoint(), read_checkpoint, (CheckpointError,)),
    "checkpoint of torch < 1.6": lambda: Reader(
        checkpoint(_use_new_zipfile_serialization=False), lambda f: load_checkpoint(f / "x.pth.tar"),
        (CheckpointError,)),
    "safetensors": lambda: Reader(
        lambda f: save_file({"a": torch.ones(3, 4), "b": torch.zeros(2)}, f / "x.safetensors"),
        lambda f: load_checkpoint(f / "x.safetensors"), (CheckpointError,)),
    "recipe": lambda: Reader(
        lambda f: shutil.copy(RECIPES / "smoke.yaml", f / "x.yaml"), lambda f: load_recipe(str(f / "x.yaml"), FOLDER),
        count=50),
    "config": lambda: Reader(config_of, lambda f: build(PretrainConfig, read_yaml(PretrainConfig, f / "x.yaml"))),
    "compare.json": lambda: Reader(made_with, read_made_with, (), damaged=MADE_WITH, structured=True),
    "classes.json": lambda: Reader(
        lambda f: write_classes(f, RESULTS), read_results, damaged=CLASSES, structured=True, count=100),
}  # fmt: skip


def attack(reader: Reader, whole: Path, work: Path, count: int) -> int:
    """Reads one damaged copy after another in `work`, which holds a whole one; the number of refusals.

    Anything but a result or a documented error fails.
    """
    refused, paths = 0, sorted(path for path in whole.glob(reader.damaged) if path.is_file())
    for seed in range(count):
        rng = random.Random(seed)
        path = rng.choice(paths)
        target, data = work / path.relative_to(whole), path.read_bytes()
        if reader.structured and seed % 4:
            changed, what = damage_content(json.loads(data), rng, odd=(*ODD, 10**400, "../a.png", "/etc/passwd", "\0"))
            damaged = json.dumps(changed).encode()
        else:
            damaged, what = damage_bytes(data, rng), "bytes"
        if damaged == data:
            continue
        target.write_bytes(damaged)
        what = f"{seed}, {path.name}, {what}"
        try:
            with within(20), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(work)
        except reader.errors as e:
            refused += 1
            assert str(e), what
        except Exception as e:
            raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
        target.write_bytes(data)
    return refused


TIMES = [1, pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(tmp_path, name, times):
    reader = READERS[name]()
    whole, work = tmp_path / "whole", tmp_path / "work"
    work.mkdir()
    reader.make(work)
    reader.read(work)  # the whole one passes
    shutil.copytree(work, whole)
    refused = attack(reader, whole, work, reader.count * times)
    assert refused or not reader.errors


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("damaged", ["args.yaml", "summary.csv", "collapse.csv", "probe.json"])
def test_damaged_runs_are_reported_or_refused(tmp_path, pretrained, damaged, times):
    whole, work = tmp_path / "whole", tmp_path / "work"
    for folder in (whole, work):
        folder.mkdir()
        report(folder, pretrained[0])
    reader = Reader(
        lambda folder: None, lambda folder: write_report([folder], folder / "r.html"), damaged=damaged, count=30,
        structured=damaged.endswith(".json"),
    )  # fmt: skip
    reader.read(work)
    attack(reader, whole, work, reader.count * times)


@pytest.mark.parametrize("hostile", ["[" * 100_000, "9" * 5000, '{"a":' * 100_000, "\0", "x" * 200_000, "{" * 5000])
@pytest.mark.parametrize("name", ["coco", "list in csv", "config", "recipe", "compare.json", "classes.json", "classes"])
def test_hostile_text(tmp_path, name, hostile):
    """Brackets without end, numbers without end, no text at all."""
    reader = READERS[name]()
    reader.make(tmp_path)
    for path in tmp_path.glob(reader.damaged):
        path.write_text(hostile)
    with within(20), contextlib.suppress(*reader.errors):
        reader.read(tmp_path)


@pytest.mark.parametrize("hostile", ["[" * 100_000, "9" * 5000, "\0", "epoch,lr\n0," + "x" * 200_000 + "\n"])
@pytest.mark.parametrize("name", ["args.yaml", "summary.csv", "probe.json"])
def test_hostile_runs(tmp_path, pretrained, name, hostile):
    report(tmp_path, pretrained[0])
    (tmp_path / name).write_text(hostile)
    with within(20), contextlib.suppress(ValueError):
        write_report([tmp_path], tmp_path / "r.html")
