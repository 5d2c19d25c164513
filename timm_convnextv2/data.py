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

import colorsys
import hashlib
import io
import logging
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import InterpolationMode, v2

from .masking import random_mask

__all__ = [
    "EmbeddedSource",
    "EpochBatchSampler",
    "FolderSource",
    "ImageError",
    "MissingPackageError",
    "PretrainDataset",
    "PretrainStream",
    "PretrainTransform",
    "TimmSource",
    "TimmStream",
    "check_readable",
    "collate",
    "create_source",
    "image_extensions",
    "load_image",
    "sample_seed",
]

_logger = logging.getLogger(__name__)

# what Pillow opens but is no picture: documents, drawings, films, containers of scientific records
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_STREAM_PREFIXES = ("wds", "hfids", "tfds")
_MAP_PREFIXES = ("torch", "hfds")
_READER_PACKAGES = dict(wds="webdataset", hfds="datasets", hfids="datasets", tfds="tensorflow tensorflow-datasets")
# names of split folders, and the split that they mean
_SPLITS = dict.fromkeys(("train", "training"), "train")
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "eval", "evaluation"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing"), "test")
_MAX_BAD_IN_A_ROW = 10


class ImageError(ValueError):
    """One picture cannot be used. Pretraining replaces it by another one and reports it."""


class MissingPackageError(ValueError):
    """An optional package that the data needs is not installed. Never skipped: this is not the picture's fault."""


# ---------------------------------------------------------------------------------------------------------- decoding


def image_extensions() -> tuple[str, ...]:
    """Sorted lower-case file name extensions that count as pictures: all that Pillow opens, and `.npy`.

    Formats that are no pictures (eps, mpg, hdf5, wmf, grib, ...) are left out.
    """
    Image.init()
    registered = Image.registered_extensions().items()
    found = {ext for ext, fmt in registered if fmt in Image.OPEN and fmt not in _NOT_PICTURES}
    return tuple(sorted(found | {".npy"}))


def load_image(path: str | os.PathLike, in_chans: int = 3) -> torch.Tensor:
    """Decodes one picture file to exactly `in_chans` channels.

    With 1 or 3 channels any Pillow mode is converted as timm does it: grey to RGB and back, palettes and CMYK to
    colours; *alpha is dropped*, which shows the colours stored under transparent pixels. With 4 channels RGBA pictures
    keep their alpha. Any other number comes from multi-band TIFF (needs the package tifffile) or `.npy`: `[H, W]`,
    `[H, W, C]` or `[C, H, W]`, whichever axis has `in_chans` entries, channels-last if both do. Of files that hold
    several pictures, the first is used. EXIF rotation is applied.

    Args:
        path: Picture file.
        in_chans: Number of channels wanted.

    Returns:
        `[C, H, W]`: uint8 for 8-bit pictures; otherwise float32, where integers are divided by the largest value of
        their type (16-bit by 65535: never clipped to 8 bits) and floats are kept as stored. 16-bit colour PNG comes
        as 8-bit, which is all that Pillow gives.

    Raises:
        ImageError: (a ValueError) The file cannot be decoded, is truncated, has another number of channels, contains
            NaN or infinity, or has more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS` (cut such pictures into tiles
            or raise that limit; from once that number Pillow only warns).
        MissingPackageError: (a ValueError) The file needs a package that is not installed.
    """
    return _decode(path, in_chans, _printable(path))


def _printable(path: str | os.PathLike) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _decode(file: str | os.PathLike | bytes, in_chans: int, name: str) -> torch.Tensor:
    """Decodes a file (its path, or its content as bytes); every fault becomes an error that starts with `name`."""
    try:
        if name.lower().endswith(".npy"):
            return _from_array(np.load(_open(file), allow_pickle=False), in_chans)
        try:
            image = Image.open(_open(file))
        except UnidentifiedImageError:
            if not _is_tiff(file):
                raise
            return _from_tiff(_open(file), in_chans)
        with image:
            if image.format == "TIFF" and not _pillow_keeps_all(image, in_chans):
                return _from_tiff(_open(file), in_chans)
            return _from_pil(image, in_chans)
    except MissingPackageError as error:
        raise MissingPackageError(f"{name}: {error}") from error
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _open(file: str | os.PathLike | bytes) -> Any:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _is_tiff(file: str | os.PathLike | bytes) -> bool:
    if isinstance(file, bytes):
        head = file[:4]
    else:
        with open(file, "rb") as f:
            head = f.read(4)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _to_float(x: np.ndarray) -> torch.Tensor:
    """uint8 as it is, other numbers as float32 in the units that `load_image` promises."""
    if 0 in x.shape:
        raise ImageError(f"is empty, shape {x.shape}")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.array(x))
    if x.dtype.kind == "b":
        return torch.from_numpy(x.astype(np.float32))
    if x.dtype.kind in "iu" and x.dtype.itemsize <= 2:
        return torch.from_numpy(x.astype(np.float32) / np.float32(np.iinfo(x.dtype).max))
    if x.dtype.kind != "f":
        # 32 and 64-bit integers rarely use their range, and dividing by it would give black pictures
        raise ImageError(
            f"holds {x.dtype}, expected uint8, int16, uint16, bool or a float type; divide by the largest value of "
            "your data and save as float32"
        )
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ImageError("contains NaN or infinite values; replace them (for example by the mean) and save again")
    return torch.from_numpy(x)


