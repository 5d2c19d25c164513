"""Finds the image files of folders, tar files, patterns and lists (their origins) as options name them."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...console import count
from ..config import Dirs, as_list
from ..formats.decode import image_extensions, is_dicom_file
from ..formats.files import printable
from .lists import FileNames, Tick, read_list, rows_of_list
from .walk import LeftOut, walk

Stamps = list[tuple[str, int]]  # folders or lists that were read, and the time of their last change, in ns
_MAGIC = re.compile(r"[*?[]")


class Origin(NamedTuple):
    """Where images are."""

    kind: str  # 'folder', 'tar', 'glob' or 'list'
    given: str  # the user's word
    root: str  # the folder that its names are relative to; for a tar, the file itself

    def record(self) -> list[str]:
        """The origin, named the same way on all machines that share its folder."""
        return [self.kind, *(printable(os.path.abspath(path)) for path in self[1:])]


@dataclass
class Listing:
    """The image files of folders, tar files, patterns and lists."""

    origins: list[Origin]
    names: list[FileNames]  # of each origin, relative to its root; none of a tar, which lists itself when it is opened
    # float64, one per file, if a list has weights (1 for files of other lists); else None
    weights: np.ndarray | None = None
    left: LeftOut = field(default_factory=LeftOut)  # other files
    stamps: Stamps = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of files."""
        return sum(map(len, self.names))

    def paths(self) -> Iterator[str]:
        """Path of each file."""
        parts = zip(self.origins, self.names, strict=True)
        return (os.path.join(origin.root, name) for origin, names in parts for name in names)

    def path(self, i: int) -> str:
        """Path of file `i` of all."""
        ends = np.cumsum([len(names) for names in self.names])
        at = int(np.searchsorted(ends, i, side="right"))
        return os.path.join(self.origins[at].root, self.names[at][int(i - ends[at]) + len(self.names[at])])


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
        raise ValueError("No images given. Give a folder (--data-dir), or --dataset demo to try things out.")
    origins = [_origin(path) for path in dirs]
    _check_apart([origin for origin in origins if origin.kind != "glob"])
    return origins


def _origin(path: str) -> Origin:
    if os.path.isdir(path):
        return Origin("folder", path, path)
    if os.path.isfile(path) and path.lower().endswith(".tar"):
        return Origin("tar", path, path)
    shown, exists = printable(path), os.path.lexists(path)
    if not exists and _MAGIC.search(path):
        if not os.path.isdir(base_of(path) or "."):
            raise ValueError(f"--data-dir {shown}: the folder {printable(base_of(path))} does not exist.")
        return Origin("glob", path, base_of(path))
    found = "is a file" if os.path.isfile(path) else "is not a folder" if exists else "does not exist"
    raise ValueError(f"--data-dir {shown} {found}. Give a folder with images below it, or a .tar file.")


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
                    f"--data-dir names images twice: {printable(given)} {'is' if here == there else 'lies in'} "
                    f"{printable(other)}. Leave one out; a share of its own needs folders that lie apart."
                )


def list_folder(root: str, tick: Tick = lambda count: None, stamps: Stamps | None = None) -> tuple[FileNames, LeftOut]:
    """All image files anywhere below a folder, in a fixed order; see `walk.walk`."""
    if _origin(root).kind != "folder":
        raise ValueError(f"{printable(root)} is no folder. Give a folder with images below it.")
    left = LeftOut()
    folders = walk(root, frozenset(image_extensions()), left, stamps)
    names = FileNames.collect((os.fsencode(os.path.join(f, name)) for f, names, _ in folders for name in names), tick)
    if not len(names):
        raise _no_image(f"No image below {printable(root)}: {left or '0 other files seen'}")
    return names, left


def _no_image(found: str) -> ValueError:
    extensions = " ".join(image_extensions())
    return ValueError(f"{found}. Looked for the extensions {extensions} (hidden files and folders are skipped).")


def _list_pattern(origin: Origin, tick: Tick, stamps: Stamps | None) -> tuple[FileNames, LeftOut]:
    """Files that a pattern matches; if it matches folders only, the images below these."""
    extensions, left = frozenset(image_extensions()), LeftOut()
    pattern = origin.given[len(origin.root) :].lstrip(os.sep)
    files, folders = set(), []
    for name in glob.iglob(pattern, root_dir=origin.root or None, recursive=True):
        extension = os.path.splitext(name)[1].lower()
        if os.path.isdir(os.path.join(origin.root, name)):
            folders.append(name)
        elif extension in extensions or is_dicom_file(os.path.join(origin.root, name)):
            files.add(name)
        else:
            left.ignored[printable(extension)] += 1
    if not files:
        for folder in sorted(folders):
            for below, names, _ in walk(os.path.join(origin.root, folder), extensions, left, stamps):
                files.update(os.path.join(folder, below, name) for name in names)
    if not files:
        found = left or f"{count(len(folders), 'folder')} matched"
        raise _no_image(f"--data-dir {printable(origin.given)} matches no image: {found}")
    if stamps is not None:
        around = {""}
        for folder in {os.path.dirname(name) for name in files}:
            while folder:  # a new folder changes the one above it
                around.add(folder)
                folder = os.path.dirname(folder)
        paths = {os.path.join(origin.root, folder) if folder else origin.root or "." for folder in around}
        stamps += [(path, os.stat(path).st_mtime_ns) for path in sorted(paths.difference(path for path, _ in stamps))]
    return FileNames.collect(sorted(map(os.fsencode, files)), tick), left


def list_files(origins: list[Origin], tick: Tick = lambda count: None, *, stamps: bool = False) -> Listing:
    """Lists the image files of all origins except tars, which list themselves when they are opened."""
    listing, weights = Listing(origins, []), []
    noted = listing.stamps if stamps else None
    for origin in origins:
        names, weight, left = FileNames(), None, LeftOut()
        if origin.kind == "folder":
            names, left = list_folder(origin.root, tick, noted)
        elif origin.kind == "glob":
            names, left = _list_pattern(origin, tick, noted)
        elif origin.kind == "list":
            listing.stamps.append((origin.given, os.stat(origin.given).st_mtime_ns))
            names, weight = read_list(origin.given, tick)
        listing.names.append(names)
        weights.append(weight)
        listing.left.merge(left)
    if any(weight is not None for weight in weights):
        each = zip(listing.names, weights, strict=True)
        listing.weights = np.concatenate([np.ones(len(n)) if w is None else w for n, w in each])
    return listing


def first_files(origins: list[Origin], most: int) -> list[str]:
    """Paths of the first images of folders and lists, without listing the rest; of patterns and tar files none."""
    extensions, found = frozenset(image_extensions()), []
    for origin in origins:
        names: Iterator[str] = iter(())
        if origin.kind == "folder":
            folders = walk(origin.root, extensions, LeftOut())
            names = (os.path.join(folder, name) for folder, images, _ in folders for name in images)
        elif origin.kind == "list":
            names = (name for name, *_ in rows_of_list(origin.given))
        found += [os.path.join(origin.root, name) for name in islice(names, most - len(found))]
    return found
