"""Streamed data sets of timm."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..formats.decode import (
    Choose,
    Reduced,
    check_in_chans,
    image_extensions,
)
from ..formats.errors import ImageError
from ..formats.pixels import PLAIN, Pixels
from .timm import _STREAM_PREFIXES, _create_timm_dataset, _pick, _prefix, _target, decode_any


class TimmStream(IterableDataset):
    """Pictures of a data set that timm reads as a stream: `wds/`, `hfids/`, `tfds/`; targets are not needed.

    timm's reader shuffles, and shares the data between processes and workers. The order is therefore the reader's
    own: it changes with the number of workers. Where `repeatable` (`wds/`, `hfids/`), that of an epoch depends on
    nothing else than seed, epoch, processes and workers. `tfds/` decodes the pictures itself, as 8-bit with 1 or 3
    channels.

    Args:
        name: `wds/`, `hfids/<name or folder>`, or `tfds/<name>`.
        root: Folder (or address) of the shards, or download cache.
        split: Split; for `wds/` also shard names as in `train-{0000..0099}.tar`.
        in_chans: Channels that pictures are converted to, see `load_image`.
        num_samples: Pictures per epoch, where the data set does not say.
        batch_size: Images per batch: each worker gives whole batches.
        seed: Seed of the reader's shuffling.
        input_key: Field that holds the picture; default 'image', for `wds/` any picture extension (separated by ;).
        download: Download the data set first (`hfids/`, `tfds/`).
        whole: Every process gets all images once, unshuffled, in the order of the shards.
        pixels: How stored values become pixels, see `Pixels`.

    Raises:
        ValueError: timm cannot open the data set, its length is not known, or it is no stream.
        MissingPackageError: (a ValueError) A package that the reader needs is not installed.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike | None = None,
        split: str = "train",
        in_chans: int = 3,
        num_samples: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        input_key: str | None = None,
        download: bool = False,
        whole: bool = False,
        pixels: Pixels = PLAIN,
    ) -> None:
        super().__init__()
        self.kind = _prefix(name)
        if self.kind not in _STREAM_PREFIXES:
            raise ValueError(f"Data set '{name}' is no stream (wds/, hfids/, tfds/). Use TimmSource.")
        self.dataset_name, self.in_chans, self.pixels = name, check_in_chans(in_chans), pixels
        self.input_key = input_key or "image"
        kwargs: dict[str, Any] = dict(num_samples=num_samples, input_img_mode="")
        if self.kind == "wds":
            self.input_key = input_key or ";".join(ext[1:] for ext in image_extensions())
            if root is None:
                raise ValueError(f"Data set '{name}' needs the folder of its shards. Set --data-dir.")
        else:
            kwargs["target_key"] = self.input_key  # as in TimmSource: the readers insist on a target
        if self.kind == "tfds":
            if in_chans not in (1, 3):
                raise ValueError(f"Data set '{name}' gives pictures with 1 or 3 channels, got in_chans={in_chans}.")
            kwargs["input_img_mode"] = "L" if in_chans == 1 else "RGB"
        self.dataset = _create_timm_dataset(
            name,
            root,
            split,
            is_training=not whole,
            batch_size=batch_size,
            seed=seed,
            input_key=self.input_key,
            download=download,
            **kwargs,
        )
        self.reader = self.dataset.reader
        if whole:
            self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1
        features = self.reader.builder.info.features if self.kind == "hfids" else None
        if features is not None and self.input_key not in features:
            raise ValueError(
                f"Data set '{name}' has no column '{self.input_key}'; set input_key to one of: {', '.join(features)}."
            )
        self.rank = self.reader.dist_rank
        self.repeatable = self.kind != "tfds"  # TensorFlow's shuffling carries its state from epoch to epoch

    def __len__(self) -> int:
        """Pictures per epoch of this process, whole batches of every worker (see `set_loader_cfg`)."""
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Selects the reader's order; reaches workers that are already running."""
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tells the reader the number of loader workers, which `len` depends on. Call before making the loader."""
        self.dataset.set_loader_cfg(num_workers)

    def __iter__(self) -> Iterator[torch.Tensor | Reduced]:
        for _, load in self.undecoded():
            yield load()

    def undecoded(self) -> Iterator[tuple[str, Callable[..., torch.Tensor | Reduced]]]:
        """Yields `(name, load)`: `load(choose=None)` decodes the picture, any number of times, or raises ImageError.

        With `choose` it comes `Reduced` if it is a JPEG whose size makes `choose` answer more than 1.

        Raises:
            ValueError: The reader yields nothing, most likely because there are fewer shards than workers.
        """
        leave_undecoded(self.reader, self.dataset_name, self.input_key)
        count = 0
        for item, _ in self.dataset:
            name, picture = undecoded_picture(item, f"{self.dataset_name} sample {count}")
            yield name, partial(self._load, picture, name)
            count += 1
        if not count:
            worker = get_worker_info()
            raise ValueError(
                f"Data set '{self.dataset_name}' gave no sample to worker {worker.id if worker else 0} of "
                f"{worker.num_workers if worker else 1}: it has fewer shards than workers times processes, or its "
                "shards are empty. Use fewer --workers or more shards."
            )

    def _load(self, picture: Any, name: str, choose: Choose | None = None) -> torch.Tensor | Reduced:
        return decode_undecoded(picture, name, self.input_key, self.in_chans, choose, self.pixels)


def undecoded_picture(item: Any, name: str) -> tuple[str, Any]:
    """Name and picture, for `decode_any`, of what a reader gives after `leave_undecoded`.

    Args:
        item: From the reader.
        name: Of a sample that has none.
    """
    if not isinstance(item, dict):
        return name, item
    return item["path"] or name, item["path"] if item["bytes"] is None else item["bytes"]


def decode_undecoded(picture: Any, name: str, input_key: str, *args: Any, **kwargs: Any) -> Any:
    """`decode_any` for a sample of a stream, which may lack the picture."""
    if isinstance(picture, bytes) and not picture:
        raise ImageError(f"{name}: has no picture under the input key {input_key}")
    return decode_any(picture, name, *args, **kwargs)


def leave_undecoded(reader: Any, name: str, input_key: str, labelled: bool = False) -> None:
    """Makes timm's reader of a stream pass the bytes on; call it in the process that reads them, before the first.

    It would convert 16-bit pictures to 8-bit, drop samples without label (`wds/`), and end at the first picture that
    cannot be decoded (`hfids/`). The reader builds its pipeline late, in the worker, and so must we. `tfds/` stays.

    Args:
        reader: timm's.
        name: Of the data set, `wds/...` or `hfids/...`.
        input_key: As of `TimmStream`.
        labelled: Targets are timm's, and so is the shuffling. Else there are none, and the shuffle follows the epoch.

    Raises:
        ValueError: There are fewer shards than workers.
    """
    kind, built = _prefix(name), getattr(reader, "ds", None) is not None
    if kind not in ("wds", "hfids") or built:
        return
    try:
        reader._lazy_init()  # sets reader.ds
    except RuntimeError as error:  # how timm says that there are fewer shards than workers
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
        # the one before shuffles with a generator that goes on from epoch to epoch, which no resumed run could
        # repeat; here its seed follows the epoch, as that of the shards does
        seed = reader.common_seed + ((1 + reader.global_worker_id) << 32)
        sizes = reader.sample_shuffle_size, reader.sample_initial_size
        reader.ds.pipeline[-2] = detshuffle2(*sizes, seed=seed, epoch=reader.epoch_count)
