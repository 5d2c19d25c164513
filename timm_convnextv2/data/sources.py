"""Where the pictures come from: folders, and the data sets that timm opens."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .decode import (
    Choose,
    ImageError,
    MissingPackageError,
    Reduced,
    check_in_chans,
    check_index,
    decode,
    from_pil,
    image_extensions,
    load_image,
    printable,
)
from .embedded import EmbeddedSource
from .listing import LeftOut, open_tar
from .names import FileNames
from .pixels import Pixels
from .places import Dirs, Listing, list_folder
from .weights import Groups

__all__ = ["FolderSource", "TimmSource", "TimmStream", "create_source", "left_out"]

_STREAM_PREFIXES = ("wds", "hfids", "tfds")
_MAP_PREFIXES = ("torch", "hfds")
_READER_PACKAGES = dict(wds="webdataset", hfds="datasets", hfids="datasets", tfds="tensorflow tensorflow-datasets")


class FolderSource(Dataset):
    """All pictures anywhere below a folder, in a fixed order; folder names mean nothing.

    Hidden files and folders (leading dot) are skipped. Links to folders are followed, each folder once. What is no
    regular file (FIFOs, sockets, devices, broken links) is never opened. The names live in one block of bytes: about 8
    bytes each more than their length below `root`.

    Args:
        root: The folder.
        in_chans: Channels that pictures are converted to, see `load_image`.
        nodata: Stored value of pixels that are no data, or a whole `Pixels`, see `load_image`.
        names: Files to read instead of all below the folder, relative to it (or absolute); nothing is listed then.

    Attributes:
        left: What is there besides the pictures.
        groups: How images are sampled, see `weights.Groups`; None: each once an epoch.
        grows: Whether a file that is written below `root` may be an image of it the next time.

    Raises:
        ValueError: The folder is missing, is no folder, cannot be listed, or has no picture below it.
    """

    groups: Groups | None = None

    def __init__(
        self,
        root: str | os.PathLike,
        in_chans: int = 3,
        nodata: float | Pixels | None = None,
        names: FileNames | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.in_chans, self.nodata = check_in_chans(in_chans), nodata
        self.names, self.left = list_folder(self.root) if names is None else (names, LeftOut())
        self.grows = names is None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> torch.Tensor:
        return load_image(self.path(i), self.in_chans, self.nodata)

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """Picture `i`, `Reduced` if it is a JPEG whose size makes `choose` answer more than 1."""
        path = self.path(i)
        return decode(path, self.in_chans, printable(path), choose, self.nodata)

    def path(self, i: int) -> str:
        """Path of picture `i`, as the file system knows it."""
        return os.path.join(self.root, self.short_name(i))

    def short_name(self, i: int) -> str:
        """Path of picture `i` below the folder, as the file system knows it."""
        return self.names[check_index(i, len(self))]

    def name(self, i: int) -> str:
        """Path of picture `i`, safe to print."""
        return printable(self.path(i))


def left_out(source: Any) -> str:
    """What a folder or tar holds besides the pictures, in one line, see `listing.LeftOut`; '' for other sources."""
    return str(getattr(source, "left", None) or "")


class TimmSource(Dataset):
    """Pictures of a map-style data set that timm can open; targets are neither needed nor read.

    Args:
        name: timm's spelling: `hfds/<name or folder>`, `torch/<name>`, or '' for timm's folder and tar readers.
        root: Folder, tar file, or download cache.
        split: Split of the data set.
        in_chans: Channels that pictures are converted to, see `load_image`.
        input_key: Column that holds the picture (`hfds/`, default 'image') or extensions (folders).
        download: Let torchvision download the data set.
        nodata: Stored value of pixels that are no data, or a whole `Pixels`, see `load_image`.

    Raises:
        ValueError: timm cannot open the data set, or it is a stream.
        MissingPackageError: (a ValueError) A package that the reader needs is not installed.
    """

    groups: Groups | None = None

    def __init__(
        self,
        name: str,
        root: str | os.PathLike | None = None,
        split: str = "train",
        in_chans: int = 3,
        input_key: str | None = None,
        download: bool = False,
        nodata: float | Pixels | None = None,
    ) -> None:
        self.dataset_name, self.in_chans, self.nodata = name or str(root), check_in_chans(in_chans), nodata
        self.prefix = prefix = _prefix(name)
        if prefix in _STREAM_PREFIXES:
            raise ValueError(f"Data set '{name}' is a stream, which has no index. Use TimmStream.")
        if name and prefix not in _MAP_PREFIXES:  # timm would ignore the name and read the folder
            raise _unknown_dataset(name)
        kwargs: dict[str, Any] = {}
        if prefix == "torch":
            if input_key:
                raise ValueError(f"input_key='{input_key}' has no meaning for '{name}'; leave it out.")
        elif input_key:
            kwargs["input_key"] = input_key
        if prefix == "hfds":
            # timm's reader insists on a target column; the picture itself always exists
            kwargs["target_key"] = input_key or "image"
        if prefix not in _MAP_PREFIXES and (root is None or not os.path.exists(root)):
            raise ValueError(f"Data set folder {root} does not exist. Check --data-dir.")
        self.left = LeftOut()
        if not name and root is not None and os.fspath(root).lower().endswith(".tar") and os.path.isfile(root):
            extensions = input_key.lower().split(";") if input_key else None
            reader, self.left = open_tar(os.fspath(root), extensions=extensions)
            self.dataset: Any = ImageDataset(None, reader=reader)  # type: ignore[arg-type]  # it takes a reader, too
        else:
            self.dataset = _create_timm_dataset(name, root, split, download=download, **kwargs)
        self.reader: Any = getattr(self.dataset, "reader", None)
        if not len(self.dataset):
            raise ValueError(f"Split '{split}' of data set '{self.dataset_name}' has no sample. Choose another split.")
        if prefix == "hfds":
            key, columns = self.reader.image_key, self.reader.dataset.column_names
            rows = self.reader.dataset = self.reader.dataset.select_columns([key])  # the others would be decoded too
            # timm's cast adds a column that is missing, with nothing in it
            if all(rows[i][key] is None for i in range(min(len(rows), 10))):
                others = ", ".join(column for column in columns if column != key)
                raise ValueError(
                    f"Data set '{name}' has no picture in column '{key}'; set input_key to one of: {others}."
                )
        if self.reader is None and hasattr(self.dataset, "loader"):
            self.dataset.loader = os.fspath  # torchvision would convert to 8-bit RGB; load_image takes the path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> torch.Tensor:
        return decode_any(*self._read(i), self.in_chans, nodata=self.nodata)

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """Picture `i`, `Reduced` if it is a JPEG whose size makes `choose` answer more than 1."""
        return decode_any(*self._read(i), self.in_chans, choose, self.nodata)

    def _read(self, i: int) -> tuple[Any, str]:
        """What timm's reader gives as sample `i`, and its name for messages."""
        i = check_index(i, len(self))
        # the file name of an hfds sample costs as much as the sample; `name` gives it when it is needed
        name = f"{self.dataset_name} sample {i}" if self.prefix == "hfds" else self.name(i)
        try:
            # timm's ImageDataset replaces unreadable samples without telling; its reader does not
            picture = self.dataset[i][0] if self.reader is None else self.reader[i][0]
        except Exception as error:  # as varied as the readers
            raise ImageError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error
        return picture, name

    def name(self, i: int) -> str:
        """File name that the reader knows for sample `i`, or '<data set> sample <i>'."""
        path = None
        if self.prefix == "hfds":
            path = (self.reader.dataset[i][self.reader.image_key] or {}).get("path")
        elif self.reader is not None:
            path = self.reader.filename(i, absolute=True)
        elif hasattr(self.dataset, "samples"):
            path = self.dataset.samples[i][0]
        return printable(path) if path else f"{self.dataset_name} sample {i}"


