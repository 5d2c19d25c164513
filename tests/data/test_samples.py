"""Crops, masks and batches: functions of seed, epoch and index alone."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from drawn import folder_of, run, same
from torch.utils.data import DataLoader

from timm_convnextv2.data import (
    DemoSource,
    EpochBatchSampler,
    FolderSource,
    PretrainDataset,
    PretrainTransform,
    collate,
    sample_seed,
)
from timm_convnextv2.data.samples import dataset as samples_module


@pytest.mark.parametrize(
    "in_chans, dtype", [(3, torch.uint8), (1, torch.uint8), (3, torch.float32), (5, torch.float32)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_transform_shape_and_units(in_chans, dtype, interpolation):
    mean, std = [0.1 * (c + 1) for c in range(in_chans)], [0.5] * in_chans
    transform = PretrainTransform((16, 24), interpolation=interpolation, mean=mean, std=std)
    image = torch.full((in_chans, 40, 30), 51 if dtype == torch.uint8 else 0.2, dtype=dtype)
    x = transform(image)
    assert x.shape == (in_chans, 16, 24) and x.dtype == torch.float32 and x.is_contiguous()
    expected = (0.2 - torch.tensor(mean)) / 0.5
    assert torch.allclose(x, expected[:, None, None].expand_as(x), atol=1e-5)


@pytest.mark.parametrize("option, dim", [("hflip", 2), ("vflip", 1)])
def test_transform_flips(option, dim):
    image = torch.arange(3 * 8 * 8).view(3, 8, 8).float()
    off = dict(scale=(1, 1), ratio=(1, 1), hflip=0.0, vflip=0.0, interpolation="nearest", mean=(0,) * 3, std=(1,) * 3)
    assert torch.equal(PretrainTransform(8, **off)(image), image)
    assert torch.equal(PretrainTransform(8, **{**off, option: 1.0})(image), image.flip(dim))


def test_transform_crops_within_scale():
    # a ramp along x: the range of values shows the width of the crop
    image = torch.linspace(0, 1, 200).expand(1, 200, 200)
    transform = PretrainTransform(
        50, scale=(0.25, 0.25), ratio=(1, 1), interpolation="nearest", mean=(0.0,), std=(1.0,)
    )
    widths = [x.max() - x.min() for x in (transform(image) for _ in range(10))]
    assert all(abs(float(w) - 0.5) < 0.02 for w in widths)
    torch.manual_seed(0)
    first = transform(image)
    torch.manual_seed(0)
    assert torch.equal(first, transform(image)) and not torch.equal(first, transform(image))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(img_size=0), "img_size"),
        (dict(scale=(0.5, 0.2)), "scale.*0.5, 0.2"),
        (dict(scale=(0.0, 1.0)), "scale"),
        (dict(ratio=(2, 1)), "ratio"),
        (dict(hflip=1.5), "hflip.*1.5"),
        (dict(interpolation="random"), "'bilinear', 'bicubic' or 'nearest'.*random"),
        (dict(mean=(0.5,), std=(1, 1)), "same length"),
        (dict(mean=(0.5,), std=(0,)), "positive"),
    ],
)
def test_transform_errors(options, words):
    with pytest.raises(ValueError, match=words):
        PretrainTransform(**{"img_size": 32, **options})


def test_sample_seed_is_fixed_and_well_mixed():
    assert sample_seed(0, 0, 0) == 9169699564768075551 and sample_seed(np.int64(1), 2, 3) == sample_seed(1, 2, 3)
    seeds = {sample_seed(*key) for key in itertools.product(range(10), range(10), range(10))}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({sample_seed(1, 23, 4), sample_seed(12, 3, 4), sample_seed(1, 2, 34)}) == 3
    bits = np.array([[seed >> b & 1 for b in range(63)] for seed in seeds]).mean(0)
    assert np.abs(bits - 0.5).max() < 0.08


def test_samples_do_not_depend_on_workers_or_resume():
    source = DemoSource(14, 48)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = run(source, epoch=3)
    assert torch.equal(torch.get_rng_state(), before)  # the model's own random numbers go on as if nothing happened
    torch.manual_seed(2)
    assert len(expected) == 3
    images, masks, bad = expected[0]
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert masks.shape == (4, 4, 4) and masks.dtype == torch.bool and bad == []
    assert masks.flatten(1).sum(1).tolist() == [10] * 4  # True = removed, 6 of 16 visible
    assert same(run(source, 3, workers=1), expected)
    assert same(run(source, 3, workers=2), expected)
    assert same(run(source, 3, start_batch=2), expected[2:])
    assert run(source, 3, start_batch=3) == []
    for other in (run(source, 4), run(source, 3, seed=1)):
        assert not same(other, expected)


def test_sample_leaves_accelerators_alone(monkeypatch):
    def fail(seed):
        raise AssertionError("reseeds the GPU in the training process")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    PretrainDataset(DemoSource(1, 32), PretrainTransform(32), (2, 2), 0.5)[0, 0]
    with pytest.raises(ValueError, match="mask_ratio"):  # at once, not in a worker
        PretrainDataset(DemoSource(4), PretrainTransform(32), (2, 2), 1.0)


def test_persistent_workers_follow_the_epoch():
    source = DemoSource(8, 32)
    dataset = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.6)
    sampler = EpochBatchSampler(8, 4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=collate, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert same(list(loader), run(source, epoch))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_joint_batch(world_size):
    source = DemoSource(26, 32)
    joint = run(source, 1, batch_size=4 * world_size)
    parts = [run(source, 1, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(joint)} == {26 // (4 * world_size)}
    for b, (images, masks, _) in enumerate(joint):
        for rank, part in enumerate(parts):
            assert torch.equal(part[b][0], images[rank::world_size])
            assert torch.equal(part[b][1], masks[rank::world_size])


def test_sampler_permutes_and_drops_the_incomplete_batch():
    sampler = EpochBatchSampler(23, 5)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 4 and all(len(batch) == 5 for batch in batches)
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch} and all(type(i) is int for _, i in keys)
        epochs.append([i for _, i in keys])
        assert len(set(epochs[-1])) == 20 and set(epochs[-1]) < set(range(23))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    sampler.set_epoch(1, start_batch=3)
    assert len(sampler) == 4 and [i for batch in sampler for _, i in batch] == epochs[1][15:]
    batches = iter(sampler)
    sampler.set_epoch(5)  # must not reach into an epoch that has begun
    assert next(batches)[0][0] == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (dict(num_samples=50, batch_size=64), "64 on 1 process .*50; the largest --batch-size.* 50"),
        (dict(num_samples=50, batch_size=32, world_size=2), "needs 64 images.*largest --batch-size.* 25"),
        (dict(num_samples=1, batch_size=1, world_size=2), "2 processes cannot share 1 image;"),
        (dict(num_samples=9, batch_size=0), "batch_size 0"),
        (dict(num_samples=9, batch_size=1, rank=1), "rank 1"),
    ],
)
def test_sampler_errors(args, words):
    with pytest.raises(ValueError, match=words):
        EpochBatchSampler(**args)
    with pytest.raises(ValueError, match="0..2 .*3"):
        EpochBatchSampler(8, 4).set_epoch(0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_replaced_and_reported(tmp_path, workers):
    good = folder_of(tmp_path / "good", 6)
    bad = folder_of(tmp_path / "bad", 6)
    for i in (1, 2, 5):
        (bad / f"{i:03d}.png").write_bytes(b"junk")
    reported = []
    for images, _, bad_ones in run(FolderSource(bad), batch_size=3, workers=workers):
        assert images.isfinite().all()
        reported += bad_ones
    assert sorted(i for i, _ in reported) == [1, 2, 2, 5]  # 2 again as the first replacement of 1
    assert all(f"{i:03d}.png" in message and "cannot be decoded" in message for i, message in reported)
    # 1 is replaced by 3, and 5 by 0, under their own random numbers
    dataset = PretrainDataset(FolderSource(bad), PretrainTransform(32), (4, 4), 0.6)
    whole = PretrainDataset(FolderSource(good), PretrainTransform(32), (4, 4), 0.6)
    for index, instead in ((1, 3), (5, 0)):
        shutil.copy(good / f"00{instead}.png", good / f"00{index}.png")
        assert all(torch.equal(a, b) for a, b in zip(dataset[2, index][:2], whole[2, index][:2], strict=True))


def test_many_bad_images_in_a_row(tmp_path, monkeypatch):
    """A damaged stretch is passed over and reported whole; --max-bad-images decides about the run. All is too many."""
    folder_of(tmp_path, 42)
    for i in range(40):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    dataset = PretrainDataset(FolderSource(tmp_path), PretrainTransform(32), (4, 4), 0.6)
    assert [i for i, _ in dataset[0, 1][2]] == list(range(1, 40))
    for i in (40, 41):
        (tmp_path / f"{i:03d}.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="(?s)42 images.*000.png.*041.png"):
        dataset[0, 0]
    monkeypatch.setattr(samples_module, "_MAX_BAD_IN_A_ROW", 10)
    with pytest.raises(ValueError, match="(?s)10 images.*000.png.*009.png"):
        dataset[0, 0]