def _wrong_channels(found: str, in_chans: int) -> ImageError:
    return ImageError(
        f"has {found}, expected {in_chans} channel{'s' * (in_chans != 1)}; set --in-chans to what the pictures have, "
        "or convert them (more than 3 channels: multi-band TIFF or .npy)"
    )


def _from_pil(image: Image.Image, in_chans: int) -> torch.Tensor:
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if in_chans not in (1, 3) and (in_chans, mode) != (4, "RGBA"):
        raise _wrong_channels(f"{len(image.getbands())} channels (mode {mode})", in_chans)
    if mode == "F" or mode.startswith("I"):
        x = np.asarray(image)
        if mode == "I":  # 16-bit values in 32-bit words, except for TIFF, which does not come here with this mode
            if x.min() < 0 or x.max() > 65535:
                raise ImageError(f"has values {x.min()}..{x.max()}, expected 16 bits; save as 16-bit or float32")
            x = x.astype(np.uint16)
        x = _to_float(x)
        return x[None].repeat(in_chans, 1, 1)
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # what Pillow asks for; straight to RGB gives the same colours and a warning
    target = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    if image.mode != target:
        image = image.convert(target)
    x = torch.from_numpy(np.array(image))
    return x[None] if in_chans == 1 else x.permute(2, 0, 1)


def _from_array(x: np.ndarray, in_chans: int) -> torch.Tensor:
    if x.ndim == 2 and in_chans == 1:
        x = x[None]
    elif x.ndim == 3 and x.shape[2] == in_chans:
        x = x.transpose(2, 0, 1)
    elif x.ndim != 3 or x.shape[0] != in_chans:
        raise _wrong_channels(f"shape {x.shape}", in_chans)
    return _to_float(x)


