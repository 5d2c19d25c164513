"""Folders of labelled images, one sub-folder per class: listed, checked and described."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from ..console import check_same_classes, count
from ..data import image_extensions
from ..data.config import Splitting
from ..data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, printable
from ..data.labelled import SEPARATOR, TEST_FOLDERS, Row, check_classes, divide, kept_rows, read_labelled
from ..data.paths.walk import LeftOut, classes_in_several_folders, walk

# The classes of these data sets are known only once they are open; everything else is a folder (or tar) of images.
OPAQUE_DATASETS = ("torch", "hfds", "hfids", "tfds", "wds")
SHOWN = 5  # names in a message
FEW_CLASSES = 12  # as many counts fit in a line
IMBALANCE = 10


def shown(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return f"{', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"


def opaque_prefix(dataset: str) -> str:
    """The library of timm's `--dataset`, such as 'hfds'; empty for a folder or tar of images."""
    prefix, slash, _ = dataset.partition("/")
    return prefix.lower() if slash and prefix.lower() in OPAQUE_DATASETS else ""


def is_folder(dataset: str, data_dir: str | None) -> bool:
    """Whether timm's options name a folder of images: not a file, nor a data set of another library."""
    return not opaque_prefix(dataset) and not (data_dir and Path(data_dir).is_file())


def split_folder(root: str | os.PathLike, split: str) -> Path:
    """The folder that timm takes for a split: of that name, of a synonym, else `root` itself."""
    name = split.partition("[")[0]
    synonyms = next((names for names in (TRAIN_FOLDERS, VALIDATION_FOLDERS) if name in names), ())
    return next((Path(root) / n for n in (name, *synonyms) if (Path(root) / n).exists()), Path(root))


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, for every kind of image that pretraining reads; images and classes in timm's order.

    The folder that holds an image is its class. Hidden files and folders (leading dot) are skipped.

    Args:
        root: The folder.
        class_map: Class by folder name: a file as of timm's `--class-map`, or a mapping. Images in other folders are
            left out.
        input_key: Extensions that count as images, separated by `;`; None for all of `image_extensions()`.
    """

    def __init__(
        self, root: str | os.PathLike, class_map: str | Mapping[str, int] = "", input_key: str | None = None
    ) -> None:
        self.root = os.fspath(root)
        extensions = tuple(input_key.lower().split(";")) if input_key else image_extensions()
        found: list[tuple[str, str]] = []  # path, class
        self.left = LeftOut()
        self.imageless: list[str] = []  # folders whose files are not images
        for folder, images, others in walk(self.root, extensions, self.left):
            label = os.path.basename(folder)
            found += [(os.path.join(self.root, folder, name), label) for name in images]
            if others and not images and label:
                self.imageless.append(label)
        if not found:
            raise ValueError(
                f"0 images in {self.root}: {self.left or 'it has no files'} (hidden files and folders are skipped). "
                f"Images are {input_key or 'all that Pillow opens, and .npy'}."
            )
        self._number(found, class_map)

    def _number(self, found: list[tuple[str, str]], class_map: str | Mapping[str, int]) -> None:
        """Sets samples and classes from paths and the names of their classes."""
        if not class_map:
            class_map = {name: i for i, name in enumerate(sorted({label for _, label in found}, key=natural_key))}
        try:
            mapped = class_map if isinstance(class_map, Mapping) else load_class_map(class_map, self.root)
        except (AssertionError, OSError, ValueError) as e:
            raise ValueError(f"--class-map {class_map} cannot be read: {e}") from e
        self.class_to_idx: dict[str, int] = dict(mapped)
        # by folder that the class map lacks
        self.unlabelled = Counter(label for _, label in found if label not in self.class_to_idx)
        samples = [(path, self.class_to_idx[label]) for path, label in found if label in self.class_to_idx]
        self.samples: list[tuple[str, int]] = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]
        return self.samples[index]

    @property
    def classes(self) -> list[str]:
        """Names in the order of the class index."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def renumbered(self, class_to_idx: Mapping[str, int]) -> "FolderReader":
        """A copy whose classes, by name, have other numbers."""
        new, names = copy.copy(self), {i: name for name, i in self.class_to_idx.items()}
        new.class_to_idx = dict(class_to_idx)
        new.samples = [(path, class_to_idx[names[target]]) for path, target in self.samples]
        return new

    def counts(self) -> dict[str, int]:
        """Number of images by class name, in the order of the class index."""
        counted = Counter(target for _, target in self.samples)
        return {name: counted[self.class_to_idx[name]] for name in self.classes}


class RowReader(FolderReader):
    """The same for labelled rows, one label each; `root` says where they are from."""

    def __init__(self, root: str, rows: Sequence[Row], class_map: str | Mapping[str, int] = "") -> None:
        self.root, self.rows, self.left, self.imageless = root, rows, LeftOut(), []
        if several := [row for row in rows if len(row.labels) > 1]:
            what = f"{printable(several[0].path)} has the labels {SEPARATOR.join(several[0].labels)}"
            raise ValueError(
                f"{root}: {count(len(several), 'image')} with several labels ({what}), and timm's train.py trains "
                "and measures one class per image. `evaluate` measures frozen features on several labels; to finetune, "
                "give one label per row, such as a CSV of yes and no for each label."
            )
        self._number([(row.path, row.labels[0]) for row in rows], class_map)


def is_table(place: str | os.PathLike | None) -> bool:
    """Whether --data-dir is a CSV of names and labels."""
    return os.fspath(place or "").lower().endswith(".csv")


def is_unsplit(root: Path) -> bool:
    """Whether a folder holds folders of classes, and none of a split such as train/ or Test/."""
    names = {path.name.lower() for path in root.glob("[!.]*") if path.is_dir()}
    return bool(names) and not names & {*TRAIN_FOLDERS, *TEST_FOLDERS, "testing"}


