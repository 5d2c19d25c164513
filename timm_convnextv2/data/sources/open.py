"""Words of --data-dir to a source."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..formats.decode import (
    check_in_chans,
    printable,
)
from ..formats.errors import ImageError
from ..formats.pixels import PLAIN, Pixels
from ..paths.places import Dirs, Listing, list_files, places_of
from ..samples.dataset import Bad, _named
from .embedded import EmbeddedSource
from .folder import FolderSource
from .groups import sampling_groups
from .joined import JoinedSource
from .stream import TimmStream
from .timm import _MAP_PREFIXES, _STREAM_PREFIXES, TimmSource, _prefix, _unknown_dataset


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
    pixels: Pixels = PLAIN,
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
        pixels: How stored values become pixels, see `Pixels`.
            has neither.
        data_list: Lists of pictures, see `lists.read_list`; their names are relative to `data_dir`, or where that is
            None to the folder of the list.
        source_weights: Share of an epoch's places for each of the folders or lists, in any unit.
        listing: The files of these, where they have been listed before.

    Raises:
        ValueError: Nothing is named, the name is unknown, or the source cannot be opened.
    """
    pixels = pixels.check(in_chans)
    root = check_dataset(data_dir, dataset, data_list, source_weights)
    if dataset == "embedded":
        if pixels.divide is not None or pixels.clip_low is not None:
            raise ValueError("The embedded data set is 8-bit in 0..255: leave out --divide and clip limits.")
        return EmbeddedSource(num_samples or 2048, in_chans=in_chans, seed=int(split != "train"))
    if _prefix(dataset) in _STREAM_PREFIXES:
        reading = (seed, input_key, download, whole, pixels)
        return TimmStream(dataset, root, split, in_chans, num_samples, batch_size, *reading)
    if _prefix(dataset) in _MAP_PREFIXES:
        return TimmSource(dataset, root, split, in_chans, input_key, download, pixels)
    if dataset:
        raise _unknown_dataset(dataset)
    pass

    return open_places(data_dir, data_list, source_weights, listing, in_chans, pixels)


def open_places(
    data_dir: Dirs,
    data_list: Dirs = None,
    source_weights: Sequence[float] | None = None,
    listing: Listing | None = None,
    in_chans: int = 3,
    pixels: Pixels = PLAIN,
) -> FolderSource | TimmSource | JoinedSource:
    """Opens the places that `--data-dir` and `--data-list` name, one as it is, several as one.

    Args:
        data_dir, data_list: See `places.places_of`.
        source_weights: See `weights.sampling_groups`.
        listing: Of these places, where they have been listed before.
        in_chans, pixels: See `FolderSource`.

    Raises:
        ValueError: A place cannot be opened, has no image, or weights do not fit.
    """
    check_in_chans(in_chans)
    listing = listing or list_files(places_of(data_dir, data_list))
    parts = []
    for place, names in listing.parts():
        if place.kind == "tar":
            parts.append(TimmSource("", place.root, in_chans=in_chans, pixels=pixels))
        else:
            parts.append(FolderSource(place.root, in_chans, pixels, names))
            parts[-1].grows = place.kind != "list"
    source = parts[0] if len(parts) == 1 else JoinedSource(parts)
    source.left.merge(listing.left)
    weights = listing.weights
    if weights is not None and len(weights) != len(source):
        raise ValueError("A list with weights cannot be joined with a tar file.")
    names = [printable(place.given) for place in listing.places]
    source.groups = sampling_groups([len(part) for part in parts], source_weights, weights, names)
    return source


def check_readable(source: Any, tries: int = 32, look: Callable[[torch.Tensor], None] | None = None) -> Bad:
    """Decodes up to `tries` pictures spread over a map-style source, before a run is started on it.

    Args:
        source: With `name(i)`.
        tries: Largest number of images.
        look: Called with each image that can be decoded.

    Returns:
        `(index, message)` of those that cannot be decoded, some of them.

    Raises:
        ValueError: None can be decoded; up to three are named with their reasons.
    """
    count = max(1, min(tries, len(source)))
    indices = [i * len(source) // count for i in range(count)]
    bad: Bad = []
    for i in indices:
        try:
            image = source[i]
        except (ImageError, OSError) as error:
            bad.append((i, _named(source, i, error)))
            continue
        if look is not None:
            look(image)
    if len(bad) == len(indices):
        reasons = "\n".join(message for _, message in bad[:3])
        raise ValueError(f"None of {len(bad)} images tried (of {len(source)}) can be read, for example:\n{reasons}")
    return bad
