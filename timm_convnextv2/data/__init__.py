"""Images: formats, where files are, sources, samples, measurements.

A *source* is map-style and yields decoded images, `source[i] -> Tensor [C, H, W]`: uint8 in 0..255, or float32 that is
already scaled (16-bit images to [0, 1], floats as stored). `source.name(i)` identifies the image. `PretrainDataset`
turns a source into `(image, mask)` samples whose random numbers depend on (seed, epoch, index) only, so that a run does
not change with the number of loader workers, with the number of processes at the same global batch, or by being resumed
within an epoch:

    source = create_source("images")
    check_readable(source)
    dataset = PretrainDataset(source, PretrainTransform(224), grid=(7, 7), mask_ratio=0.6)
    sampler = EpochBatchSampler(len(dataset), batch_size=64)
    # without a generator of its own, the loader would draw a number from the model's for every epoch
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=8, collate_fn=collate, persistent_workers=True,
                        generator=torch.Generator())
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, masks, bad in loader:
            ...

Streams (`wds/`, `hfids/`, `tfds/`) have no index: see `TimmStream` and `PretrainStream`.
"""

from ..seeds import sample_seed
from .config import DataSet, ImagePaths, PixelOptions, WindowOptions
from .demo import DemoSource
from .formats.decode import image_extensions, load_image
from .formats.errors import ImageError, MissingPackageError
from .formats.pixels import Pixels
from .samples.dataset import PretrainDataset, PretrainStream, collate
from .samples.order import EpochBatchSampler
from .samples.statistics import InputStatistics
from .samples.transform import PretrainTransform
from .sources.files import FolderSource, ImageFiles, PageSource
from .sources.open import check_readable, create_source, pages_and_windows
from .sources.picked import JoinedSource, Subset, hold_out
from .sources.source import Bad, Source
from .sources.stream import StreamOrder, TimmStream
from .sources.timm import TimmSource
from .sources.windows import WindowSource

__all__ = [
    "Bad",
    "DataSet",
    "DemoSource",
    "EpochBatchSampler",
    "FolderSource",
    "ImageError",
    "ImageFiles",
    "ImagePaths",
    "InputStatistics",
    "JoinedSource",
    "MissingPackageError",
    "PageSource",
    "PixelOptions",
    "Pixels",
    "PretrainDataset",
    "PretrainStream",
    "PretrainTransform",
    "Source",
    "StreamOrder",
    "Subset",
    "TimmSource",
    "TimmStream",
    "WindowOptions",
    "WindowSource",
    "check_readable",
    "collate",
    "create_source",
    "hold_out",
    "image_extensions",
    "load_image",
    "pages_and_windows",
    "sample_seed",
]
