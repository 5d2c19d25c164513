"""Data sets that timm opens: those with an index, and what all of them share."""

import os
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset

from ..config import DataSet
from ..formats.decode import check_index, decode, finished
from ..formats.errors import ImageError, MissingPackageError
from ..formats.files import printable
from ..formats.pillow import Choose, Reduced, from_pil
from ..formats.pixels import PLAIN, Pixels
from ..paths.walk import LeftOut, open_tar
from .source import Source

STREAMS = ("wds", "hfids", "tfds")
MAPS = ("torch", "hfds")
_READER_PACKAGES = dict(wds="webdataset", hfds="datasets", hfids="datasets", tfds="tensorflow tensorflow-datasets")


class TimmSource(Source):
    """Images of a data set with an index that timm can open; targets are neither needed nor read.

    The data set is `hfds/<name or folder>`, `torch/<name>`, or '' for timm's folder and tar readers; `input_key` is the
    image column (`hfds/`) or the extensions (folders).
    """

    def __init__(
        self, data_set: DataSet, root: str | os.PathLike | None = None, in_chans: int = 3, pixels: Pixels = PLAIN
    ) -> None:
        super().__init__(in_chans, pixels)
        name, input_key = data_set.dataset, data_set.input_key
        self.dataset_name = name or str(root)
        self.prefix = prefix = prefix_of(name)
        if prefix in STREAMS:
            raise ValueError(f"Data set '{name}' is a stream, which has no index. Use TimmStream.")
        if name and prefix not in MAPS:  # else timm would ignore the name and read the folder
            raise unknown_dataset(name)
        kwargs: dict[str, Any] = {"input_key": input_key} if input_key else {}
        if prefix == "torch" and input_key:
            raise ValueError(f"input_key='{input_key}' does not apply to '{name}'; leave it out.")
        if prefix == "hfds":
            kwargs["target_key"] = input_key or "image"  # timm requires a target column; the image column always exists
        if not name and (root is None or not os.path.exists(root)):
            raise ValueError(f"Data set folder {root} does not exist. Check --data-dir.")
        self.left = LeftOut()
        if not name and root is not None and os.fspath(root).lower().endswith(".tar") and os.path.isfile(root):
            extensions = input_key.lower().split(";") if input_key else None
            reader, self.left = open_tar(os.fspath(root), extensions=extensions)
            self.dataset: Any = ImageDataset(None, reader=reader)  # type: ignore[arg-type]  # it takes a reader, too
        else:
            self.dataset = open_dataset(data_set, root, **kwargs)
        self.reader: Any = getattr(self.dataset, "reader", None)  # torchvision's data sets have none
        if not len(self.dataset):
            split = data_set.split
            raise ValueError(f"Split '{split}' of data set '{self.dataset_name}' has no sample. Choose another split.")
        if prefix == "hfds":
            self._select_column(name)
        if self.reader is None and hasattr(self.dataset, "loader"):
            self.dataset.loader = os.fspath  # torchvision would convert to 8-bit RGB; ours takes the path

    def _select_column(self, name: str) -> None:
        """Drops all columns but the image, because they would be decoded too."""
        key, columns = self.reader.image_key, self.reader.dataset.column_names
        rows = self.reader.dataset = self.reader.dataset.select_columns([key])
        # timm's cast adds a missing column without content
        if all(rows[i][key] is None for i in range(min(len(rows), 10))):
            others = ", ".join(column for column in columns if column != key)
            raise ValueError(f"Data set '{name}' has no image in column '{key}'; set input_key to one of: {others}.")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int, choose: Choose | None = None, seed: int | None = None) -> torch.Tensor | Reduced:
        i = check_index(i, len(self))
        # the file name of an hfds sample costs as much as the sample itself
        name = f"{self.dataset_name} sample {i}" if self.prefix == "hfds" else self.name(i)
        try:
            # timm's ImageDataset replaces unreadable samples silently; its reader does not
            image = self.dataset[i][0] if self.reader is None else self.reader[i][0]
        except Exception as error:  # as varied as the readers
            raise ImageError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error
        return decode_any(image, name, self.in_chans, choose, self.pixels)

    def name(self, i: int) -> str:
        """File name that the reader has for sample `i`, or '<data set> sample <i>'."""
        path = None
        if self.prefix == "hfds":
            path = (self.reader.dataset[i][self.reader.image_key] or {}).get("path")
        elif self.reader is not None:
            path = self.reader.filename(i, absolute=True)
        elif hasattr(self.dataset, "samples"):
            path = self.dataset.samples[i][0]
        return printable(path) if path else f"{self.dataset_name} sample {i}"

    def full_name(self, i: int) -> str:
        """Path of the tar file, and the name of sample `i` in it."""
        return f"{printable(self.dataset_name)}/{self.name(i)}"


def prefix_of(name: str) -> str:
    """'hfds' of 'hfds/NAME'; '' of a name without prefix."""
    return name.partition("/")[0].lower() if "/" in name else ""


def unknown_dataset(name: str) -> ValueError:
    """The error for a name without a known prefix."""
    prefixes = ", ".join(f"{prefix}/" for prefix in (*MAPS, *STREAMS))
    return ValueError(
        f"Unknown data set '{name}'. Expected '' (a folder of images), 'demo', or a name that starts with one of "
        f"{prefixes}."
    )


def open_dataset(data_set: DataSet, root: str | os.PathLike | None, **kwargs: Any) -> Any:
    """Opens a data set with timm's `create_dataset`."""
    from timm.data import create_dataset

    name, split = data_set.dataset, data_set.split
    try:
        root_path = None if root is None else os.fspath(root)
        return create_dataset(name, root=root_path, split=split, download=data_set.dataset_download, **kwargs)
    except Exception as error:  # readers raise AssertionError, RuntimeError, KeyError, FileNotFoundError, ...
        if isinstance(error, ImportError) or "Please install" in str(error):
            package = _READER_PACKAGES.get(prefix_of(name), getattr(error, "name", None))
            raise MissingPackageError(f"Data set '{name}': {error} Run `pip install {package}`.") from error
        raise ValueError(
            f"timm cannot open data set '{name}' (root {root}, split '{split}', {kwargs}): "
            f"{type(error).__name__}: {error}"
        ) from error


def decode_any(
    image: Any,
    name: str,
    in_chans: int,
    choose: Choose | None = None,
    pixels: Pixels = PLAIN,
    convert: Callable[[Image.Image, int], Any] | None = None,
) -> Any:
    """Decodes a sample of a reader of timm or torchvision: a path, bytes, an open file, or a Pillow image.

    See `decode.decode` for `choose` and `convert`.
    """
    if isinstance(image, Image.Image):
        try:
            image = image.copy()  # converting rotates in place
            if convert is not None and pixels.plain:
                return convert(image, in_chans)
            return finished(from_pil(image, in_chans, pixels), pixels)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
    if hasattr(image, "read"):
        with image:
            image = image.read()
    if isinstance(image, bytes) and not image:
        raise ImageError(f"{name}: has no image, check the name of the input key")
    if not isinstance(image, str | bytes):
        raise ImageError(f"{name}: is {type(image).__name__}, expected an image; check the name of the input key")
    return decode(image, in_chans, name, choose, pixels, convert)
