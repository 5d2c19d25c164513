"""Images for masked pretraining: sources, the transform, and what makes a run repeatable.

A *source* is map-style and yields decoded pictures, `source[i] -> Tensor [C, H, W]`: uint8 in 0..255, or float32 that
is already scaled (16-bit pictures to [0, 1], floats as stored). `source.name(i)` says where the picture came from.
`PretrainDataset` turns a source into `(image, mask)` samples of which everything random depends on (seed, epoch,
index) alone, so that a run does not change with the number of loader workers, with the number of processes at the
same global batch, or by being resumed in the middle of an epoch:

    source = create_source(data_dir="pictures")
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
from .formats.decode import image_extensions, load_image
from .formats.errors import ImageError, MissingPackageError
from .formats.pixels import Pixels
from .samples.dataset import PretrainDataset, PretrainStream, collate
from .samples.order import EpochBatchSampler
from .samples.statistics import InputStatistics
from .samples.transform import PretrainTransform
from .sources.embedded import EmbeddedSource
from .sources.folder import FolderSource, left_out
from .sources.joined import JoinedSource
from .sources.open import check_readable, create_source
from .sources.pages import PageSource
from .sources.parts import Part, hold_out
from .sources.stream import TimmStream
from .sources.timm import TimmSource
from .sources.windows import Windows, WindowSource

__all__ = [
    "EmbeddedSource",
    "EpochBatchSampler",
    "FolderSource",
    "ImageError",
    "InputStatistics",
    "JoinedSource",
    "MissingPackageError",
    "PageSource",
    "Part",
    "Pixels",
    "PretrainDataset",
    "PretrainStream",
    "PretrainTransform",
    "TimmSource",
    "TimmStream",
    "WindowSource",
    "Windows",
    "check_readable",
    "collate",
    "create_source",
    "hold_out",
    "image_extensions",
    "left_out",
    "load_image",
    "sample_seed",
]
