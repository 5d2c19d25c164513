"""Data sets that timm reads as a stream."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..config import DataSet
from ..formats.decode import image_extensions
from ..formats.pillow import Reduced
from ..formats.pixels import PLAIN, Pixels
from .timm import STREAMS, decode_any, open_dataset, prefix_of


@dataclass(frozen=True)
class StreamOrder:
    """How a stream is read."""

    batch_size: int = 1  # each worker makes whole batches
    seed: int = 0  # of the reader's shuffling
    whole: bool = False  # every process gets all images once, unshuffled, in the order of the shards


class TimmStream(IterableDataset):
    """Images of a data set that timm reads as a stream: `wds/`, `hfids/`, `tfds/`; targets are not needed.

    timm's reader shuffles, and shares the data between processes and workers, so the order depends on the number of
    workers. If `repeatable` (`wds/`, `hfids/`), the order of an epoch depends only on seed, epoch, processes and
    workers. `tfds/` decodes the images itself, as 8-bit with 1 or 3 channels. `rank` is that of the reader.

    `wds/` takes shard names as split (`train-{0000..0099}.tar`). `input_key` defaults to 'image', for `wds/` to all
    image extensions. `root` is the folder (or address) of the shards, or the download cache.
    """

    left, has_files = "", False

    def __init__(
        self,
        data_set: DataSet,
        root: str | os.PathLike | None = None,
        in_chans: int = 3,
        pixels: Pixels = PLAIN,
        order: StreamOrder | None = None,
    ) -> None:
        super().__init__()
        name, input_key, order = data_set.dataset, data_set.input_key, order or StreamOrder()
        self.kind, self.dataset_name, self.input_key = prefix_of(name), name, input_key or "image"
        self.in_chans, self.pixels = in_chans, pixels.check(in_chans)
        if self.kind not in STREAMS:
            raise ValueError(f"Data set '{name}' is not a stream (wds/, hfids/, tfds/). Use TimmSource.")
        kwargs: dict[str, Any] = dict(num_samples=data_set.num_images, input_img_mode="")
        if self.kind == "wds":
            self.input_key = input_key or ";".join(ext[1:] for ext in image_extensions())
            if root is None:
                raise ValueError(f"Data set '{name}' needs the folder of its shards. Set --data-dir.")
        else:
            kwargs["target_key"] = self.input_key  # as in TimmSource: the readers require a target
        if self.kind == "tfds":
            if in_chans not in (1, 3):
                raise ValueError(f"Data set '{name}' gives images with 1 or 3 channels, got in_chans={in_chans}.")
            kwargs["input_img_mode"] = "L" if in_chans == 1 else "RGB"
        kwargs |= dict(is_training=not order.whole, batch_size=order.batch_size, seed=order.seed)
        self.dataset = open_dataset(data_set, root, input_key=self.input_key, **kwargs)
        self.reader = self.dataset.reader
        if order.whole:
            self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1
        features = self.reader.builder.info.features if self.kind == "hfids" else None
        if features is not None and self.input_key not in features:
            raise ValueError(
                f"Data set '{name}' has no column '{self.input_key}'; set input_key to one of: {', '.join(features)}."
            )
        self.rank = self.reader.dist_rank
        self.repeatable = self.kind != "tfds"  # TensorFlow's shuffling carries its state from epoch to epoch

    def __len__(self) -> int:
        """Images per epoch of this process, whole batches of every worker (see `set_loader_cfg`)."""
        return len(self.reader)

    def folders(self) -> list[str]:
        """Empty: a new file would not belong to the stream."""
        return []

    def set_epoch(self, epoch: int) -> None:
        """Selects the reader's order; reaches workers that are already running."""
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Sets the number of loader workers, which `len` depends on. Call before making the loader."""
        self.dataset.set_loader_cfg(num_workers)

    def __iter__(self) -> Iterator[torch.Tensor | Reduced]:
        for _, load in self.undecoded():
            yield load()

    def undecoded(self) -> Iterator[tuple[str, Callable[..., torch.Tensor | Reduced]]]:
        """Yields `(name, load)`: `load(choose=None)`, see `decode.decode`, any number of times, or an ImageError."""
        leave_undecoded(self.reader, self.dataset_name, self.input_key)
        count = 0
        for item, _ in self.dataset:
            name, image = undecoded_image(item, f"{self.dataset_name} sample {count}")
            yield name, partial(decode_any, image, name, self.in_chans, pixels=self.pixels)
            count += 1
        if not count:
            worker = get_worker_info()
            number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
            raise ValueError(
                f"Data set '{self.dataset_name}' gave no sample to worker {number} of {workers}: it has fewer shards "
                "than workers times processes, or its shards are empty. Use fewer --workers or more shards."
            )


def undecoded_image(item: Any, name: str) -> tuple[str, Any]:
    """Name (or else `name`) and image, for `decode_any`, of a reader's sample after `leave_undecoded`."""
    if not isinstance(item, dict):
        return name, item
    return item["path"] or name, item["path"] if item["bytes"] is None else item["bytes"]


