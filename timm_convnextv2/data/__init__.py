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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports the room on first use: commands read their options, in `config`, without torch."""
    return getattr(importlib.import_module(".exports", __name__), name)