def _prefix(name: str) -> str:
    return name.partition("/")[0].lower() if "/" in name else ""


def _unknown_dataset(name: str) -> ValueError:
    prefixes = ", ".join(f"{prefix}/" for prefix in (*_MAP_PREFIXES, *_STREAM_PREFIXES))
    return ValueError(
        f"Unknown data set '{name}'. Expected '' (a folder of images), 'embedded', or a name that starts with one of "
        f"{prefixes}."
    )


def _create_timm_dataset(name: str, root: Any, split: str, **kwargs: Any) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=None if root is None else os.fspath(root), split=split, **kwargs)
    except Exception as error:  # readers raise AssertionError, RuntimeError, KeyError, FileNotFoundError, ...
        if isinstance(error, ImportError) or "Please install" in str(error):
            package = _READER_PACKAGES.get(_prefix(name), getattr(error, "name", None))
            raise MissingPackageError(f"Data set '{name}': {error} Run `pip install {package}`.") from error
        raise ValueError(
            f"timm cannot open data set '{name}' (root {root}, split '{split}', {kwargs}): "
            f"{type(error).__name__}: {error}"
        ) from error


def decode_any(
    picture: Any,
    name: str,
    in_chans: int,
    choose: Choose | None = None,
    nodata: float | Pixels | None = None,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes what the readers of timm and torchvision give: a path, bytes, an open file, or a Pillow image.

    See `decode.decode` for `choose` and `convert`.
    """
    if isinstance(picture, Image.Image):
        try:
            picture = picture.copy()  # converting turns an image in place
            if convert is not None and Pixels.of(nodata).plain:
                return convert(picture, in_chans)
            return from_pil(picture, in_chans, nodata)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
    if hasattr(picture, "read"):
        with picture:
            picture = picture.read()
    if not isinstance(picture, str | bytes):
        raise ImageError(f"{name}: is {type(picture).__name__}, expected a picture; check the name of the input key")
    return decode(picture, in_chans, name, choose, nodata, convert)


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
        nodata: Stored value of pixels that are no data, or a whole `Pixels`, see `load_image`.

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
        nodata: float | Pixels | None = None,
    ) -> None:
        super().__init__()
        self.kind = _prefix(name)
        if self.kind not in _STREAM_PREFIXES:
            raise ValueError(f"Data set '{name}' is no stream (wds/, hfids/, tfds/). Use TimmSource.")
        self.dataset_name, self.in_chans, self.nodata = name, check_in_chans(in_chans), nodata
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
        return decode_undecoded(picture, name, self.input_key, self.in_chans, choose, self.nodata)


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


def _pick(
    sample: dict[str, Any], name: str, keys: list[str], target: Callable[[dict[str, Any]], Any] | None
) -> dict[str, Any] | None:
    """The picture's bytes and the target of a sample of `wds/`; None leaves it out, as timm does negative labels."""
    label = None if target is None else target(sample)
    if target is not None and label is None:
        return None
    key = next((key for key in keys if key in sample), None)
    path = f"{sample.get('__url__', name)}/{sample['__key__']}" + (f".{key}" if key else "")
    return dict(image=dict(path=path, bytes=sample[key] if key else b""), target=label)


_PIXEL = b"P5 1 1 255 0"  # the smallest image


def _target(reader: Any, sample: dict[str, Any]) -> Any:
    """The target as timm reads it, which decodes an image on the way."""
    from timm.data.readers.reader_wds import _decode

    keys = reader.target_keys or reader.target_key
    rest = {key: value for key, value in sample.items() if key in ("cls", "json", "__key__")}
    found = _decode({**rest, "pgm": _PIXEL}, "pgm", "", keys, reader.split_info.alt_label)
    return None if found is None else found["target"]


def check_dataset(
    data_dir: Dirs, dataset: str, data_list: Dirs = None, source_weights: Sequence[float] | None = None
) -> Any:
    """Refuses what only images in files can have; returns the one root of a data set.

    Raises:
        ValueError: A data set is named, and several roots, a list, or weights.
    """
    if not dataset:
        return data_dir
    if data_list is not None or source_weights is not None:
        option = "--source-weights" if data_list is None else "--data-list"
        raise ValueError(f"{option} is for images in files: leave it out with --dataset {dataset}.")
    if data_dir is None or isinstance(data_dir, str | os.PathLike):
        return data_dir
    if len(data_dir) > 1:
        raise ValueError(f"--dataset {dataset} has one --data-dir, got {' '.join(map(str, data_dir))}.")
    return data_dir[0] if data_dir else None


def create_source(
    data_dir: Dirs = None,
    dataset: str = "",
    split: str = "train",
    in_chans: int = 3,
    input_key: str | None = None,
    download: bool = False,
    num_samples: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    whole: bool = False,
    nodata: float | Pixels | None = None,
    data_list: Dirs = None,
    source_weights: Sequence[float] | None = None,
    listing: Listing | None = None,
) -> Any:
    """Picks the source that the options of a script describe.

    - `dataset=''`: `data_dir` is a folder with pictures anywhere below it (`FolderSource`), or a `.tar` file
      (`TimmSource`), or a pattern such as `scans/2024-*/**/*.png`; or several of these (`JoinedSource`). With
      `data_list`, the pictures that lists name.
    - `dataset='embedded'`: the embedded data set; another `split` than train gives other pictures.
    - `torch/...`, `hfds/...`: `TimmSource`. `wds/...`, `hfids/...`, `tfds/...`: `TimmStream`.

    Args:
        data_dir: Folders, tar files, patterns; or the data set's root.
        dataset: Name as above.
        split: Split of the data set.
        in_chans: Channels of the pictures.
        input_key: Field that holds the picture, see `TimmSource` and `TimmStream`.
        download: Download the data set, where it can be.
        num_samples: Pictures per epoch (streams), or in all (embedded).
        batch_size: Images per batch (streams).
        seed: Seed of the order (streams).
        whole: All images once, in order, for every process (streams; others always are).
        nodata: Stored value of pixels that are no data, or a whole `Pixels`, see `load_image`; the embedded data set
            has neither.
        data_list: Lists of pictures, see `lists.read_list`; their names are relative to `data_dir`, or where that is
            None to the folder of the list.
        source_weights: Share of an epoch's places for each of the folders or lists, in any unit.
        listing: The files of these, where they have been listed before.

    Raises:
        ValueError: Nothing is named, the name is unknown, or the source cannot be opened.
    """
    pixels = Pixels.of(nodata).check(in_chans)
    root = check_dataset(data_dir, dataset, data_list, source_weights)
    if dataset == "embedded":
        if pixels.divide is not None or pixels.clip_low is not None:
            raise ValueError("The embedded data set is 8-bit in 0..255: leave out --divide and clip limits.")
        return EmbeddedSource(num_samples or 2048, in_chans=in_chans, seed=int(split != "train"))
    if _prefix(dataset) in _STREAM_PREFIXES:
        reading = (seed, input_key, download, whole, nodata)
        return TimmStream(dataset, root, split, in_chans, num_samples, batch_size, *reading)
    if _prefix(dataset) in _MAP_PREFIXES:
        return TimmSource(dataset, root, split, in_chans, input_key, download, nodata)
    if dataset:
        raise _unknown_dataset(dataset)
    from .joined import open_places

    return open_places(data_dir, data_list, source_weights, listing, in_chans, nodata)
