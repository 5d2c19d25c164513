"""Walks folders and tar files, and counts the files that are left out."""

import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from timm.data import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ..formats.decode import image_extensions, is_dicom_file
from ..formats.errors import installed
from ..formats.files import kind_of_file, printable
from ..formats.zarr import is_zarr, zarr_images

_NAMED_SPECIAL = 100


@dataclass
class LeftOut:
    """Files that are not images; as text, one line, '' if there are none.

    For example '48 other files ignored: 24 .dcm, 24 .heic; 1 not opened, no regular file: root/x.jpg (FIFO)'.
    """

    # number of regular files by lower-case extension, '' for none
    ignored: Counter[str] = field(default_factory=Counter)
    # kind of other files, such as 'FIFO' or 'broken link', by path; the first hundred
    special: dict[str, str] = field(default_factory=dict)
    num_special: int = 0  # number of all of these

    def merge(self, other: "LeftOut") -> None:
        """Adds the files that were left out elsewhere."""
        self.ignored += other.ignored
        self.num_special += other.num_special
        self.special.update([*other.special.items()][: _NAMED_SPECIAL - len(self.special)])

    def __str__(self) -> str:
        parts = []
        if self.ignored:
            kinds = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
            shown = [f"{count} {extension or 'without extension'}{_hint(extension)}" for extension, count in kinds[:8]]
            if len(kinds) > 8:
                shown.append(f"{sum(count for _, count in kinds[8:])} of {len(kinds) - 8} more kinds")
            count = self.ignored.total()
            parts.append(f"{count} other file{'s' * (count != 1)} ignored: {', '.join(shown)}")
        if self.special:
            shown = [f"{path} ({kind})" for path, kind in [*self.special.items()][:5]]
            shown += [f"{self.num_special - 5} more"] if self.num_special > 5 else []
            parts.append(f"{self.num_special} not opened, no regular file: {', '.join(shown)}")
        return "; ".join(parts)


def _hint(extension: str) -> str:
    """Names the package that reads such files."""
    package = {".dcm": "pydicom", ".dicom": "pydicom", ".zarr": "zarr"}.get(extension)
    return f" (to read them: pip install {package})" if package and not installed(package) else ""


def walk(
    root: str, extensions: Collection[str], left: LeftOut, stamps: list[tuple[str, int]] | None = None
) -> Iterator[tuple[str, list[str], int]]:
    """Walks all folders from `root` down, each once, in a fixed order.

    Hidden files and folders (leading dot) are skipped; links to folders are followed. Only regular files are opened. A
    folder named `.zarr` that holds a Zarr array or group is one image, or one per series or field. `stamps` receives
    each folder's time of change.

    Yields:
        Path of a folder below `root` ('' for itself), the sorted names of its images, and the number of its other
        files.
    """
    if is_zarr(root):
        yield "", zarr_images(root) if ".zarr" in extensions else [], 0
        return
    seen, folders = set(), [""]
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder)
        below, images, others = [], [], 0
        try:
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            if stamps is not None:
                stamps.append((path, info.st_mtime_ns))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    extension = os.path.splitext(entry.name)[1].lower()
                    # `kind_of_file` would cost another system call
                    kind = "" if entry.is_file(follow_symlinks=False) else kind_of_file(entry.path)
                    zarr = kind == "folder" and extension == ".zarr" and is_zarr(entry.path)
                    if kind == "folder" and not zarr:
                        below.append(entry.name)
                    elif kind not in ("", "folder"):
                        left.merge(LeftOut(special={printable(entry.path): kind}, num_special=1))
                    elif zarr and extension in extensions:
                        images += [os.path.normpath(os.path.join(entry.name, x)) for x in zarr_images(entry.path)]
                    elif extension in extensions or is_dicom_file(entry.path):
                        images.append(entry.name)
                    else:
                        left.ignored[printable(extension)] += 1
                        others += 1
        except OSError as error:
            raise ValueError(f"Cannot list the folder {printable(path)}: {error}") from error
        yield folder, sorted(images), others
        folders.extend(os.path.join(folder, name) for name in sorted(below, reverse=True))


def open_tar(
    path: str, class_map: Any = "", extensions: Collection[str] | None = None
) -> tuple[ReaderImageInTar, LeftOut]:
    """timm's reader of a tar file (or of tars in a tar) for all kinds of images, and the files that it leaves out."""
    extensions, left = set(extensions or image_extensions()), LeftOut()
    before: Any = get_img_extensions()
    try:
        with tarfile.open(path) as tar:
            found = _count(tar, extensions, left)
        if not found:
            raise ValueError(f"0 images in {printable(path)}: {left or 'it has no files'}.")
        set_img_extensions(tuple(extensions))
        # an open tar file that forked workers inherit has one read position for all of them
        reader = ReaderImageInTar(path, class_map, cache_tarfiles=False)
    except (AssertionError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{printable(path)} cannot be read ({type(error).__name__}: {error}).") from error
    finally:
        set_img_extensions(before)
    if len(reader) < found and not class_map:
        raise ValueError(
            f"{printable(path)} has {found} images, and timm reads {len(reader)}: its list of the content beside the "
            "file (*_tarinfos.pickle) is for other kinds of images. Remove the list."
        )
    return reader, left


def _count(tar: tarfile.TarFile, extensions: Collection[str], left: LeftOut) -> int:
    """Number of images in a tar file and in tars inside it; counts other files in `left`."""
    found = 0
    for member in tar:
        extension = os.path.splitext(member.name)[1].lower()
        if not member.isfile():
            continue
        if extension == ".tar":
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                found += _count(inner, extensions, left)
        elif extension in extensions:
            found += 1
        else:
            left.ignored[printable(extension)] += 1
    return found


def classes_in_several_folders(images: Iterable[str]) -> str:
    """A warning if folders of images have one name and different parents: each image's own folder is its class.

    `images` are paths relative to the root. '' if all names differ.
    """
    places: dict[str, set[str]] = {}
    for image in images:
        parent, name = os.path.split(os.path.dirname(image))
        places.setdefault(name, set()).add(parent)
    if not (several := {name: sorted(parents) for name, parents in places.items() if len(parents) > 1}):
        return ""
    name, parents = next(iter(several.items()))
    where = ", ".join(printable(os.path.join(parent, name)) for parent in parents[:3])
    return (
        f"{len(several)} of {len(places)} classes are in several folders, such as '{printable(name)}' ({where}). The "
        "folder that holds an image is its class: move the images of CLASS/SESSION/ up to CLASS/, unless this is meant."
    )
