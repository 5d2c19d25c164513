"""An index of image files: their names, written once and read by all processes through memory that they share.

It is a safetensors file, which other programs can read:

    names, name_ends   the names in one block (uint8), and where each begins and the last ends (int64)
    sizes              bytes of each file, -1 where it was missing (int64)
    weights            of a list that has them (float64)
    stamps, stamp_ends, stamp_times   listed folders and the time of their last change (int64, ns); -2 for the folder
                       of the index, which writing the index changed

The metadata lists the folders, patterns and lists, their numbers of files, and when the index was written.
"""

import json
import math
import os
import struct
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ...files import whole_file
from ..formats.decode import image_extensions
from ..formats.files import printable
from .listing import Dirs, Listing, Origin, list_files, origins_of
from .lists import FileNames
from .walk import LeftOut

_THREADS = 16  # file systems may be remote
_CHUNK = 4096
_BATCH = 64
_NAMED = 5


def file_sizes(
    listing: Listing, tick: Callable[[int], Any] | None = None, most_missing: float = math.inf
) -> np.ndarray:
    """Bytes of each file, int64, -1 if missing; stops early, with fewer sizes, after more than `most_missing`."""
    sizes, done, missing = np.empty(len(listing.names), np.int64), 0, 0
    paths = (os.path.join(origin.root, name) for origin, names in listing.parts() for name in names)
    with ThreadPoolExecutor(_THREADS) as pool:
        while missing <= most_missing and (chunk := [*islice(paths, _CHUNK)]):
            # in batches: a task per file costs more than `stat`
            batches = [chunk[i : i + _BATCH] for i in range(0, len(chunk), _BATCH)]
            found = [size for batch in pool.map(lambda paths: [*map(_size, paths)], batches) for size in batch]
            sizes[done : done + len(chunk)] = found
            done, missing = done + len(chunk), missing + found.count(-1)
            if tick is not None:
                tick(len(chunk))
    return sizes[:done]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def check_missing(listing: Listing, sizes: np.ndarray, share: float) -> str:
    """A message about missing files, '' if there are none."""
    (absent,) = np.nonzero(sizes < 0)
    if not len(absent):
        return ""
    looked = "" if len(sizes) == len(listing.names) else f" of the first {len(sizes)}"
    found = (
        f"{len(absent)}{looked} of {len(listing.names)} listed images are missing, for example "
        f"{', '.join(printable(listing.path(i)) for i in absent[:_NAMED])}"
    )
    if len(absent) > share * len(listing.names):
        raise ValueError(
            f"{found}; --max-bad-images allows a fraction of {share:g}. Names are relative to the list, "
            "or to --data-dir if that is given with --data-list."
        )
    return f"{found}; others stand in for them."


def check_index_option(dataset: str, index: str | os.PathLike | None) -> None:
    """Refuses --index with --dataset."""
    if dataset and index:
        raise ValueError(f"--index is for image files: leave it out with --dataset {dataset}.")


def find_images(
    data_dir: Dirs,
    data_list: Dirs = None,
    *,
    index: str | os.PathLike | None = None,
    max_missing: float | None = None,
    tick: Callable[[int], Any] | None = None,
    notify: Callable[[str], Any] = lambda text: None,
) -> Listing:
    """The image files of folders, patterns and lists; one process calls it for all.

    Args:
        data_dir, data_list: See `origins.origins_of`.
        index: Index to open, or to write if it does not exist.
        max_missing: Fraction of the files of lists that may be missing; None skips the check.
        tick: Called now and then with the number of files that were just found or checked.
        notify: Receives messages for the user.

    Raises:
        ValueError: A folder or list cannot be read, too many files are missing, or the index cannot be used.
        WriteError: (an OSError) The index cannot be written.
    """
    origins = origins_of(data_dir, data_list)
    if index is None:
        listing = list_files(origins, tick)
        if max_missing is not None and any(origin.kind == "list" for origin in origins):
            most = max_missing * len(listing.names)
            if found := check_missing(listing, file_sizes(listing, tick, most), max_missing):
                notify(found)
        return listing
    tars = [origin.given for origin in origins if origin.kind == "tar"]
    if tars:
        raise ValueError(f"--index is for files in folders, not for a tar file ({tars[0]}). Leave it out.")
    if os.path.lexists(index):
        listing = open_index(index, origins)
        if found := stale(index):
            notify(found)
    else:
        listing = list_files(origins, tick, stamps=True)
        sizes = file_sizes(listing, tick)
        if max_missing is not None:
            check_missing(listing, sizes, max_missing)
        write_index(index, listing, sizes)
        notify(f"Written: {os.fspath(index)}, an index of {len(listing.names)} images.")
        listing = open_index(index, origins)
    if max_missing is not None and (found := check_missing(listing, index_sizes(index), max_missing)):
        notify(found)
    return listing


_FORMAT, _VERSION = "timm_convnextv2 file index", "1"
_TYPES = {"U8": np.uint8, "I64": np.int64, "F64": np.float64}
_TWO = struct.Struct("<2q")  # begin and end of a name
_OWN = -2  # instead of a time: the folder of the index
_MOST_HEADER = 100_000_000  # bytes, as in safetensors


