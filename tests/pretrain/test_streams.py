"""Streamed data sets: a run that is resumed sees the images that it would have seen without the stop."""

import io
import signal
from importlib.util import find_spec

import pytest
import torch
from helpers import assert_same, write_tar
from PIL import Image
from runs import SMALL, at_update, load, steady

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.data import DataSet, PretrainTransform, StreamOrder, create_source
from timm_convnextv2.pretraining.batches import Sampling, open_batches
from timm_convnextv2.pretraining.config import Loading
from timm_convnextv2.runs.group import Processes


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch):
    """`datasets` waits for five seconds at the end of each pass, for threads of readers that are not used here."""
    if find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


NUM_IMAGES, BATCH, IN_EPOCH = 24, 2, 12
BAD = {0, 5, 13}  # cannot be decoded


def shards(folder, kind):
    """Two shards of small images that are all different; some are broken. Returns the name of the data set."""
    contents = []
    for i in range(NUM_IMAGES):
        buffer = io.BytesIO()
        image = Image.linear_gradient("L").resize((40, 40)).rotate(15 * i)  # all different, and none blank
        image.convert("RGB").save(buffer, "png")
        contents.append(b"junk" if i in BAD else buffer.getvalue())
    if kind == "wds":
        pytest.importorskip("webdataset", reason="the package webdataset is not installed")
        for shard in range(2):
            write_tar(folder / f"s-{shard}.tar", {f"{i:02d}.png": contents[i] for i in range(shard, NUM_IMAGES, 2)})
        return "wds/"
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    import pyarrow
    from pyarrow import parquet

    (folder / "set").mkdir()
    for shard in range(2):
        images = [{"bytes": contents[i], "path": f"{i:02d}.png"} for i in range(shard, NUM_IMAGES, 2)]
        parquet.write_table(pyarrow.table({"image": images}), folder / "set" / f"train-{shard}-of-2.parquet")
    return f"hfids/{folder / 'set'}"


def batches_of(folder, name, workers):
    def source():
        split = "s-{0..1}.tar" if name == "wds/" else "train"
        return create_source(folder, DataSet(name, split, NUM_IMAGES), order=StreamOrder(BATCH, 3))

    sampling = Sampling(PretrainTransform(16), (2, 2), 0.5, seed=3)
    loading = Loading(workers=workers)
    return open_batches(source, sampling, batch_size=BATCH, loading=loading, world=Processes())


def seen(batches, epoch, start):
    """Images, masks and names of the broken ones, whose reasons hold an address in memory."""
    return [
        (images, masks, [(position, why.partition(": ")[0]) for position, why in bad])
        for images, masks, bad in batches.iterate(epoch, start)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_epoch_from_its_middle(tmp_path, kind, workers):
    name = shards(tmp_path, kind)
    batches = batches_of(tmp_path, name, workers)
    assert batches.per_epoch == IN_EPOCH
    epochs = [seen(batches, epoch, 0) for epoch in range(2)]
    assert all(len(epoch) == IN_EPOCH for epoch in epochs)
    assert not torch.equal(torch.cat([b[0] for b in epochs[0]]), torch.cat([b[0] for b in epochs[1]]))
    reported = {name for epoch in epochs for _, _, bad in epoch for _, name in bad}
    assert len(reported) == len(BAD)
    for start in (1, 4, 7, IN_EPOCH - 1):
        again = batches_of(tmp_path, name, workers)  # as a new process has it
        assert_same(seen(again, 1, start), epochs[1][start:])
        if start == 7:
            assert_same(seen(again, 0, 0), epochs[0])  # the next epoch begins at its beginning


@pytest.mark.parametrize("kind, workers", [("wds", "2"), ("hfids", "0")])
def test_stopped_run_ends_as_an_uninterrupted_one(tmp_path, no_images, monkeypatch, capsys, kind, workers):
    name = shards(tmp_path, kind)
    line = ["--dataset", name, "--data-dir", str(tmp_path), "--num-images", str(NUM_IMAGES), "--device", "cpu"]
    line += ["--split", "s-{0..1}.tar"] if kind == "wds" else []
    line += [*SMALL, *f"--img-size 32 --patch-size 1 --batch-size {BATCH} --epochs 2 --lr 1e-2".split()]
    line += ["--max-bad-images", "1", "--output", str(tmp_path / "out"), "--workers", workers]
    assert main([*line, "--experiment", "whole"]) == 0
    for stop in (2, 11, 99):  # in the first epoch, and in the second
        with monkeypatch.context() as patch:
            at_update(patch, stop, lambda: signal.raise_signal(signal.SIGUSR1))
            assert main([*line, "--experiment", "r", "--resume", "auto"]) == 0
        if stop == 2:  # other workers read in another order
            assert main([*line, "--experiment", "r", "--resume", "auto", "--workers", "1"]) == 2
            assert f"stream_workers: {workers} there, 1 here" in capsys.readouterr().err
    here, there = load(tmp_path / "out/r"), load(tmp_path / "out/whole")
    assert_same(here["state_dict"], there["state_dict"])
    for state in (here, there):
        state["progress"]["bad_images"] = set(state["progress"]["bad_images"])
    assert here["progress"] == there["progress"] and here["progress"]["stream_workers"] == int(workers)
    assert steady(tmp_path / "out/r") == steady(tmp_path / "out/whole")


def test_a_reader_that_cannot_repeat_an_epoch_is_refused_in_its_middle(tmp_path):
    batches = batches_of(tmp_path, shards(tmp_path, "wds"), 0)
    batches.loader.dataset.source.repeatable = False  # as TensorFlow's reader
    batches.set_epoch(1, 0)
    with pytest.raises(ValueError, match="cannot repeat an epoch.*milestone"):
        batches.iterate(1, 5)
