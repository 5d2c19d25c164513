"""Whole images as a trained model takes them, in batches that depend on the data set and the batch size only."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..formats.errors import ImageError, MissingPackageError
from ..sources.source import Source
from ..sources.stream import TimmStream


class Item(NamedTuple):
    """An image of the data set."""

    index: int
    name: str  # of its row
    image: torch.Tensor | None  # float32 [C, H, W], normalised; None if it cannot be decoded
    error: Exception | None = None


class Batch(NamedTuple):
    """A batch of the data set."""

    number: int  # its images start at index `number * batch_size`
    count: int  # of images
    items: list[Item] | None  # None if another process computes this batch, or an earlier run did


def preprocessing(config: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The evaluation transform of a model: decoded images, uint8 or float `[C, h, w]`, to float32 `[C, H, W]`.

    `config` comes from timm's `resolve_model_data_config`.
    """
    # timm's resizing and cropping on tensors, which may be 16-bit or have many channels; scaling follows
    geometry = {k: config[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    resize: Any = create_transform(**geometry, normalize=False)
    return v2.Compose([resize, *scale])


class _Loads(Dataset):
    """`load(i)` by index."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self.load = load

    def __getitem__(self, i: int) -> Any:
        return self.load(i)


def load_batches(load: Callable[[int], Any], batches: Sequence[Sequence[int]], workers: int) -> Iterator[list]:
    """`load(i)` for the indices of each batch, called by `workers` processes (0: this one)."""
    options: Any = dict(batch_sampler=batches, num_workers=workers, collate_fn=list, generator=torch.Generator())
    return iter(DataLoader(_Loads(load), **options))


def _item(load: Callable[[], Any], transform: Callable, index: int, name: str) -> Item:
    try:
        return Item(index, name, transform(load()))
    except (ImageError, MissingPackageError, OSError) as e:
        return Item(index, name, None, e)


def _source_item(source: Source, transform: Callable, i: int) -> Item:
    return _item(partial(source.__getitem__, i), transform, i, source.row_name(i))


def map_batches(
    source: Source, transform: Callable, batch_size: int, numbers: Sequence[int], workers: int
) -> Iterator[Batch]:
    """The batches of a source with these numbers, decoded by `workers` processes."""
    batches = [range(len(source))[n * batch_size : (n + 1) * batch_size] for n in numbers]
    loaded = load_batches(partial(_source_item, source, transform), batches, workers)
    return (Batch(number, len(items), items) for number, items in zip(numbers, loaded, strict=True))


def stream_batches(
    source: TimmStream, transform: Callable, batch_size: int, wanted: Callable[[int], bool], workers: int
) -> Iterator[Batch]:
    """All batches of a stream; batches that are not wanted are read but not decoded.

    Each process reads the whole stream. `workers` is the number of threads that decode: Pillow and torch release the
    GIL.
    """

    def finish(number: int, size: int, futures: list[Future[Item]] | None) -> Batch:
        return Batch(number, size, None if futures is None else [future.result() for future in futures])

    samples = enumerate(source.undecoded())
    ahead: deque[tuple[int, int, list[Future[Item]] | None]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for number in count():
            group = list(islice(samples, batch_size))
            if not group:
                break
            submit = partial(pool.submit, _item)
            futures = [submit(load, transform, i, name) for i, (name, load) in group] if wanted(number) else None
            ahead.append((number, len(group), futures))
            if len(ahead) > 2:  # the threads stay two batches ahead of the model
                yield finish(*ahead.popleft())
        while ahead:
            yield finish(*ahead.popleft())