def _pillow_keeps_all(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow gives all bands and bits of a TIFF: it takes 16-bit RGB as 8-bit, and leaves out extra bands."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, samples, photometric = tags.get(258, (1,)), tags.get(277, 1), tags.get(262)
    if in_chans == 4:
        return image.mode == "RGBA" and max(bits) <= 8
    if in_chans not in (1, 3):
        return False
    if photometric in (3, 5, 6, 8):  # palette, CMYK, YCbCr, Lab: colours that only Pillow converts
        return True
    colours = samples - sum(extra in (1, 2) for extra in tags.get(338, ()))
    return image.mode != "I" and colours in (1, 3) and (samples == 1 or max(bits) <= 8)


def _from_tiff(file: Any, in_chans: int) -> torch.Tensor:
    try:
        import tifffile
    except ImportError as error:
        raise MissingPackageError(
            "TIFF that is multi-band, 16-bit colour or otherwise beyond Pillow; run `pip install tifffile`"
        ) from error
    with tifffile.TiffFile(file) as tif:
        page, axes, x = tif.pages[0], tif.series[0].axes, tif.series[0].asarray()
        orientation = page.tags.valueof(274, 1)
    others = [axis for axis in axes if axis not in "YX"]
    channel = next((axis for axis in "SC" if axis in others), others[-1] if others else None)
    x = x[tuple(0 if axis in others and axis != channel else slice(None) for axis in axes)]
    axes = "".join(axis for axis in axes if axis in "YX" or axis == channel)
    x = x[None] if channel is None else np.moveaxis(x, axes.index(channel), 0)
    if axes.replace(channel or "", "") != "YX":
        raise ImageError(f"has axes {axes}, expected pictures with axes Y and X")
    extras = tuple(page.extrasamples or ())
    if len(x) != in_chans and extras and len(x) > len(extras):
        first = len(x) - len(extras)
        x = x[[*range(first), *(first + k for k, extra in enumerate(extras) if extra not in (1, 2))]]
    x = _to_float(_rotate(x, orientation))
    # the conversions that 8-bit pictures get
    if len(x) == 1 and in_chans == 3:
        x = x.repeat(3, 1, 1)
    elif len(x) == 3 and in_chans == 1 and page.photometric == 2:
        x = (
            x.float() / (255 if x.dtype == torch.uint8 else 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        ).sum(0, keepdim=True)
    if len(x) != in_chans:
        raise _wrong_channels(f"{len(x)} channels", in_chans)
    return x


def _rotate(x: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the TIFF / EXIF orientation 1..8 to `[C, H, W]`."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        x = x[:, ::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, :, ::-1]
    return x


# ----------------------------------------------------------------------------------------------------------- sources


class FolderSource(Dataset):
    """All pictures anywhere below a folder, in a fixed order; folder names mean nothing.

    Hidden files and folders (leading dot) are skipped. Links to folders are followed, each folder once. The names
    live in one block of bytes: about 8 bytes each more than their length below `root`.

    Args:
        root: The folder.
        in_chans: Channels that pictures are converted to, see `load_image`.

    Raises:
        ValueError: The folder is missing, is no folder, cannot be listed, or has no picture below it.
    """

    def __init__(self, root: str | os.PathLike, in_chans: int = 3) -> None:
        self.root = os.fspath(root)
        self.in_chans = _check_in_chans(in_chans)
        shown = _printable(self.root)
        if not os.path.exists(self.root):
            raise ValueError(f"Image folder {shown} does not exist. Check --data-dir.")
        if not os.path.isdir(self.root):
            raise ValueError(f"{shown} is a file, expected a folder with images below it. Give the folder it is in.")
        extensions = image_extensions()
        self._names, self._ends, others = _scan(self.root, frozenset(extensions))
        if not len(self):
            raise ValueError(
                f"No image below {shown}: {others} other file{'s' * (others != 1)} seen. Looked for the extensions "
                f"{' '.join(extensions)} (hidden files and folders are skipped)."
            )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> torch.Tensor:
        return load_image(self.path(i), self.in_chans)

    def path(self, i: int) -> str:
        """Path of picture `i`, as the file system knows it."""
        i = _check_index(i, len(self))
        return os.path.join(self.root, os.fsdecode(bytes(self._names[self._ends[i] : self._ends[i + 1]])))

    def name(self, i: int) -> str:
        """Path of picture `i`, safe to print."""
        return _printable(self.path(i))


def _scan(root: str, extensions: frozenset[str]) -> tuple[bytearray, np.ndarray, int]:
    """Names of all pictures below `root`: their bytes, the offsets `[n + 1]`, and how many other files there are."""
    names, ends, others = bytearray(), array("q", [0]), 0
    seen = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            info = os.stat(os.path.join(root, folder))
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            below, pictures = [], []
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        below.append(entry.name)
                    # a dangling link counts: as a picture that cannot be read it gets reported, not lost
                    elif os.path.splitext(entry.name)[1].lower() in extensions:
                        pictures.append(entry.name)
                    else:
                        others += 1
        except OSError as error:
            raise ValueError(f"Cannot list the folder {_printable(os.path.join(root, folder))}: {error}") from error
        for name in sorted(pictures):
            names += os.fsencode(os.path.join(folder, name))
            ends.append(len(names))
        folders.extend(os.path.join(folder, name) for name in sorted(below, reverse=True))
    return names, np.frombuffer(ends, dtype=np.int64), others


def _check_in_chans(in_chans: int) -> int:
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
    return in_chans


def _check_index(i: int, n: int) -> int:
    if not 0 <= i < n:
        raise IndexError(f"index {i} is outside 0..{n - 1}")
    return i


class TimmSource(Dataset):
    """Pictures of a map-style data set that timm can open; targets are neither needed nor read.

    Args:
        name: timm's spelling: `hfds/<name or folder>`, `torch/<name>`, or '' for timm's folder and tar readers.
        root: Folder, tar file, or download cache.
        split: Split of the data set.
        in_chans: Channels that pictures are converted to, see `load_image`.
        input_key: Column that holds the picture (`hfds/`, default 'image') or extensions (folders).
        download: Let torchvision download the data set.

    Raises:
        ValueError: timm cannot open the data set, or it is a stream.
        MissingPackageError: (a ValueError) A package that the reader needs is not installed.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike | None = None,
        split: str = "train",
        in_chans: int = 3,
        input_key: str | None = None,
        download: bool = False,
    ) -> None:
        self.dataset_name, self.in_chans = name or str(root), _check_in_chans(in_chans)
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
        self.dataset = _create_timm_dataset(name, root, split, download=download, **kwargs)
        self.reader = getattr(self.dataset, "reader", None)
        if prefix == "hfds":
            key, columns = self.reader.image_key, self.reader.dataset.column_names
            rows = self.reader.dataset = self.reader.dataset.select_columns([key])  # the others would be decoded too
            # timm's cast adds a column that is missing, with nothing in it
            if all(rows[i][key] is None for i in range(min(len(rows), _MAX_BAD_IN_A_ROW))):
                others = ", ".join(column for column in columns if column != key)
                raise ValueError(
                    f"Data set '{name}' has no picture in column '{key}'; set input_key to one of: {others}."
                )
        if hasattr(self.reader, "cache_tarfiles"):
            # an open tar file that forked workers inherit has one read position for all of them
            self.reader.cache_tarfiles = False
        if self.reader is None and hasattr(self.dataset, "loader"):
            self.dataset.loader = os.fspath  # torchvision would convert to 8-bit RGB; load_image takes the path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> torch.Tensor:
        i = _check_index(i, len(self))
        # the file name of an hfds sample costs as much as the sample; `name` gives it when it is needed
        name = f"{self.dataset_name} sample {i}" if self.prefix == "hfds" else self.name(i)
        try:
            # timm's ImageDataset replaces unreadable samples without telling; its reader does not
            picture = self.dataset[i][0] if self.reader is None else self.reader[i][0]
        except Exception as error:  # as varied as the readers
            raise ImageError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error
        return _decode_any(picture, self.in_chans, name)

    def name(self, i: int) -> str:
        """File name that the reader knows for sample `i`, or '<data set> sample <i>'."""
        path = None
        if self.prefix == "hfds":
            path = (self.reader.dataset[i][self.reader.image_key] or {}).get("path")
        elif self.reader is not None:
            path = self.reader.filename(i, absolute=True)
        elif hasattr(self.dataset, "samples"):
            path = self.dataset.samples[i][0]
        return _printable(path) if path else f"{self.dataset_name} sample {i}"


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


def _decode_any(picture: Any, in_chans: int, name: str) -> torch.Tensor:
    """Decodes what the readers of timm and torchvision give: a path, bytes, an open file, or a Pillow image."""
    if isinstance(picture, Image.Image):
        try:
            return _from_pil(picture, in_chans)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
    if hasattr(picture, "read"):
        with picture:
            picture = picture.read()
    if not isinstance(picture, str | bytes):
        raise ImageError(f"{name}: is {type(picture).__name__}, expected a picture; check the name of the input key")
    return _decode(picture, in_chans, name)


class TimmStream(IterableDataset):
    """Pictures of a data set that timm reads as a stream: `wds/`, `hfids/`, `tfds/`; targets are not needed.

    timm's reader shuffles, and shares the data between processes and workers. The order is therefore the reader's
    own: it changes with the number of workers, and cannot be continued in the middle of an epoch. `tfds/` decodes the
    pictures itself, as 8-bit with 1 or 3 channels.

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
    ) -> None:
        super().__init__()
        self.kind = _prefix(name)
        if self.kind not in _STREAM_PREFIXES:
            raise ValueError(f"Data set '{name}' is no stream (wds/, hfids/, tfds/). Use TimmSource.")
        self.dataset_name, self.in_chans = name, _check_in_chans(in_chans)
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
            is_training=True,
            batch_size=batch_size,
            seed=seed,
            input_key=self.input_key,
            download=download,
            **kwargs,
        )
        self.reader = self.dataset.reader
        features = self.reader.builder.info.features if self.kind == "hfids" else None
        if features is not None and self.input_key not in features:
            raise ValueError(
                f"Data set '{name}' has no column '{self.input_key}'; set input_key to one of: {', '.join(features)}."
            )
        self.rank = self.reader.dist_rank

    def __len__(self) -> int:
        """Pictures per epoch of this process, whole batches of every worker (see `set_loader_cfg`)."""
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Selects the reader's order; reaches workers that are already running."""
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tells the reader the number of loader workers, which `len` depends on. Call before making the loader."""
        self.dataset.set_loader_cfg(num_workers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _, picture in self.samples():
            if isinstance(picture, ImageError):
                raise picture
            yield picture

    def samples(self) -> Iterator[tuple[str, torch.Tensor | ImageError]]:
        """Yields `(name, picture [C, H, W])`, with the error in place of a picture that cannot be decoded.

        Raises:
            ValueError: The reader yields nothing, most likely because there are fewer shards than workers.
        """
        if self.kind in ("wds", "hfids") and self.reader.ds is None:
            self._leave_undecoded()
        count = 0
        for item, _ in self.dataset:
            name, picture = f"{self.dataset_name} sample {count}", item
            if isinstance(item, dict):
                name, picture = item["path"] or name, item["path"] if item["bytes"] is None else item["bytes"]
            try:
                if isinstance(picture, bytes) and not picture:
                    raise ImageError(f"{name}: has no picture under the input key {self.input_key}")
                picture = _decode_any(picture, self.in_chans, name)
            except ImageError as error:
                picture = error
            yield name, picture
            count += 1
        if not count:
            worker = get_worker_info()
            raise ValueError(
                f"Data set '{self.dataset_name}' gave no sample to worker {worker.id if worker else 0} of "
                f"{worker.num_workers if worker else 1}: it has fewer shards than workers times processes, or its "
                "shards are empty. Use fewer --workers or more shards."
            )

    def _leave_undecoded(self) -> None:
        """Makes timm's reader pass the bytes on, in the process that reads them.

        It would convert 16-bit pictures to 8-bit, drop samples without label (`wds/`), and end at the first picture
        that cannot be decoded (`hfids/`). The reader builds its pipeline late, in the worker, and so must we.
        """
        self.reader._lazy_init()
        if self.kind == "hfids":
            import datasets

            self.reader.ds = self.reader.ds.cast_column(self.input_key, datasets.Image(decode=False))
            return
        import webdataset

        keys = self.input_key.split(";")

        def pick(sample: dict[str, Any]) -> dict[str, Any]:
            key = next((key for key in keys if key in sample), None)
            path = f"{sample.get('__url__', self.dataset_name)}/{sample['__key__']}" + (f".{key}" if key else "")
            return dict(image=dict(path=path, bytes=sample[key] if key else b""), target=None)

        # timm's last two stages decode and rename
        self.reader.ds.pipeline[-2:] = [webdataset.map(pick)]


# -------------------------------------------------------------------------------------------------- embedded data set


class _Dice:
    """Random numbers of one picture. Uniform only: that stream is the most stable part of NumPy's generators."""

    def __init__(self, seed: int, i: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, i]))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def below(self, n: int) -> int:
        return int(n * self.random())

    def colour(self, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
        rgb = colorsys.hsv_to_rgb(hue % 1, self.uniform(*saturation), self.uniform(*value))
        return np.array(rgb, dtype=np.float32)[:, None, None]


def _box(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    x, y = np.abs(x) - w, np.abs(y) - h
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


# Shapes: signed distance, negative inside, of an object of radius about 1; `u` in [0, 1) varies its proportions.


def _disc(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.hypot(x, y) - 0.85


def _ring(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.68) - (0.16 + 0.1 * u)


def _square(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    corner = 0.05 + 0.2 * u
    return _box(x, y, 0.72 - corner, 0.72 - corner) - corner


def _triangle(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    side = math.sqrt(0.75) * np.abs(x) + 0.5 * y
    return np.maximum(side, -y * (0.9 + 0.3 * u)) - 0.5


def _star(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    fold = 2 * math.pi / 5
    angle = np.arctan2(x, y) / fold
    angle = np.abs(angle - np.rint(angle)) * fold
    radius = np.hypot(x, y)
    # the straight edge from a tip (1, 0) to the notch between two tips
    notch = 0.42 + 0.16 * u
    nx, ny = notch * math.cos(fold / 2), notch * math.sin(fold / 2)
    return ((radius * np.cos(angle) - 1) * ny + radius * np.sin(angle) * (1 - nx)) / math.hypot(1 - nx, ny)


def _cross(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    width = 0.22 + 0.1 * u
    return np.minimum(_box(x, y, 0.86, width), _box(x, y, width, 0.86)) - 0.04


def _crescent(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.9, 0.62 + 0.1 * u - np.hypot(x - 0.42, y))


def _flower(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    petals = 5 + int(3 * u)
    return 0.75 * (np.hypot(x, y) - 0.72 - 0.2 * np.cos(petals * np.arctan2(y, x)))


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = dict(
    disc=_disc,
    ring=_ring,
    square=_square,
    triangle=_triangle,
    star=_star,
    cross=_cross,
    crescent=_crescent,
    flower=_flower,
)


class EmbeddedSource(Dataset):
    """The embedded data set: lit, textured objects over soft backgrounds, drawn when asked for.

    No file and no network: picture `i` is a function of `(seed, i)`. There are eight classes, the objects' shapes,
    and `label(i) = i % 8`; position, size, rotation, colours, surface, light and background vary. For demonstrations,
    tests and smoke runs; other seeds give other pictures of the same kind, for example a validation set.

    Args:
        length: Number of pictures.
        size: Height and width in pixels.
        in_chans: 3 (RGB) or 1 (luma of the same pictures).
        seed: Seed of the whole set, at least 0.
    """

    classes = tuple(_SHAPES)

    def __init__(self, length: int = 2048, size: int = 128, in_chans: int = 3, seed: int = 0) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f"The embedded data set has 1 or 3 channels, got in_chans={in_chans}.")
        if length < 1 or size < 8 or seed < 0:
            raise ValueError(f"Expected length >= 1, size >= 8 and seed >= 0, got {length}, {size} and {seed}.")
        self.length, self.size, self.in_chans, self.seed = length, size, in_chans, seed

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        """Identifier of picture `i`."""
        return f"embedded {self.classes[self.label(i)]} {i}"

    def label(self, i: int) -> int:
        """Class of picture `i`, an index into `classes`."""
        return _check_index(i, self.length) % len(self.classes)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = _render(list(_SHAPES.values())[self.label(i)], _Dice(self.seed, i), self.size)
        if self.in_chans == 1:
            image = np.tensordot(np.array([[0.299, 0.587, 0.114]], dtype=np.float32), image, axes=1)
        return torch.from_numpy((image * 255 + 0.5).astype(np.uint8))


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _render(shape: Callable[[np.ndarray, np.ndarray, float], np.ndarray], dice: _Dice, size: int) -> np.ndarray:
    """Draws one picture, float32 `[3, size, size]` in [0, 1]. Lengths are in half widths of the picture."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = axis[None, :], axis[:, None]
    pixels = size / 2  # per unit of length: distance times this, cut to [0, 1], is an antialiased edge

    hue = dice.uniform(0, 1)
    dark = dice.uniform(0, 1) < 0.4
    image = _background(dice, hue, dark, axis)
    for _ in range(dice.below(5)):
        bx, by, radius = dice.uniform(-1, 1), dice.uniform(-1, 1), dice.uniform(0.06, 0.24)
        colour = dice.colour(hue + dice.uniform(-0.2, 0.2), (0.2, 0.6), (0.6, 1.0))
        cover = np.clip((radius - np.hypot(x - bx, y - by)) * (pixels / 3), 0, 1) * dice.uniform(0.12, 0.4)
        image += (colour - image) * cover

    radius = dice.uniform(0.46, 0.76)
    reach = 1 - 0.8 * radius
    cx, cy, turn = dice.uniform(-reach, reach), dice.uniform(-reach, reach), dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
    light, proportions = dice.uniform(0, 2 * math.pi), dice.uniform(0, 1)
    lx, ly = math.cos(light), math.sin(light)

    def local(ox: float, oy: float) -> tuple[np.ndarray, np.ndarray]:
        return (x - ox) * cos + (y - oy) * sin, (y - oy) * cos - (x - ox) * sin

    throw, blur = dice.uniform(0.06, 0.14), dice.uniform(0.08, 0.2)
    shadow = shape(*local(cx - throw * lx, cy - throw * ly), proportions) * radius
    image *= 1 - dice.uniform(0.35, 0.6) * _smoothstep(0.5 - shadow / (2 * blur))

    u, v = local(cx, cy)
    distance = shape(u, v, proportions) * radius
    hue += dice.uniform(0.25, 0.75)
    paint = dice.colour(hue, (0.5, 0.88), (0.75, 1.0) if dark else (0.45, 0.95))
    second = dice.colour(hue + dice.uniform(-0.2, 0.2), (0.1, 0.8), (0.35, 1.0))
    paint = paint + (second - paint) * _surface(dice, u, v, pixels * radius, lx, ly)

    # light: a bevelled rim, a slow fall-off over the whole object, and a gloss on the rim that faces the light
    bevel = dice.uniform(0.08, 0.22)
    height = np.clip(distance * (-1 / bevel), 0, 1)
    height = height * (2 - height)
    slope = np.zeros_like(height)
    slope[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * (0.5 * lx * pixels * bevel)
    slope[1:-1] += (height[2:] - height[:-2]) * (0.5 * ly * pixels * bevel)
    paint *= 1 - 0.28 * np.clip(slope, -1, 1.6) + 0.18 * ((x - cx) * lx + (y - cy) * ly)
    paint += 0.5 * np.clip(-slope - 0.9, 0, 1)
    image += (paint - image) * np.clip(0.5 - distance * pixels, 0, 1)
    image *= 1.04 - 0.12 * (x * x + y * y)
    return np.clip(image, 0, 1, out=image)


def _background(dice: _Dice, hue: float, dark: bool, axis: np.ndarray) -> np.ndarray:
    """A linear or radial gradient, soft stripes or clouds between two related colours, float32 `[3, H, W]`."""
    x, y = axis[None, :], axis[:, None]
    value = (0.2, 0.48) if dark else (0.6, 1.0)
    first = dice.colour(hue, (0.15, 0.7), value)
    second = dice.colour(hue + dice.uniform(-0.14, 0.14), (0.15, 0.7), value)
    if abs(float(first.sum() - second.sum())) < 0.3:
        second = second * np.float32(dice.uniform(0.5, 0.75))
    kind, turn = dice.below(4), dice.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    if kind == 0:
        t = 0.5 + 0.42 * (cos * x + sin * y)
    elif kind == 1:
        t = np.hypot(x - 0.5 * cos, y - 0.5 * sin) * 0.6
    elif kind == 2:
        t = 0.5 + 0.5 * np.sin((cos * x + sin * y) * dice.uniform(5, 15) + dice.uniform(0, 2 * math.pi))
    else:
        n = 3 + dice.below(3)
        knots = dice.random((n + 1, n + 1)).astype(np.float32)
        weights = _smoothstep(1 - np.abs((axis[:, None] + 1) * (n / 2) - np.arange(n + 1, dtype=np.float32)))
        t = weights @ knots @ weights.T
    return first + (second - first) * np.clip(t, 0, 1)


def _surface(dice: _Dice, u: np.ndarray, v: np.ndarray, pixels: float, lx: float, ly: float) -> np.ndarray:
    """Share of the second colour on the object, `[H, W]` in [0, 1]: a gradient, stripes, checks or dots."""
    kind, waves = dice.below(4), dice.uniform(7, 13)
    if kind == 0:
        t = 0.5 + 0.5 * (u * lx + v * ly)
    elif kind == 1:
        t = 0.5 + np.sin(u * waves) * (0.5 * pixels / waves)
    elif kind == 2:
        t = 0.5 + np.sin(u * (0.8 * waves)) * np.sin(v * (0.8 * waves)) * (0.7 * pixels / waves)
    else:
        u, v = u * (0.35 * waves), v * (0.35 * waves)
        t = 0.5 + (0.3 - np.hypot(u - np.rint(u), v - np.rint(v))) * (pixels / (0.35 * waves))
    return np.clip(t, 0, 1)


# --------------------------------------------------------------------------------------------------------- transform


class PretrainTransform:
    """Random resized crop, flips, scaling to [0, 1] and normalisation: the paper's augmentation for pretraining.

    Uses torch's global random generator only. uint8 pictures are resized as uint8, which is fast.

    Args:
        img_size: Output size in pixels, one side or `(H, W)`.
        scale: Range of the crop's share of the picture's area.
        ratio: Range of the crop's width / height.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        interpolation: 'bilinear', 'bicubic' or 'nearest', antialiased.
        mean: Mean per channel, in units of the scaled picture (uint8 pictures: 0..1).
        std: Standard deviation per channel, same units.

    Raises:
        ValueError: An argument is out of range, or (when called) `mean` does not have one number per channel.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"img_size must be one side or (height, width) in pixels, got {img_size}.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two values of width / height, 0 < low <= high, got {ratio}.")
        for option, p in (("hflip", hflip), ("vflip", vflip)):
            if not 0 <= p <= 1:
                raise ValueError(f"{option} is a probability in [0, 1], got {p}.")
        if interpolation not in ("bilinear", "bicubic", "nearest"):
            raise ValueError(f"interpolation must be 'bilinear', 'bicubic' or 'nearest', got '{interpolation}'.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must have the same length and std be positive, got {mean} and {std}.")
        self.mean, self.std = tuple(mean), tuple(std)
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(self.img_size, scale, ratio, InterpolationMode(interpolation), antialias=True)
        ]
        steps += [v2.RandomHorizontalFlip(hflip)] if hflip else []
        steps += [v2.RandomVerticalFlip(vflip)] if vflip else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        self.steps = v2.Compose(steps)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """`[C, h, w]` uint8 or float -> float32 `[C, H, W]`, normalised."""
        if len(image) != len(self.mean):
            raise ValueError(
                f"The image has {len(image)} channels but mean and std have {len(self.mean)} numbers; give one "
                "number per channel (--mean, --std)."
            )
        return self.steps(image).contiguous()


# ------------------------------------------------------------------------------------------------ samples and batches


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed in 0 .. 2**63 - 1 of one sample in one epoch, well mixed, the same everywhere and always."""
    return _mix(seed, epoch, index)


def _mix(*numbers: int) -> int:
    text = ",".join(str(int(n)) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _make_sample(
    image: torch.Tensor, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would reseed the accelerators too, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        image = transform(image)
    generator = torch.Generator().manual_seed(_mix(seed, 1))
    return image, random_mask(1, grid, mask_ratio, generator=generator)[0]


Bad = list[tuple[int, str]]


class PretrainDataset(Dataset):
    """Samples for masked pretraining, where crop, flip and mask depend on (seed, epoch, index) only.

    `dataset[epoch, index]` gives `(image [C, H, W], mask [h, w], bad)`: `mask` is bool, True = removed. A picture
    that cannot be decoded is replaced by the next one that can, under the random numbers of the original; `bad` lists
    the `(index, message)` of those that could not.

    Args:
        source: Map-style source of pictures `[C, h, w]` with `name(i)`; raises ImageError or OSError for bad ones.
        transform: Picture to image; may use torch's global CPU generator, nothing else random.
        grid: Image size in patches, `(h, w)`.
        mask_ratio: Share of the patches to remove.
        seed: Seed of the run.

    Raises:
        ValueError: The mask ratio is impossible on this grid; or, by a sample, ten pictures in a row are unreadable.
    """

    def __init__(
        self, source: Dataset, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int = 0
    ) -> None:
        self.source, self.transform, self.grid, self.mask_ratio, self.seed = source, transform, grid, mask_ratio, seed
        random_mask(1, grid, mask_ratio, generator=torch.Generator())  # complains here, not in a worker

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Bad]:
        epoch, index = key
        n, bad = len(self), []
        for offset in range(min(_MAX_BAD_IN_A_ROW, n)):
            i = (index + offset) % n
            try:
                picture = self.source[i]
                break
            except (ImageError, OSError) as error:
                bad.append((i, _named(self.source, i, error)))
        else:
            raise _too_many(bad)
        seed = sample_seed(self.seed, epoch, index)
        return *_make_sample(picture, self.transform, self.grid, self.mask_ratio, seed), bad


def _named(source: Any, i: int, error: Exception) -> str:
    name, message = source.name(i), str(error)
    return message if name in message else f"{name}: {message}"


def _too_many(bad: Bad) -> ValueError:
    return ValueError(
        f"{len(bad)} images in a row cannot be read, so this looks like more than a few bad files:\n"
        + "\n".join(message for _, message in bad)
    )


class PretrainStream(IterableDataset):
    """`PretrainDataset` for streams: yields `(image [C, H, W], mask [h, w], bad)`.

    Crop, flip and mask depend on (seed, epoch, rank, worker, position in the worker's stream); which picture stands
    at a position is up to the reader, and changes with the number of workers. A picture that cannot be decoded is
    replaced by the last one before it that could (the next one at the very start), so that every process makes
    the same number of batches; the index in `bad` is the position.

    Args:
        source: The stream.
        transform, grid, mask_ratio, seed: As for `PretrainDataset`.

    Raises:
        ValueError: The mask ratio is impossible on this grid; or, when iterating, ten pictures in a row are
            unreadable or the stream is empty.
    """

    def __init__(
        self, source: TimmStream, transform: Callable, grid: tuple[int, int], mask_ratio: float, seed: int = 0
    ) -> None:
        super().__init__()
        from timm.data.readers.shared_count import SharedCount

        self.source, self.transform, self.grid, self.mask_ratio, self.seed = source, transform, grid, mask_ratio, seed
        self.epoch = SharedCount()  # shared memory: reaches persistent workers
        random_mask(1, grid, mask_ratio, generator=torch.Generator())

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Selects the random numbers and the reader's order; call before iterating over the loader."""
        self.epoch.value = epoch
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, Bad]]:
        worker = get_worker_info()
        stream = _mix(self.seed, self.source.rank, worker.id if worker else 0)
        epoch, last, in_a_row, waiting = self.epoch.value, None, [], []
        for position, (name, picture) in enumerate(self.source.samples()):
            bad = []
            if isinstance(picture, ImageError):
                message = str(picture)
                bad = [(position, message if name in message else f"{name}: {message}")]
                in_a_row = in_a_row + bad
                if len(in_a_row) == _MAX_BAD_IN_A_ROW:
                    raise _too_many(in_a_row)
                if last is None:
                    waiting.append((position, bad))
                    continue
            else:
                last, in_a_row = picture, []
            for at, reported in [*waiting, (position, bad)]:
                seed = sample_seed(stream, epoch, at)
                yield *_make_sample(last, self.transform, self.grid, self.mask_ratio, seed), reported
            waiting = []
        if waiting:
            raise _too_many(in_a_row)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor, Bad]]) -> tuple[torch.Tensor, torch.Tensor, Bad]:
    """Joins samples to `(images [B, C, H, W], masks [B, h, w], bad)`; `bad` lists `(index, message)` of the batch."""
    images, masks, bad = zip(*samples, strict=True)
    # stacks, in a worker straight into shared memory
    return default_collate(list(images)), default_collate(list(masks)), [entry for entries in bad for entry in entries]


class EpochBatchSampler:
    """Batches of `(epoch, index)` from a permutation that depends on (seed, epoch) only.

    A global batch is `batch_size * world_size` consecutive entries of the permutation, of which rank r takes every
    `world_size`-th from r on: N processes together see the batches that one process with N times the batch size
    would. An incomplete last global batch is dropped. The epoch travels with the index, into persistent workers too.

    Args:
        num_samples: Length of the data set.
        batch_size: Images per batch and process.
        seed: Seed of the run.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: The data set is smaller than one global batch, or a number is out of range.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"Expected batch_size >= 1 and 0 <= rank < world_size, got batch_size {batch_size}, rank {rank}, "
                f"world_size {world_size}."
            )
        if world_size > num_samples:
            raise ValueError(
                f"{world_size} processes cannot share {num_samples} image{'s' * (num_samples != 1)}; start at most "
                f"{num_samples} processes."
            )
        if batch_size * world_size > num_samples:
            raise ValueError(
                f"A batch of {batch_size} images on {world_size} process{'es' * (world_size != 1)} needs "
                f"{batch_size * world_size} images, the data set has {num_samples}; the largest --batch-size that "
                f"works is {num_samples // world_size}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, per process, wherever it starts."""
        return self.num_samples // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Selects the epoch, and the batch to start from where a run is resumed in the middle of one."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch must lie in 0..{len(self)} (batches per epoch), got {start_batch}.")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        dtype = torch.int32 if self.num_samples < 2**31 else torch.int64  # half the memory for all but the largest
        order = torch.randperm(self.num_samples, generator=generator, dtype=dtype)
        step = self.batch_size * self.world_size
        order = order[: len(self) * step][self.rank :: self.world_size].clone()
        return self._batches(order, self.epoch, self.start_batch)

    def _batches(self, order: torch.Tensor, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        for begin in range(start * self.batch_size, len(order), self.batch_size):
            yield [(epoch, index) for index in order[begin : begin + self.batch_size].tolist()]


# ----------------------------------------------------------------------------------------------------- entry points


def check_readable(source: Any, tries: int = 32) -> Bad:
    """Decodes up to `tries` pictures spread over a map-style source, before a run is started on it.

    Returns:
        `(index, message)` of those that cannot be decoded, some of them.

    Raises:
        ValueError: None can be decoded; up to three are named with their reasons.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, max(1, min(tries, len(source)))).round().astype(int)).tolist()
    bad: Bad = []
    for i in indices:
        try:
            source[i]
        except (ImageError, OSError) as error:
            bad.append((i, _named(source, i, error)))
    if len(bad) == len(indices):
        reasons = "\n".join(message for _, message in bad[:3])
        raise ValueError(f"None of {len(bad)} images tried (of {len(source)}) can be read, for example:\n{reasons}")
    return bad


def create_source(
    data_dir: str | os.PathLike | None = None,
    dataset: str = "",
    split: str = "train",
    in_chans: int = 3,
    input_key: str | None = None,
    download: bool = False,
    num_samples: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> FolderSource | TimmSource | EmbeddedSource | TimmStream:
    """Picks the source that the options of a script describe.

    - `dataset=''`: `data_dir` is a folder of pictures (`FolderSource`) or a `.tar` file (`TimmSource`). Where
      `data_dir` itself holds no picture, and all its folders are named after splits (train, val, test, ...), only
      `split` is used, as timm does; otherwise everything is.
    - `dataset='embedded'`: the embedded data set; another `split` than train gives other pictures.
    - `torch/...`, `hfds/...`: `TimmSource`. `wds/...`, `hfids/...`, `tfds/...`: `TimmStream`.

    Args:
        data_dir: Folder, tar file, or the data set's root.
        dataset: Name as above.
        split: Split of the data set.
        in_chans: Channels of the pictures.
        input_key: Field that holds the picture, see `TimmSource` and `TimmStream`.
        download: Download the data set, where it can be.
        num_samples: Pictures per epoch (streams), or in all (embedded).
        batch_size: Images per batch (streams).
        seed: Seed of the order (streams).

    Raises:
        ValueError: Nothing is named, the name is unknown, or the source cannot be opened.
    """
    if dataset == "embedded":
        return EmbeddedSource(num_samples or 2048, in_chans=in_chans, seed=int(_SPLITS.get(split) != "train"))
    if _prefix(dataset) in _STREAM_PREFIXES:
        return TimmStream(dataset, data_dir, split, in_chans, num_samples, batch_size, seed, input_key, download)
    if _prefix(dataset) in _MAP_PREFIXES:
        return TimmSource(dataset, data_dir, split, in_chans, input_key, download)
    if dataset:
        raise _unknown_dataset(dataset)
    if data_dir is None or not os.fspath(data_dir):
        raise ValueError("No images named. Give a folder (--data-dir), or --dataset embedded to try things out.")
    if os.path.isfile(data_dir) and os.fspath(data_dir).lower().endswith(".tar"):
        return TimmSource("", data_dir, split, in_chans, input_key)
    return FolderSource(_split_folder(os.fspath(data_dir), split), in_chans)


def _split_folder(root: str, split: str) -> str:
    """The folder of the split in a root that holds splits only; a lone 'train' among classes is left a class."""
    if not os.path.isdir(root):
        return root
    folders, extensions = set(), image_extensions()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.add(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                return root
    if not folders or not {folder.lower() for folder in folders} <= _SPLITS.keys():
        return root
    wanted = _SPLITS.get(split, split)
    found = [split] if split in folders else sorted(folder for folder in folders if _SPLITS[folder.lower()] == wanted)
    if len(found) != 1:
        raise ValueError(
            f"{_printable(root)} holds the splits {', '.join(sorted(folders))}, expected one '{split}'. Give the "
            "folder of one of them as --data-dir."
        )
    _logger.info(f"Using the split folder {_printable(os.path.join(root, found[0]))}.")
    return os.path.join(root, found[0])
