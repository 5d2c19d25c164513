"""Images, and loaders over them, that several tests of data share."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_convnextv2.data import (
    DemoSource,
    EpochBatchSampler,
    PretrainDataset,
    PretrainTransform,
    Source,
    collate,
)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` waits for five seconds at the end of each pass, for threads of readers that are not used here."""
    if find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


class Numbers(Source):
    """A source whose image is its number."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __len__(self):
        return self.count

    def read(self, i, choose=None, seed=None):
        return i

    def name(self, i):
        return f"image {i}"


# an image whose corners differ, so that a rotation or a swapped axis shows
RGB = np.zeros((6, 8, 3), np.uint8)
RGB[:3, :4], RGB[:3, 4:], RGB[3:, :4], RGB[3:, 4:] = (250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 40)


def noise(seed=0, size=(24, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(path, n, suffix="png"):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise(i).save(path / f"{i:03d}.{suffix}")
    return path


def hwc(x):
    return x.permute(1, 2, 0).numpy()


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def run(source, epoch=0, workers=0, start_batch=0, seed=0, batch_size=4, rank=0, world_size=1):
    """Batches of one epoch as a list of (images, masks, bad)."""
    dataset = PretrainDataset(source, PretrainTransform(32), (4, 4), 0.6, seed)
    sampler = EpochBatchSampler(len(dataset), batch_size, seed, rank, world_size)
    sampler.set_epoch(epoch, start_batch)
    options = dict(num_workers=workers, collate_fn=collate, generator=torch.Generator())
    return list(DataLoader(dataset, batch_sampler=sampler, **options))


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in pairs)


PLAIN = dict(mean=(0,) * 3, std=(1,) * 3)  # results in [0, 1]


def photograph(height, width, seed=0):
    """Objects under texture whose amplitude falls with frequency, as in photographs."""
    side = -(-max(height, width) // 50) * 50  # quick to transform
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side), np.float32)) / frequency, s=(side, side))
    rgb = DemoSource(8, side, objects=True)[seed % 8].permute(1, 2, 0).numpy() + 25 * texture[..., None] / texture.std()
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)[:height, :width])


def encoded(x, kind="png", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    (x if isinstance(x, Image.Image) else Image.fromarray(x)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_numbered(folder, *names):
    """Images whose pixels are ten times the number in their name, and one more below `c`; other files are empty."""
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("L", (4, 4), 10 * int(path.stem) + (path.parent.name == "c")).save(path)
        else:
            path.touch()
