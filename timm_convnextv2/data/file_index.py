"""An index of image files: their names, written once and read by all processes from memory that they share.

It is a safetensors file, which other programs can read, too:

    names, name_ends   the names one after the other (uint8), and where each begins and the last ends (int64)
    sizes              bytes of each file, -1 where it was missing (int64)
    weights            of a list that has them (float64)
    stamps, stamp_ends, stamp_times   folders that were listed, and when each had last changed (int64, ns); -2 for that
                       of the index itself, which last changed when the index did

The metadata say of which places it is, how many files each has, and when it was written.
"""

import copy
import json
import os
import struct
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..files import whole_file
from .decode import image_extensions, printable
from .listing import LeftOut
from .names import FileNames
from .places import Listing, Place

__all__ = ["open_index", "stale", "write_index"]

_FORMAT, _VERSION = "timm_convnextv2 file index", "1"
_TYPES = {"U8": np.uint8, "I64": np.int64, "F64": np.float64}
_TWO = struct.Struct("<2q")  # where a name begins and ends
_OWN = -2  # in the place of a time: the folder of the index itself, which last changed when the index did
_MOST_HEADER = 100_000_000  # bytes, as safetensors itself


class IndexedNames(FileNames):
    """Names in an index: pickled, they are its path.

    Each is read where it is asked for, in two reads that the system answers from memory that all processes share. A
    mapping would do the same, but counts as memory of each process, 64 KiB and more a name, and ends the process where
    the file is cut short.

    Args:
        path: The index.
        token: Its identity, so that no process reads another one that has taken its place.
        first, count: The part of its names; all of them by default.

    Raises:
        ValueError: It is not there any more, or another.
    """

    def __init__(self, path: str, token: str, first: int = 0, count: int | None = None) -> None:
        index = _Index(path)
        if index.metadata["token"] != token:
            raise ValueError(f"--index {printable(path)} was replaced while the command ran. Start it again.")
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # as long as the names
        if os.fstat(self.file.fileno()).st_size != index.size:
            raise ValueError(f"--index {printable(path)} was replaced while the command ran. Start it again.")
        self.names_at, self.ends_at = index.offset("names"), index.offset("name_ends")
        self.path, self.token, self.first = path, token, first
        self.count = index.length("name_ends") - 1 if count is None else count

    def __len__(self) -> int:
        return self.count

    def raw(self, i: int) -> bytes:
        """Name `i` as bytes."""
        number = self.file.fileno()
        begin, end = _TWO.unpack(os.pread(number, _TWO.size, self.ends_at + 8 * (self.first + i)))
        return os.pread(number, end - begin, self.names_at + begin)

    def part(self, first: int, count: int) -> "IndexedNames":
        """`count` names from `first` on, of the same file."""
        part = copy.copy(self)
        part.first, part.count = self.first + first, count
        return part

    def __copy__(self) -> "IndexedNames":
        same = object.__new__(IndexedNames)
        vars(same).update(vars(self))
        return same

    def __reduce__(self) -> tuple:
        return IndexedNames, (self.path, self.token, self.first, self.count)


def write_index(path: str | os.PathLike, listing: Listing, sizes: np.ndarray) -> None:
    """Writes an index, whole or not at all.

    Args:
        path: Where to.
        listing: Listed with stamps.
        sizes: Of `sizes.file_sizes`.

    Raises:
        WriteError: (an OSError) It cannot be written.
    """
    home = os.path.dirname(os.path.abspath(path))
    stamps, times = [os.path.abspath(folder) for folder, _ in listing.stamps], [time for _, time in listing.stamps]
    # writing changes the folder that the index is in
    times = [_OWN if f == home and t == _last_change(f) else t for f, t in zip(stamps, times, strict=True)]
    folders = FileNames.collect(map(os.fsencode, stamps))
    arrays = {
        "names": np.frombuffer(listing.names.block, np.uint8),
        "name_ends": np.asarray(listing.names.ends),
        "sizes": sizes,
        "stamps": np.frombuffer(folders.block, np.uint8),
        "stamp_ends": folders.ends,
        "stamp_times": np.array(times, np.int64),
    }
    if listing.weights is not None:
        arrays["weights"] = listing.weights
    left = {"ignored": listing.left.ignored, "special": listing.left.special, "num": listing.left.num_special}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "token": uuid.uuid4().hex,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "places": json.dumps([_identity(place) for place in listing.places]),
        "counts": json.dumps(listing.counts),
        "extensions": json.dumps(image_extensions()),
        "left": json.dumps(left),
    }
    with whole_file(path) as part:
        save_file(arrays, part, metadata)
    if _OWN in times:
        changed = _last_change(home)
        os.utime(path, ns=(changed, changed))


