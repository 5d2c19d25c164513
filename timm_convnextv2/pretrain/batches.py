"""The data of a run, opened and checked before anything is written."""

import signal
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from ..data import (
    EpochBatchSampler,
    InputStatistics,
    PretrainDataset,
    PretrainStream,
    PretrainTransform,
    TimmStream,
    check_readable,
    collate,
    left_out,
)
from .distributed import World

__all__ = ["Batches", "open_batches"]

SHOWN_IMAGES = 6
SHOWN_EPOCH = 2**31 - 1  # crops and masks of the reconstructions: drawn as those of an epoch that never comes

Bad = list[tuple[int, str]]  # index and reason of images that could not be decoded


class Batches(NamedTuple):
    """What the loop needs of the data.

    Attributes:
        loader: Yields `(images [B, C, H, W], masks [B, h, w], bad)`; masks are bool, True = removed.
        set_epoch: Takes the epoch and the batch to start from.
        per_epoch: Batches of an epoch, per process.
        num_images: Images of the data set.
        name_of: Name of an image by its index; None for streams, whose reasons begin with the name.
        shown: The few images and masks that are shown during the run, on the first process.
        inputs: What the network gets, of the images that were tried: the first process's, on all.
    """

    loader: DataLoader
    set_epoch: Callable[[int, int], None]
    per_epoch: int
    num_images: int
    name_of: Callable[[int], str] | None
    shown: list
    inputs: InputStatistics

    def named(self, bad: Bad) -> list[tuple[str, str]]:
        """Names in the place of indices."""
        return [(self.name_of(i) if self.name_of else why.partition(": ")[0], why) for i, why in bad]


def leave_signals_to_parent(_worker: int) -> None:
    """Data workers live on while the training process finishes its update."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_batches(
    create_source: Callable,
    transform: PretrainTransform,
    *,
    grid: tuple[int, int],
    mask_ratio: float,
    batch_size: int,
    seed: int,
    workers: int,
    pin_mem: bool,
    world: World,
) -> Batches:
    """Opens the data and tries a few images.

    Args:
        create_source: Opens the source; called twice for a stream.
        transform: From a decoded image to a crop of the network's size.
        grid: Image size in patches, `(h, w)`.
        mask_ratio: Share of the patches to remove.
        batch_size: Images per batch and process.
        seed: Of the order, crops and masks.
        workers: Data processes per training process.
        pin_mem: Load into pinned memory.
        world: The processes that share the data.

    Raises:
        ValueError: No image can be decoded, or there are fewer images than a batch takes.
    """
    source = create_source()
    if note := left_out(source):
        world.say(note)
    options = dict(
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_mem,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own, or each epoch would draw from the model's
    )
    sampling = (transform, grid, mask_ratio, seed)
    inputs = InputStatistics(transform.img_size[0] // grid[0], transform.mean, transform.std)
    if isinstance(source, TimmStream):
        stream = PretrainStream(source, *sampling)
        source.set_loader_cfg(num_workers=workers)
        loader = DataLoader(stream, batch_size=batch_size, drop_last=True, **options)
        # from a reader of its own: workers would continue with one that has been opened here
        shown = [*islice(PretrainStream(create_source(), *sampling), SHOWN_IMAGES)]
        for image, *_ in shown:
            inputs.add(image)
        per_epoch, images, inputs = len(source) // batch_size, len(source) * world.size, world.share(inputs)
        return Batches(loader, lambda epoch, _: stream.set_epoch(epoch), per_epoch, images, None, shown, inputs)

    def look(image: torch.Tensor) -> None:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers stay
            torch.default_generator.manual_seed(inputs.images)
            inputs.add(transform(image))

    check_readable(source, look=look if world.primary else None)
    inputs = world.share(inputs)
    dataset = PretrainDataset(source, *sampling)
    sampler = EpochBatchSampler(len(source), batch_size, seed, world.rank, world.size)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    count = min(SHOWN_IMAGES, len(source))
    shown = [dataset[SHOWN_EPOCH, i * len(source) // count] for i in range(count)] if world.primary else []
    return Batches(loader, sampler.set_epoch, len(sampler), len(source), source.name, shown, inputs)