def leave_undecoded(reader: Any, name: str, input_key: str, labelled: bool = False) -> None:
    """Makes timm's reader of a stream pass on bytes; call it in the process that reads them, before the first sample.

    Otherwise it would convert 16-bit images to 8-bit, drop samples without label (`wds/`), and end at the first image
    that cannot be decoded (`hfids/`). The reader builds its pipeline late, in the worker, so this must run there too.
    `tfds/` stays as it is. `labelled` keeps timm's targets and shuffling; else there are no targets, and the shuffle
    follows the epoch.
    """
    kind, built = prefix_of(name), getattr(reader, "ds", None) is not None
    if kind not in ("wds", "hfids") or built:
        return
    try:
        reader._lazy_init()  # sets reader.ds
    except RuntimeError as error:  # timm's error for fewer shards than workers
        raise ValueError(f"Data set '{name}': {error}") from error
    if kind == "hfids":
        import datasets

        reader.ds = reader.ds.cast_column(input_key, datasets.Image(decode=False))
        return
    import webdataset.filters
    import webdataset.handlers
    from timm.data.readers.reader_wds import detshuffle2, log_and_continue

    # timm's last two stages decode and rename
    pick = partial(_pick, name=name, keys=input_key.split(";"), target=partial(_target, reader) if labelled else None)
    last = webdataset.filters.map(pick, handler=log_and_continue if labelled else webdataset.handlers.reraise_exception)
    reader.ds.pipeline[-2:] = [last]
    if reader.is_training and not labelled:
        # The stage before shuffles with a generator that carries on from epoch to epoch, which a resumed run could not
        # repeat. Here its seed follows the epoch, as that of the shards does.
        seed = reader.common_seed + ((1 + reader.global_worker_id) << 32)
        sizes = reader.sample_shuffle_size, reader.sample_initial_size
        reader.ds.pipeline[-2] = detshuffle2(*sizes, seed=seed, epoch=reader.epoch_count)


def _pick(
    sample: dict[str, Any], name: str, keys: list[str], target: Callable[[dict[str, Any]], Any] | None
) -> dict[str, Any] | None:
    """The image's bytes and the target of a sample of `wds/`; None drops it, as timm does with negative labels."""
    label = None if target is None else target(sample)
    if target is not None and label is None:
        return None
    key = next((key for key in keys if key in sample), None)
    path = f"{sample.get('__url__', name)}/{sample['__key__']}" + (f".{key}" if key else "")
    return dict(image=dict(path=path, bytes=sample[key] if key else b""), target=label)


_PIXEL = b"P5 1 1 255 0"  # the smallest image


def _target(reader: Any, sample: dict[str, Any]) -> Any:
    """The target as timm reads it, which must decode an image on the way."""
    from timm.data.readers.reader_wds import _decode

    keys = reader.target_keys or reader.target_key
    rest = {key: value for key, value in sample.items() if key in ("cls", "json", "__key__")}
    found = _decode({**rest, "pgm": _PIXEL}, "pgm", "", keys, reader.split_info.alt_label)
    return None if found is None else found["target"]


def shards_of(source: TimmStream) -> int | None:
    """Number of files of a stream; None if it is unknown before reading."""
    reader = source.reader
    if source.kind == "wds":
        return len(reader.split_info.filenames)
    if source.kind == "hfids" and not reader.download:
        files = getattr(reader.builder.config, "data_files", None)
        return len(files[reader.split]) if files and reader.split in files else None
    return None


def shard_note(source: TimmStream, workers: int, processes: int) -> str:
    """A warning if an epoch will not have each image exactly once; '' if it will, or if that is unknown.

    timm gives whole shards to data workers, and each makes the same number of whole batches: one with fewer images
    starts its shards again, one with more skips some. Call it after `set_loader_cfg`; `workers` is per process.
    """
    shards, each = shards_of(source), max(1, workers)
    if shards is None:
        return ""
    readers = processes * each
    # if shards do not divide among processes, datasets lets every process read all of them and keep its share of images
    sharing = each if source.kind == "hfids" and shards % processes else readers
    if shards % sharing:
        return (
            f"{shards} shards do not divide evenly among {sharing} data workers ({processes} processes x {each}): an "
            "epoch repeats some images and skips others, the next epoch other ones. Choose other --workers."
        )
    images, made = source.reader.num_samples, len(source) * processes
    if made == images:
        return ""
    return (
        f"An epoch takes {made} images of {images}, because each of {readers} data workers makes whole batches: "
        f"{made - images} {'is' if made - images == 1 else 'are'} repeated."
    )