class IndexedNames(FileNames):
    """Names in an index; pickled as the path of the index.

    Each name is read on access, in two reads from the system's cache, which all processes share. Not memory-mapped: a
    map counts as memory of each process, 64 KiB and more per name, and a truncated file would kill the process.
    """

    def __init__(self, path: str, token: str, first: int = 0, count: int | None = None) -> None:
        index = _Index(path)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as the names live
        if index.metadata["token"] != token or os.fstat(self.file.fileno()).st_size != index.size:
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
        """`count` names from `first` on, from the same open file."""
        part = object.__new__(IndexedNames)  # `copy` would open the file again
        vars(part).update(vars(self))
        part.first, part.count = self.first + first, count
        return part

    def __reduce__(self) -> tuple:
        return IndexedNames, (self.path, self.token, self.first, self.count)


def write_index(path: str | os.PathLike, listing: Listing, sizes: np.ndarray) -> None:
    """Writes an index, whole or not at all."""
    home = os.path.dirname(os.path.abspath(path))
    stamps, times = [os.path.abspath(folder) for folder, _ in listing.stamps], [time for _, time in listing.stamps]
    # writing the index changes the folder that it is in
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
        "places": json.dumps([_identity(origin) for origin in listing.origins]),
        "counts": json.dumps(listing.counts),
        "extensions": json.dumps(image_extensions()),
        "left": json.dumps(left),
    }
    with whole_file(path) as part:
        save_file(arrays, part, metadata)
    if _OWN in times:
        changed = _last_change(home)
        os.utime(path, ns=(changed, changed))


def _identity(origin: Origin) -> list[str]:
    """An origin, named the same way on all machines that share its folder."""
    return [origin.kind, *(os.fsencode(os.path.abspath(p)).decode("utf-8", "replace") for p in origin[1:])]


class _Index:
    """An index file.

    Attributes:
        metadata: Its description.
        size: Bytes of the file.
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
                raise ValueError("it is not an index of image files")
            if self.metadata.get("version") != _VERSION:
                raise ValueError(f"it has version {self.metadata.get('version')}, this package reads {_VERSION}")
            ends = [8 + length + about["data_offsets"][1] for about in header.values()]
            if max(ends) != size:
                raise ValueError(f"it is corrupt: expected {max(ends)} bytes, found {size}")
            self._arrays = {
                name: (_TYPES[about["dtype"]], 8 + length + about["data_offsets"][0], int(about["shape"][0]))
                for name, about in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"--index {printable(path)} cannot be used: {error}. Remove it to have it rewritten, or give another "
                "file."
            ) from error

    def read(self, name: str) -> np.ndarray:
        """Loads an array."""
        kind, offset, count = self._arrays[name]
        return np.fromfile(self.path, kind, count, offset=offset)

    def offset(self, name: str) -> int:
        """Position of an array in the file, in bytes."""
        return self._arrays[name][1]

    def length(self, name: str) -> int:
        """Length of an array."""
        return self._arrays[name][2]

    @property
    def weighted(self) -> bool:
        """Whether its images have weights."""
        return "weights" in self._arrays


def open_index(path: str | os.PathLike, origins: list[Origin]) -> Listing:
    """The files in an index that was written for these origins."""
    path = os.fspath(path)
    index = _Index(path)
    metadata = index.metadata
    known, wanted = json.loads(metadata["places"]), [_identity(origin) for origin in origins]
    if known != wanted:
        own, given = (", ".join(origin[1] for origin in listed) for listed in (known, wanted))
        raise ValueError(
            f"--index {printable(path)} is an index of {own}, not of {given}. Give another file, or remove it to have "
            "it rewritten."
        )
    record = json.loads(metadata["left"])
    left = LeftOut(Counter(record["ignored"]), record["special"], record["num"])
    weights = index.read("weights") if index.weighted else None
    names = IndexedNames(path, metadata["token"])
    return Listing(origins, json.loads(metadata["counts"]), names, weights, left)


def index_sizes(path: str | os.PathLike) -> np.ndarray:
    """The sizes in an index, see `file_sizes`."""
    return _Index(path).read("sizes")


def stale(path: str | os.PathLike) -> str:
    """A sentence about changes since an index was written, '' if there are none.

    A folder changes if something in it is created, renamed or removed; files that are overwritten go unnoticed.
    """
    index = _Index(path)
    metadata = index.metadata
    folders, changed = FileNames(index.read("stamps"), index.read("stamp_ends")), []
    for i, then in enumerate(index.read("stamp_times").tolist()):
        if _last_change(folders[i]) != (_last_change(path) if then == _OWN else then):
            changed.append(i)
    kinds = {*json.loads(metadata["extensions"])} ^ {*image_extensions()}
    why = []
    if changed:
        why.append(
            f"{len(changed)} of {len(folders)} folders and lists have changed, for example "
            f"{printable(folders[changed[0]])}"
        )
    if kinds:
        why.append(f"other extensions count as images now: {' '.join(sorted(kinds))}")
    if not why:
        return ""
    return (
        f"--index {printable(path)} is stale: since it was written ({metadata['written']}), {'; '.join(why)}. Its "
        "names are used as they are; remove it to have it rewritten."
    )


def _last_change(path: str | os.PathLike) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
