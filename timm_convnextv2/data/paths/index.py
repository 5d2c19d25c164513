"""An index of image files: their names, written once and read by all processes through memory that they share.

A safetensors file, which other programs can read; docs/data.md describes its arrays.
"""

import hashlib
import json
import os
import struct
import uuid
from collections import Counter
from datetime import datetime, timezone

import numpy as np
from safetensors.numpy import save_file

from ...files import remove_leftovers, whole_file
from ..formats.decode import image_extensions
from ..formats.files import printable
from .listing import Listing, Origin
from .lists import FileNames
from .walk import LeftOut

_FORMAT = "timm_convnextv2 file index, version 2"
_TYPES = {"U8": np.dtype(np.uint8), "I64": np.dtype(np.int64), "F64": np.dtype(np.float64)}
_TWO = struct.Struct("<2q")  # begin and end of a name
_OWN = -2  # instead of a time: the folder of the index
_NO_DIGEST = "0" * 32
_MOST_HEADER = 100_000_000  # bytes, as in safetensors


class Index:
    """An index file: `about` describes it, `arrays` has type, position in the file and length of each array."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _MOST_HEADER)))
            metadata = header.pop("__metadata__")
            if metadata["format"] != _FORMAT:
                raise ValueError(f"it is a '{metadata['format']}', expected a '{_FORMAT}'")
            self.digest, self.start = metadata["digest"], 8 + length
            self.about, self.size = json.loads(metadata["about"]), os.path.getsize(self.path)
            self.arrays = {
                name: (_TYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0], entry["shape"][0])
                for name, entry in header.items()
            }
            end = max(at + count * kind.itemsize for kind, at, count in self.arrays.values())
            if end != self.size:
                raise ValueError(f"it is corrupt: expected {end} bytes, found {self.size}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self._unusable(error if isinstance(error, OSError | ValueError) else "it is corrupt") from error

    def _unusable(self, why: object) -> ValueError:
        path = printable(self.path)
        return ValueError(f"--index {path} cannot be used: {why}. Remove it to have it rewritten, or give another.")

    def verify(self) -> "Index":
        """Returns itself if its bytes have the checksum; reads the whole file."""
        if _digest(self.path, self.start, str(self.digest)) != self.digest:
            raise self._unusable("it is corrupt: its checksum is wrong")
        return self

    def read(self, name: str) -> np.ndarray:
        """Loads an array."""
        kind, offset, count = self.arrays[name]
        return np.fromfile(self.path, kind, count, offset=offset)

    def listing(self, origins: list[Origin]) -> Listing:
        """Its files; a ValueError unless it was written for these origins."""
        written, wanted = self.about["origins"], [origin.record() for origin in origins]
        if written != wanted:
            own, given = (", ".join(record[1] for record in records) for records in (written, wanted))
            raise ValueError(
                f"--index {printable(self.path)} is an index of {own}, not of {given}. Give another file, or remove it "
                "to have it rewritten."
            )
        names, first = [], 0
        for count in self.about["counts"]:
            names.append(IndexedNames(self.path, self.about["token"], first, count))
            first += count
        weights = self.read("weights") if "weights" in self.arrays else None
        ignored, special, count = self.about["left"]
        return Listing(origins, names, weights, LeftOut(Counter(ignored), special, count))

    def changes(self) -> str:
        """A sentence about changes since it was written, '' if there are none.

        A folder changes if something in it is created, renamed or removed; files that are overwritten go unnoticed.
        """
        folders, written, why = FileNames(self.read("stamps"), self.read("stamp_ends")), _last_change(self.path), []
        times = (written if time == _OWN else time for time in self.read("stamp_times").tolist())
        changed = [printable(f) for f, time in zip(folders, times, strict=True) if _last_change(f) != time]
        if changed:
            why.append(f"{len(changed)} of {len(folders)} folders and lists have changed, for example {changed[0]}")
        if kinds := {*self.about["extensions"]} ^ {*image_extensions()}:
            why.append(f"other extensions count as images now: {' '.join(sorted(kinds))}")
        since = f"--index {printable(self.path)} is stale: since it was written ({self.about['written']}), "
        return (
            f"{since}{'; '.join(why)}. Its names are used as they are; remove it to have it rewritten." if why else ""
        )


class IndexedNames(FileNames):
    """Names in an index, each read on access through the system's cache; pickled as the path of the index."""

    # Not memory-mapped: a map counts as memory of each process, 64 KiB and more per name, and a truncated file would
    # kill the process.

    def __init__(self, path: str, token: str, first: int, count: int) -> None:
        index = Index(path)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as the names live
        if index.about["token"] != token or os.fstat(self.file.fileno()).st_size != index.size:
            raise ValueError(f"--index {printable(path)} was replaced while the command ran. Start it again.")
        self.names_at, self.ends_at = index.arrays["names"][1], index.arrays["name_ends"][1] + 8 * first
        self.state = path, token, first, count

    def __len__(self) -> int:
        return self.state[3]

    def __getitem__(self, i: int) -> str:
        number = self.file.fileno()
        begin, end = _TWO.unpack(os.pread(number, _TWO.size, self.ends_at + 8 * i))
        return os.fsdecode(os.pread(number, end - begin, self.names_at + begin))

    def __reduce__(self) -> tuple:
        return IndexedNames, self.state


def write_index(path: str | os.PathLike, listing: Listing, sizes: np.ndarray) -> None:
    """Writes an index, whole or not at all."""
    home = os.path.dirname(os.path.abspath(path))
    folders = FileNames.collect(os.fsencode(os.path.abspath(folder)) for folder, _ in listing.stamps)
    now = _last_change(home)  # writing the index changes the folder that it is in
    times = [_OWN if (f, time) == (home, now) else time for f, (_, time) in zip(folders, listing.stamps, strict=True)]
    starts = np.cumsum([0, *(len(names.block) for names in listing.names)])
    ends = [names.ends[1:] + start for names, start in zip(listing.names, starts, strict=False)]
    arrays = {
        "names": np.frombuffer(b"".join(names.block for names in listing.names), np.uint8),
        "name_ends": np.concatenate([np.zeros(1, np.int64), *ends]),
        "sizes": sizes,
        "stamps": np.frombuffer(folders.block, np.uint8),
        "stamp_ends": folders.ends,
        "stamp_times": np.array(times, np.int64),
    }
    if listing.weights is not None:
        arrays["weights"] = listing.weights
    about = {
        "token": uuid.uuid4().hex,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "origins": [origin.record() for origin in listing.origins],
        "counts": [len(names) for names in listing.names],
        "extensions": image_extensions(),
        "left": [listing.left.ignored, listing.left.special, listing.left.num_special],
    }
    remove_leftovers(os.path.dirname(path) or ".", [os.path.basename(path)])
    with whole_file(path) as part:
        save_file(arrays, part, {"format": _FORMAT, "about": json.dumps(about), "digest": _NO_DIGEST})
        with open(part, "r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            at = 8 + file.read(start - 8).index(f'"{_NO_DIGEST}"'.encode()) + 1
            digest = _digest(part, start, _NO_DIGEST)
            file.seek(at)
            file.write(digest.encode())
    if _OWN in times:
        changed = _last_change(home)
        os.utime(path, ns=(changed, changed))


def _digest(path: str | os.PathLike, start: int, blanked: str) -> str:
    """Checksum of an index whose arrays begin at `start`, as if its header had no digest instead of `blanked`."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        state.update(file.read(start).replace(blanked.encode(), _NO_DIGEST.encode()))
        while part := file.read(2**20):
            state.update(part)
    return state.hexdigest()


def _last_change(path: str | os.PathLike) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
