"""Images with the same bytes on both sides of a split are counted and told, by every command that splits."""

import pytest
from drawn import noise

from timm_convnextv2.commands.pretrain import main as pretrain
from timm_convnextv2.data import FolderSource, WindowOptions, hold_out
from timm_convnextv2.data.measure.duplicates import files_of, shared_images, shared_note
from timm_convnextv2.data.sources.windows import WindowSource


@pytest.fixture
def images(tmp_path):
    """Eight images, of which the last two have the bytes of the first."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        noise(0 if i > 5 else i, (32, 32)).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def test_files_with_the_same_bytes(images):
    paths = [str(images / f"{i}.png") for i in range(8)]
    assert shared_images(paths[:4], paths[4:]) == {paths[6]: paths[0], paths[7]: paths[0]}
    assert shared_images(paths[6:], paths[:6]) == {paths[0]: paths[6]}
    note = shared_note(paths[:4], [*paths[4:], "gone.png"], "held-out")
    assert note.startswith("2 held-out images have the same bytes as a training image (5 compared with 4): ")
    assert f"{paths[6]} = {paths[0]}" in note and "7.png" in note
    assert shared_note(paths[1:4], paths[4:], "held-out") == "" == shared_note([], paths, "held-out")


def test_files_of_every_kind_of_source(images, monkeypatch):
    source = FolderSource(images)
    paths = [source.path(i) for i in range(8)]
    for parts in (hold_out(source, 0.25, 0), hold_out(WindowSource(source, WindowOptions(16)), 0.25, 0)):
        files = [files_of(part) for part in parts]
        assert [len(part) for part in files] == [6, 2] and sorted(sum(files, [])) == paths
    monkeypatch.setattr("timm_convnextv2.data.measure.duplicates._MOST", 3)
    assert files_of(source) == [paths[0], paths[3], paths[6]]


def test_pretraining_counts_them(images, capsys):
    words = "--img-size 32 --patch-size 1 --batch-size 2 --epochs 1 --workers 0 --device cpu --dry-run".split()
    words += ["--model-kwargs", "depths=(1,1,1,1)", "dims=(8,12,16,20)", "--decoder-dim", "8"]
    for path in images.glob("[1-5].png"):  # one image in three copies
        path.unlink()
    assert pretrain([*words, "--data-dir", str(images), "--holdout", "0.3"]) == 0
    assert "warning: 1 held-out image has the same bytes as a training image" in capsys.readouterr().err
