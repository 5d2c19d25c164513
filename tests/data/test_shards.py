"""Streams over processes and workers: each image once an epoch where shards divide, and a note where they do not."""

from collections import Counter

import pytest
from drawn import encoded, no_sleep  # noqa: F401  a fixture
from helpers import write_tar
from PIL import Image
from torch.utils.data import DataLoader

from timm_convnextv2.data import DataSet, PretrainStream, StreamOrder, collate, create_source
from timm_convnextv2.data.sources.stream import shard_note, shards_of

PER_SHARD, BATCH = 4, 2


def write_shards(folder, kind, count):
    """Shards of images whose pixels are their number; name and split of the data set."""
    contents = [(f"{i:03d}.png", encoded(Image.new("RGB", (2, 2), (i, i, i)))) for i in range(count * PER_SHARD)]
    shards = [contents[i : i + PER_SHARD] for i in range(0, len(contents), PER_SHARD)]
    if kind == "wds":
        pytest.importorskip("webdataset", reason="the package webdataset is not installed")
        for number, shard in enumerate(shards):
            write_tar(folder / f"s-{number}.tar", dict(shard))
        return "wds/", f"s-{{0..{count - 1}}}.tar"
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    import pyarrow
    from pyarrow import parquet

    (folder / "set").mkdir()
    for number, shard in enumerate(shards):
        images = [{"bytes": content, "path": name} for name, content in shard]
        parquet.write_table(pyarrow.table({"image": images}), folder / "set" / f"train-{number}-of-{count}.parquet")
    return f"hfids/{folder / 'set'}", "train"


def streams(folder, kind, shards, processes, workers):
    """The stream of each process."""
    name, split = write_shards(folder, kind, shards)
    for rank in range(processes):
        source = create_source(folder, DataSet(name, split, shards * PER_SHARD), order=StreamOrder(BATCH))
        source.reader.dist_rank = source.rank = rank
        source.reader.dist_num_replicas = processes
        source.set_loader_cfg(num_workers=workers)
        yield source


def counted(folder, kind, shards, processes, workers, epochs=2):
    """How often each image comes, by epoch, and the note."""
    seen, notes = [Counter() for _ in range(epochs)], set()
    for source in streams(folder, kind, shards, processes, workers):
        assert shards_of(source) == shards
        notes.add(shard_note(source, workers, processes))
        stream = PretrainStream(source, lambda image: image, (1, 2), 0.5)
        loader = DataLoader(
            stream, BATCH, num_workers=workers, collate_fn=collate, drop_last=True, persistent_workers=workers > 0
        )
        for epoch, count in enumerate(seen):
            stream.set_epoch(epoch, 0, BATCH)
            for images, _, bad in loader:
                assert not bad
                count.update(images[:, 0, 0, 0].tolist())
    (note,) = notes
    return seen, note


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize("shards, processes, workers", [(4, 2, 2), (4, 2, 0), (4, 1, 2), (8, 4, 0)])
def test_each_image_comes_once_an_epoch(tmp_path, kind, shards, processes, workers):
    seen, note = counted(tmp_path, kind, shards, processes, workers)
    for count in seen:
        assert count == Counter(range(shards * PER_SHARD))
    assert note == ""


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_shards_that_do_not_divide(tmp_path, kind):
    """Of 3 shards one worker has two and the other one; each makes 6 images."""
    seen, note = counted(tmp_path, kind, 3, 1, 2)
    for count in seen:
        assert sorted(count.get(i, 0) for i in range(12)) == [0, 0] + [1] * 8 + [2, 2]
    assert note.startswith("3 shards do not divide evenly among 2 data workers (1 processes x 2)")


def test_datasets_lets_every_process_read_all_shards_where_they_do_not_divide(tmp_path):
    seen, note = counted(tmp_path, "hfids", 3, 2, 0)
    for count in seen:
        assert count == Counter(range(12))
    assert note == ""


def test_whole_batches_repeat_a_few(tmp_path):
    (source,) = streams(tmp_path, "wds", 2, 1, 0)
    source.reader.batch_size = 3
    assert shard_note(source, 0, 1) == (
        "An epoch takes 9 images of 8, because each of 1 data workers makes whole batches: 1 is repeated."
    )
