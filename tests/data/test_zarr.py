"""Zarr: stores of several images, and stores that may do harm."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from zarr_files import add_array, new_array, new_group

from timm_convnextv2.data import FolderSource, ImageError, Pixels, load_image
from timm_convnextv2.data.formats.decode import open_scene

zarr = pytest.importorskip("zarr", reason="the package zarr is not installed")
import numcodecs  # noqa: E402
from numcodecs import pickles  # noqa: E402
from numcodecs.abc import Codec  # noqa: E402

FIELDS = {"A/1": ["0", "1"], "B/2": ["0"]}


def image(path, value, version=2):
    """An OME-Zarr image of one value."""
    group = new_group(path, version)
    add_array(group, "0", shape=(8, 9), chunks=(4, 4), dtype="u1")[...] = value
    describe(group, {"multiscales": [{"version": "0.4", "axes": [*"yx"], "datasets": [{"path": "0"}]}]}, version)


def describe(group, attributes, version):
    group.attrs.update(attributes if version == 2 else {"ome": {"version": "0.5", **attributes}})


def series(path, version):
    describe(new_group(path, version), {"bioformats2raw.layout": 3}, version)
    for i in range(4):
        image(path / str(i), i, version)
    return [str(i) for i in range(4)]


def plate(path, version):
    group = new_group(path, version)
    describe(group, {"plate": {"wells": [{"path": well} for well in FIELDS]}}, version)
    for i, (well, fields) in enumerate(FIELDS.items()):
        described = new_group(path / well, version)
        describe(described, {"well": {"images": [{"path": field} for field in fields]}}, version)
        for field in fields:
            image(path / well / field, 10 * i + int(field), version)
    return ["A/1/0", "A/1/1", "B/2/0"]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("write", [series, plate])
def test_each_series_and_field_is_an_image(tmp_path, write, version):
    names = write(tmp_path / "x.zarr", version)
    image(tmp_path / "y.zarr", 7, version)
    source = FolderSource(tmp_path, 1)
    assert [source.row_name(i) for i in range(len(source))] == [*(f"x.zarr/{name}" for name in names), "y.zarr"]
    values = [source[i].unique().tolist() for i in range(len(source))]
    assert values == [[v] for v in ([0, 1, 2, 3, 7] if write is series else [0, 1, 10, 7])]
    inside = FolderSource(tmp_path / "x.zarr", 1)
    assert [inside.row_name(i) for i in range(len(inside))] == names and torch.equal(inside[1], source[1])
    with pytest.raises(ImageError, match=f"{len(names)} images .{names[0]}"):
        load_image(tmp_path / "x.zarr", 1)


def test_a_store_is_an_image_and_not_its_chunks(tmp_path):
    image(tmp_path / "x.zarr", 5)
    source = FolderSource(tmp_path / "x.zarr", 1)
    assert len(source) == 1 and source[0].unique().tolist() == [5] and str(source.left) == ""


def test_paths_out_of_the_store_are_never_followed(tmp_path):
    image(tmp_path / "secret.zarr", 5)
    group = new_group(tmp_path / "data" / "x.zarr")
    group.attrs.update({"plate": {"wells": [{"path": "../.."}]}, "well": {"images": [{"path": "secret.zarr"}]}})
    (tmp_path / ".zattrs").write_text(json.dumps({"well": {"images": [{"path": "secret.zarr"}]}}))
    source = FolderSource(tmp_path / "data", 1)
    assert [source.row_name(i) for i in range(len(source))] == ["x.zarr"]
    with pytest.raises(ImageError, match="x.zarr"):
        source[0]


class Runs(Codec):
    """Runs code when it decodes."""

    codec_id = "runs"

    def encode(self, buf):
        return buf

    def decode(self, buf, out=None):
        Path(os.environ["HARMED"]).touch()
        return buf


@pytest.mark.parametrize("codec", ["pickle", "runs"])
@pytest.mark.parametrize("key", ["compressor", "filters"])
def test_codecs_that_run_code_are_refused(tmp_path, monkeypatch, key, codec):
    monkeypatch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as versions before 0.16 do
    monkeypatch.setenv("HARMED", str(tmp_path / "harmed"))
    monkeypatch.setitem(numcodecs.registry.codec_registry, "runs", Runs)
    new_array(tmp_path / "x.zarr", shape=(8, 8), chunks=(8, 8), dtype="u1")
    about = json.loads((tmp_path / "x.zarr/.zarray").read_text())
    about |= {"compressor": None, "filters": None} | {key: {"id": codec} if key == "compressor" else [{"id": codec}]}
    (tmp_path / "x.zarr/.zarray").write_text(json.dumps(about))
    (tmp_path / "x.zarr/0.0").write_bytes(pickle.dumps(8 * b"12345678"))
    opened = []
    monkeypatch.setattr(zarr, "open", opened.append)  # zarr 2 decodes the fill value when it opens
    for read in (lambda path: load_image(path, 1), lambda path: open_scene(str(path), 1, Pixels())):
        with pytest.raises(ImageError, match=f"x.zarr.*codec {codec}"):
            read(tmp_path / "x.zarr")
    assert not opened and not (tmp_path / "harmed").exists()
