"""Timm's data sets as a source."""

import os
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..formats.decode import (
    Choose,
    Reduced,
    check_in_chans,
    check_index,
    decode,
    from_pil,
    printable,
)
from ..formats.errors import ImageError, MissingPackageError
from ..formats.pixels import PLAIN, Pixels
from ..paths.walk import LeftOut, open_tar
from .groups import Groups

_STREAM_PREFIXES = ("wds", "hfids", "tfds")


_MAP_PREFIXES = ("torch", "hfds")


_READER_PACKAGES = dict(wds="webdataset", hfds="datasets", hfids="datasets", tfds="tensorflow tensorflow-datasets")


class TimmSource(Dataset):
    """Pictures of a map-style data set that timm can open; targets are neither needed nor read.

    Args:
        name: timm's spelling: `hfds/<name or folder>`, `torch/<name>`, or '' for timm's folder and tar readers.
        root: Folder, tar file, or download cache.
        split: Split of the data set.
        in_chans: Channels that pictures are converted to, see `load_image`.
        input_key: Column that holds the picture (`hfds/`, default 'image') or extensions (folders).
        download: Let torchvision download the data set.
        pixels: How stored values become pixels, see `Pixels`.

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
        pixels: Pixels = PLAIN,
    ) -> None:
        self.dataset_name, self.in_chans, self.pixels = name or str(root), check_in_chans(in_chans), pixels
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
        return decode_any(*self._read(i), self.in_chans, pixels=self.pixels)

    def load_reduced(self, i: int, choose: Choose) -> torch.Tensor | Reduced:
        """Picture `i`, `Reduced` if it is a JPEG whose size makes `choose` answer more than 1."""
        return decode_any(*self._read(i), self.in_chans, choose, self.pixels)

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
    pixels: Pixels = PLAIN,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes what the readers of timm and torchvision give: a path, bytes, an open file, or a Pillow image.

    See `decode.decode` for `choose` and `convert`.
    """
    if isinstance(picture, Image.Image):
        try:
            picture = picture.copy()  # converting turns an image in place
            if convert is not None and pixels.plain:
                return convert(picture, in_chans)
            return from_pil(picture, in_chans, pixels)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
    if hasattr(picture, "read"):
        with picture:
            picture = picture.read()
    if not isinstance(picture, str | bytes):
        raise ImageError(f"{name}: is {type(picture).__name__}, expected a picture; check the name of the input key")
    return decode(picture, in_chans, name, choose, pixels, convert)


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