def split_rows(
    place: Path, how: Splitting, seed: int, kept: Path | None = None, class_map: str = "", input_key: str | None = None
) -> tuple[list[FolderReader], list[str]]:
    """Splits a folder of classes or a CSV into training and validation images; returns them, and notes.

    `kept` is the split file of the run that is resumed, which is followed if it exists.
    """
    rows, notes = read_labelled(place, how.groups, how.group_by)
    if input_key:
        rows = [row for row in rows if row.path.lower().endswith(tuple(input_key.lower().split(";")))]
    if any(row.part for row in rows):
        notes.append(f"{place}: split by its column 'split'.")
    else:
        notes.append(f"{place} has no validation images of its own: --seed {seed} splits it, "
                     f"--validation-share {how.validation_share:g} to validate on.")  # fmt: skip
    if kept and kept.is_file():
        total, rows = len(rows), kept_rows(kept, [row.path for row in rows])
        if not rows:
            raise ValueError(f"None of the {total} images of {place} is in {kept}, the split of the run to resume.")
        left = f"; {count(total - len(rows), 'other image')} left out" if len(rows) < total else ""
        notes[-1] = f"{place}: split as in {kept}{left}."
    numbers = class_map or {name: i for i, name in enumerate(check_classes(rows, place))}
    RowReader(str(place), rows)  # refuses several labels
    parts = zip(("train", "validation"), divide(rows, place, how.validation_share, seed), strict=True)
    train, validation = (RowReader(f"{place} [{name}]", part, numbers) for name, part in parts)
    if few := [name for name, n in train.counts().items() if n + validation.counts()[name] == 1]:
        has = f"has 1 image: {few[0]}" if len(few) == 1 else f"have 1 image each: {shown(few)}"
        raise ValueError(
            f"{place}: {len(few)} of {len(train.classes)} classes {has}. Each needs two or more, to train and to "
            "validate on: add images, or leave the class out."
        )
    return [train, validation], notes


Open = Callable[[Path], FolderReader]


def open_splits(data_dir: str | None, splits: Mapping[str, str], open_folder: Open) -> list[FolderReader]:
    """Lists the splits of a data folder, which must have the same classes.

    `splits` has the name of each by the option that gave it, such as '--train-split'; an empty name is left out.
    """
    layout = "a folder with train/ and validation/, each with a sub-folder per class, or without them, or a CSV"
    if not data_dir:
        raise ValueError(f"--data-dir is needed: {layout}.")
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"--data-dir {root} does not exist. Expected {layout}.")
    found = [open_split(root, split, option, open_folder) for option, split in splits.items() if split]
    remedy = "Both need a sub-folder with images for every class, with the same name."
    first, last = found[0], found[-1]
    check_same_classes(first.classes, last.classes, (first.root, last.root), ordered=False, remedy=remedy)
    return found


def open_split(root: Path, split: str, option: str, open_folder: Open, root_too: bool = False) -> FolderReader:
    """Lists one split of a data folder, or with `root_too` the folder itself; `option` gave the name of the split."""
    expected = f"Expected {root / split} with one sub-folder of images per class, or another {option}."
    folder = split_folder(root, split)
    there = sorted(p.name for p in root.iterdir() if p.is_dir())
    # timm takes the root itself for the split then, and `train` for a class
    if folder.resolve() == root.resolve() and not (root_too and there):
        has = ", ".join(there[:10]) or "no folders"
        raise ValueError(f"{root} has no {option} '{split}'; it has {has}. {expected}")
    try:
        reader = open_folder(folder)
    except ValueError as e:
        raise ValueError(f"{option} {split} of {root}: {e} {expected}") from e
    if "" in reader.class_to_idx:
        raise ValueError(f"{reader.root} has images that are in no sub-folder, so their class is unknown. {expected}")
    return reader


def describe(reader: FolderReader, labelled: bool = True) -> list[str]:
    """Lines on the contents of a folder: images, classes if they are `labelled`, and the files that are left out."""
    counts = reader.counts()
    first = count(len(reader), "image")
    if labelled and set(counts) != {""}:
        each = ", ".join(f"{name} {n}" for name, n in counts.items())
        if len(counts) > FEW_CLASSES:
            (least, low), (most, high) = (f(counts.items(), key=lambda item: item[1]) for f in (min, max))
            each = f"from {low} ({least}) to {high} ({most}) per class"
        first += f" of {count(len(counts), 'class')}: {each}"
    where = (os.path.relpath(path, reader.root) for path, _ in reader.samples)
    lines = [
        first,
        classes_in_several_folders(where) if labelled and not isinstance(reader, RowReader) else "",
        str(reader.left),
        f"no images in {shown(reader.imageless)}" if labelled and reader.imageless else "",
    ]
    if reader.unlabelled:
        names = ", ".join(list(reader.unlabelled)[:SHOWN])
        left = count(reader.unlabelled.total(), "image")
        lines.append(f"left out {left} whose folder is not in the class map: {names}")
    return [f"{reader.root}: {line}" for line in lines if line]


def imbalance(counts: Mapping[str, int]) -> str:
    """A warning if the largest class has over ten times as many images as the smallest; else empty."""
    present = [(n, name) for name, n in counts.items() if n]
    if not present or max(present)[0] <= IMBALANCE * min(present)[0]:
        return ""
    (low, least), (high, most) = min(present), max(present)
    return (
        f"the classes are unequal, {high} images of {most} against {low} of {least}: top-1 accuracy says little about "
        "the small ones. validate --metrics-avg macro (needs scikit-learn) weights all classes equally."
    )