def _identity(place: Place) -> list[str]:
    """A place as all machines that see its folder know it."""
    return [place.kind, *(os.fsencode(os.path.abspath(p)).decode("utf-8", "replace") for p in place[1:])]


class _Index:
    """An index file.

    Args:
        path: Of it.

    Attributes:
        metadata: What it says of itself.
        size: Bytes of the file.

    Raises:
        ValueError: It cannot be read, or is no index, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        try:
            self.size = size = os.path.getsize(path)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= min(size, _MOST_HEADER) else {}
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if self.metadata.get("format") != _FORMAT:
                raise ValueError("it is no index of image files")
            if self.metadata.get("version") != _VERSION:
                raise ValueError(f"it has version {self.metadata.get('version')}, this package reads {_VERSION}")
            ends = [8 + length + about["data_offsets"][1] for about in header.values()]
            if max(ends) != size:
                raise ValueError("it is damaged: its length is another than it says")
            self._arrays = {
                name: (_TYPES[about["dtype"]], 8 + length + about["data_offsets"][0], int(about["shape"][0]))
                for name, about in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"--index {printable(path)} cannot be used: {error}. Remove it to have it written anew, or name "
                "another file."
            ) from error

    def read(self, name: str) -> np.ndarray:
        """An array, in memory of this process."""
        kind, offset, count = self._arrays[name]
        return np.fromfile(self.path, kind, count, offset=offset)

    def offset(self, name: str) -> int:
        """Where an array begins in the file, in bytes."""
        return self._arrays[name][1]

    def length(self, name: str) -> int:
        """Numbers of an array."""
        return self._arrays[name][2]

    @property
    def weighted(self) -> bool:
        """Whether its images have weights."""
        return "weights" in self._arrays


def open_index(path: str | os.PathLike, places: list[Place]) -> Listing:
    """The files that an index has, for these places.

    Raises:
        ValueError: It cannot be read, or is of other places.
    """
    path = os.fspath(path)
    index = _Index(path)
    metadata = index.metadata
    known, wanted = json.loads(metadata["places"]), [_identity(place) for place in places]
    if known != wanted:
        own, given = (", ".join(place[1] for place in listed) for listed in (known, wanted))
        raise ValueError(
            f"--index {printable(path)} is an index of {own}, not of {given}. Name another file, or remove it to have "
            "it written anew."
        )
    left = json.loads(metadata["left"])
    return Listing(
        places,
        json.loads(metadata["counts"]),
        IndexedNames(path, metadata["token"]),
        index.read("weights") if index.weighted else None,
        _left(left),
    )


def _left(record: dict[str, Any]) -> LeftOut:
    left = LeftOut(special=record["special"], num_special=record["num"])
    left.ignored.update(record["ignored"])
    return left


def index_sizes(path: str | os.PathLike) -> np.ndarray:
    """Sizes that an index has, see `sizes.file_sizes`."""
    return _Index(path).read("sizes")


def stale(path: str | os.PathLike, tick: Callable[[int], Any] | None = None) -> str:
    """What has changed since an index was written, in a sentence; '' where nothing has.

    A folder changes when something in it is made, renamed or removed; files that are written anew are not noticed.

    Args:
        path: The index.
        tick: Called for each folder.
    """
    index = _Index(path)
    metadata = index.metadata
    folders, changed = FileNames(index.read("stamps"), index.read("stamp_ends")), []
    for i, then in enumerate(index.read("stamp_times").tolist()):
        if _last_change(folders[i]) != (_last_change(path) if then == _OWN else then):
            changed.append(i)
        if tick is not None:
            tick(1)
    kinds = {*json.loads(metadata["extensions"])} ^ {*image_extensions()}
    why = []
    if changed:
        why.append(
            f"{len(changed)} of {len(folders)} folders and lists that it is of have changed, for example "
            f"{printable(folders[changed[0]])}"
        )
    if kinds:
        why.append(f"other extensions count as images now: {' '.join(sorted(kinds))}")
    if not why:
        return ""
    return (
        f"--index {printable(path)} is stale: since it was written ({metadata['written']}), {'; '.join(why)}. Its "
        "names are used as they are; remove it to have it written anew."
    )


def _last_change(path: str | os.PathLike) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
