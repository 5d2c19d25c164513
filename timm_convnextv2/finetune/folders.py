"""A folder of labelled images, one sub-folder a class: what is listed, what is left out, and how that is told."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from ..data import image_extensions, left_out
from ..data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS
from ..data.paths.walk import LeftOut, walk

# Data sets whose classes can only be known by opening them; everything else is a folder (or tar) of images.
OPAQUE_DATASETS = ("torch", "hfds", "hfids", "tfds", "wds")
SYNONYMS = (TRAIN_FOLDERS, VALIDATION_FOLDERS)
FEW_CLASSES = 12  # as many counts fit in a line
IMBALANCE = 10


def is_opaque(dataset: str) -> bool:
    """Whether timm's `--dataset` names a data set of another library, not a folder or tar of images."""
    prefix, slash, _ = dataset.partition("/")
    return bool(slash) and prefix.lower() in OPAQUE_DATASETS


def split_folder(root: str | os.PathLike, split: str) -> Path:
    """The folder of a split as timm finds it: of that name, of another usual one, else `root` itself."""
    name = split.partition("[")[0]
    names = [name, *next((synonyms for synonyms in SYNONYMS if name in synonyms), ())]
    return next((Path(root) / n for n in names if (Path(root) / n).exists()), Path(root))


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, for every kind of image that pretraining reads.

    The folder that holds an image is its class. Hidden files and folders (leading dot) are skipped, as in pretraining;
    only regular files count. Order of images and classes are timm's.

    Args:
        root: The folder.
        class_map: Class by folder name: a file as of timm's `--class-map`, or a mapping. Images of other folders are
            left out.
        input_key: Extensions that count as images, separated by `;`; None for all of `image_extensions()`.

    Attributes:
        samples: `(path, class)` of each image.
        class_to_idx: Class by name.
        left: What is there besides the images.
        unlabelled: Number of images by the name of their folder, where the class map does not have it.
        barren: Names of folders that have files and none that is an image.

    Raises:
        ValueError: There is no image, a folder cannot be listed, or the class map cannot be read.
    """

    def __init__(
        self, root: str | os.PathLike, class_map: str | Mapping[str, int] = "", input_key: str | None = None
    ) -> None:
        self.root = os.fspath(root)
        extensions = tuple(input_key.lower().split(";")) if input_key else image_extensions()
        found: list[tuple[str, str]] = []  # path, class
        self.left = LeftOut()
        self.barren: list[str] = []
        for folder, images, others in walk(self.root, extensions, self.left):
            label = os.path.basename(folder)
            found += [(os.path.join(self.root, folder, name), label) for name in images]
            if others and not images and label:
                self.barren.append(label)
        if not found:
            raise ValueError(
                f"0 images in {self.root}: {self.left or 'it has no files'} (hidden files and "
                f"folders are skipped). Images are {input_key or 'all that Pillow opens, and .npy'}."
            )
        names = sorted({label for _, label in found}, key=natural_key)
        self.class_to_idx: dict[str, int] = (
            _load_class_map(class_map, self.root) if class_map else {name: i for i, name in enumerate(names)}
        )
        self.unlabelled = Counter(label for _, label in found if label not in self.class_to_idx)
        samples = [(path, self.class_to_idx[label]) for path, label in found if label in self.class_to_idx]
        self.samples: list[tuple[str, int]] = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]
        return self.samples[index]

    def counts(self) -> dict[str, int]:
        """Number of images of each class, by its name, in the order of the class index."""
        counted = Counter(target for _, target in self.samples)
        return {name: counted[i] for name, i in sorted(self.class_to_idx.items(), key=lambda item: item[1])}


def _load_class_map(class_map: str | Mapping[str, int], root: str) -> dict[str, int]:
    if isinstance(class_map, Mapping):
        return dict(class_map)
    try:
        return load_class_map(class_map, root)
    except (AssertionError, OSError, ValueError) as e:
        raise ValueError(f"--class-map {class_map} cannot be read: {e}") from e


# ------------------------------------------------------------------------------------------------------ what is said


def describe_classes(counts: Mapping[str, int]) -> str:
    """Images of each class: all where they are few, else the extremes."""
    if len(counts) <= FEW_CLASSES:
        return ", ".join(f"{name} {n}" for name, n in counts.items())
    (least, low), (most, high) = (f(counts.items(), key=lambda item: item[1]) for f in (min, max))
    return f"from {low} ({least}) to {high} ({most}) a class"


def describe(reader: FolderReader) -> list[str]:
    """Lines on what a folder has: images, classes, and what is left out."""
    counts = reader.counts()
    lines = [f"{reader.root}: {len(reader)} images"]
    if set(counts) != {""}:
        lines[0] += f" of {len(counts)} class{'es' * (len(counts) != 1)}: {describe_classes(counts)}"
    if left_out(reader):
        lines.append(f"{reader.root}: {left_out(reader)}")
    if reader.barren:
        lines.append(f"{reader.root}: no image in {', '.join(reader.barren[:5])}{', ...' * (len(reader.barren) > 5)}")
    if reader.unlabelled:
        left = sum(reader.unlabelled.values())
        names = ", ".join(list(reader.unlabelled)[:5])
        lines.append(f"{reader.root}: {left} images are left out, whose folder is not in the class map: {names}")
    return lines


def imbalance(counts: Mapping[str, int]) -> str:
    """What to know where the largest class has over ten times as many images as the smallest; else empty."""
    present: dict[Any, int] = {name: n for name, n in counts.items() if n}
    if not present or max(present.values()) <= IMBALANCE * min(present.values()):
        return ""
    least, most = min(present, key=present.__getitem__), max(present, key=present.__getitem__)
    return (
        f"the classes are unequal, {present[most]} images of {most} against {present[least]} of {least}: top-1 "
        "accuracy says little of the small ones. validate --metrics-avg macro (needs scikit-learn) counts all alike."
    )
