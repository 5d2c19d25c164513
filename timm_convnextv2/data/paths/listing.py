"""Finds the image files of folders, tar files, patterns and lists (their origins) as options name them."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..formats.decode import image_extensions
from ..formats.files import printable
from .lists import FileNames, read_list
from .walk import LeftOut, walk

Dirs = str | os.PathLike | Sequence[str | os.PathLike] | None
_MAGIC = re.compile(r"[*?[]")
_TICK = 4096


class Origin(NamedTuple):
    """Where images are."""

    kind: str  # 'folder', 'tar', 'glob' or 'list'
    given: str  # the user's word
    root: str  # the folder that its names are relative to; for a tar, the file itself


@dataclass
class Listing:
    """The image files of folders, tar files, patterns and lists."""

    origins: list[Origin]
    counts: list[int]  # number of files in each; 0 for a tar, which lists itself when it is opened
    names: FileNames  # in the order of origins, relative to their roots
    # float64, one per file, if a list has weights (1 for files of other lists); else None
    weights: np.ndarray | None = None
    left: LeftOut = field(default_factory=LeftOut)  # other files
    # folders (or lists) that were read, and the time of their last change, in ns
    stamps: list[tuple[str, int]] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[Origin, FileNames]]:
        """Each origin with its names."""
        first = 0
        for origin, count in zip(self.origins, self.counts, strict=True):
            yield origin, self.names.part(first, count)
            first += count

    def path(self, i: int) -> str:
        """Path of file `i` of all."""
        at = int(np.searchsorted(np.cumsum(self.counts), i, side="right"))
        return os.path.join(self.origins[at].root, self.names[i])


def as_list(value: Dirs) -> list[str]:
    """One path or several as a list."""
    if value is None:
        return []
    return [os.fspath(value)] if isinstance(value, str | os.PathLike) else [os.fspath(v) for v in value]


def origins_of(data_dir: Dirs, data_list: Dirs = None) -> list[Origin]:
    """The folders, tar files, patterns or lists that the options name."""
    dirs, lists = [d for d in as_list(data_dir) if d], as_list(data_list)
    if lists:
        if len(dirs) > 1 or dirs and not os.path.isdir(dirs[0]):
            raise ValueError(
                f"With --data-list, --data-dir is the one folder that the list's names are relative to, got "
                f"{' '.join(map(printable, dirs))}."
            )
        for path in lists:
            if not os.path.isfile(path):
                raise ValueError(f"--data-list {printable(path)} does not exist, or is not a file.")
        return [Origin("list", path, dirs[0] if dirs else os.path.dirname(path)) for path in lists]
    if not dirs:
        raise ValueError("No images given. Give a folder (--data-dir), or --dataset embedded to try things out.")
    origins = [_origin(path) for path in dirs]
    _check_apart([origin for origin in origins if origin.kind in ("folder", "tar")])
    return origins


def _origin(path: str) -> Origin:
    if os.path.isdir(path):
        return Origin("folder", path, path)
    shown = printable(path)
    if os.path.isfile(path):
        if path.lower().endswith(".tar"):
            return Origin("tar", path, path)
        raise ValueError(f"{shown} is a file, expected a folder with images below it. Give the folder it is in.")
    if _MAGIC.search(path) and not os.path.lexists(path):
        if not os.path.isdir(base_of(path) or "."):
            raise ValueError(f"--data-dir {shown}: the folder {printable(base_of(path))} does not exist.")
        return Origin("glob", path, base_of(path))
    if os.path.exists(path):
        raise ValueError(f"{shown} is neither a folder nor a file. Give a folder with images below it.")
    raise ValueError(f"Image folder {shown} does not exist. Check --data-dir.")


def base_of(path: str) -> str:
    """The part of a pattern before the first wildcard; other paths unchanged."""
    parts = path.split(os.sep)
    fixed = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), None)
    if fixed is None or os.path.lexists(path):
        return path
    return os.sep.join(parts[:fixed]) or (os.sep if path.startswith(os.sep) else "")


def _check_apart(origins: list[Origin]) -> None:
    """Refuses a folder in another one, because its images would count twice, under two names."""
    resolved = [(Path(origin.root).resolve(), origin.given) for origin in origins]
    for i, (here, given) in enumerate(resolved):
        for j, (there, other) in enumerate(resolved):
            if i != j and (there in here.parents or here == there and i > j):
                raise ValueError(
                    f"--data-dir names images twice: {printable(given)} "
                    + ("is" if here == there else "lies in")
                    + f" {printable(other)}. Leave one out; a share of its own needs folders that lie apart."
                )


def list_folder(
    root: str, tick: Callable[[int], Any] | None = None, stamps: list[tuple[str, int]] | None = None
) -> tuple[FileNames, LeftOut]:
    """All image files anywhere below a folder, in a fixed order; see `walk.walk`."""
    shown = printable(root)
    if (kind := _origin(root).kind) != "folder":
        found = "pattern" if kind == "glob" else "file"
        raise ValueError(f"{shown} is a {found}, expected a folder with images below it. Give the folder it is in.")
    extensions, left = image_extensions(), LeftOut()
    folders = walk(root, frozenset(extensions), left, stamps)
    found = (os.fsencode(os.path.join(folder, name)) for folder, names, _ in folders for name in names)
    names = FileNames.collect(_ticking(found, tick))
    if not len(names):
        raise ValueError(
            f"No image below {shown}: {left or '0 other files seen'}. Looked for the extensions "
            f"{' '.join(extensions)} (hidden files and folders are skipped)."
        )
    return names, left


def _ticking(names: Iterator[bytes], tick: Callable[[int], Any] | None) -> Iterator[bytes]:
    count = 0
    for name in names:
        yield name
        count += 1
        if tick is not None and count % _TICK == 0:
            tick(_TICK)
    if tick is not None:
        tick(count % _TICK)


def _list_pattern(origin: Origin, tick: Callable[[int], Any] | None, stamps: list[tuple[str, int]] | None):
    """Files that a pattern matches; if it matches folders only, the images below these."""
    extensions, left = frozenset(image_extensions()), LeftOut()
    pattern = origin.given[len(origin.root) :].lstrip(os.sep)
    files, folders = set(), []
    for name in glob.iglob(pattern, root_dir=origin.root or None, recursive=True):
        extension = os.path.splitext(name)[1].lower()
        if os.path.isdir(os.path.join(origin.root, name)):
            folders.append(name)
        elif extension in extensions:
            files.add(os.fsencode(name))
        else:
            left.ignored[printable(extension)] += 1
    if not files:
        for folder in sorted(folders):
            for below, names, _ in walk(os.path.join(origin.root, folder), extensions, left, stamps):
                files.update(os.fsencode(os.path.join(folder, below, name)) for name in names)
    if not files:
        found = left or f"{len(folders)} folders matched"
        raise ValueError(
            f"--data-dir {printable(origin.given)} matches no image: {found}. Looked for the extensions "
            f"{' '.join(sorted(extensions))}."
        )
    if stamps is not None:
        around = {os.path.dirname(os.fsdecode(name)) for name in files}
        for folder in [*around]:  # a new folder changes the one above it
            while folder:
                folder = os.path.dirname(folder)
                around.add(folder)
        known = {path for path, _ in stamps}
        paths = (os.path.join(origin.root, folder) if folder else origin.root or "." for folder in sorted(around))
        stamps += [(path, os.stat(path).st_mtime_ns) for path in paths if path not in known]
    return FileNames.collect(_ticking(iter(sorted(files)), tick)), left


def list_files(origins: list[Origin], tick: Callable[[int], Any] | None = None, *, stamps: bool = False) -> Listing:
    """Lists the image files of all origins except tars, which list themselves when they are opened."""
    found: list[FileNames] = []
    weights: list[np.ndarray | None] = []
    left, noted = LeftOut(), [] if stamps else None
    for origin in origins:
        names, weight, other = FileNames.collect(()), None, LeftOut()
        if origin.kind == "folder":
            names, other = list_folder(origin.root, tick, noted)
        elif origin.kind == "glob":
            names, other = _list_pattern(origin, tick, noted)
        elif origin.kind == "list":
            if noted is not None:
                noted.append((origin.given, os.stat(origin.given).st_mtime_ns))
            names, weight = read_list(origin.given, tick)
        found.append(names)
        weights.append(weight)
        left.merge(other)
    counts = [len(names) for names in found]
    each = None
    if any(weight is not None for weight in weights):
        each = np.concatenate([np.ones(n) if w is None else w for n, w in zip(counts, weights, strict=True)])
    return Listing(origins, counts, _joined(found), each, left, noted or [])


def _joined(found: list[FileNames]) -> FileNames:
    if len(found) == 1:
        return found[0]
    block, ends = bytearray(), [np.zeros(1, np.int64)]
    for names in found:
        ends.append(names.ends[1:] + len(block))
        block += names.block
    return FileNames(block, np.concatenate(ends))
