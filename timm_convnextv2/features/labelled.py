"""Labelled images: folders of classes, or a table of names and labels."""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils.misc import natural_key
from torch import Tensor

from ..console import check_same_classes
from ..data import FolderSource, Pixels, check_readable
from ..data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, printable
from ..data.formats.pixels import PLAIN
from ..data.sources.files import ImageFiles
from .extract import refuse_bad

SEPARATOR = ";"


class Split(NamedTuple):
    """Images, and their labels: int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several."""

    source: ImageFiles
    labels: Tensor


class Labelled(NamedTuple):
    """A labelled data set: `train` to learn from, `test` to measure on, `classes` in the order of the labels."""

    classes: list[str]
    train: Split
    test: Split

    @property
    def several(self) -> bool:
        return self.train.labels.ndim == 2

    @property
    def chance(self) -> float:
        """Accuracy of always guessing the most frequent class; for several labels, the mAP of constant scores."""
        if self.several:
            share = self.test.labels.double().mean(0)
            return float(share[share > 0].mean())
        return float((self.test.labels == self.train.labels.mode().values).double().mean())


def open_labelled(
    place: str | os.PathLike, *, in_chans: int = 3, validation_share: float = 0.25, seed: int = 0,
    pixels: Pixels = PLAIN
) -> Labelled:  # fmt: skip
    """Opens labelled images.

    Args:
        place: One of
            - a folder with `train/` and `validation/` (or timm's other names for them, or `test/`) of the same classes;
            - a folder of classes, which is split by `seed`, in the same proportion for each class;
            - a CSV with the columns `name` (path, relative to the CSV) and `label`, split in the same way. Labels
              joined by `;` are several labels of one image; such data is split without regard to labels.
        in_chans: Channels of the images.
        validation_share: Fraction of the images that become `test` in a split, above 0 and below 1.
        seed: Seed of that split.
        pixels: How stored values become pixels.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}, expected a fraction above 0 and below 1.")
    path = Path(place)
    if not path.exists():
        raise ValueError(f"The labelled images '{printable(path)}' do not exist; expected a folder or a CSV.")
    parts = None if path.is_file() else _parts(path)
    if parts is not None:
        train, test = (_folder(part, in_chans, pixels) for part in parts)
        where: Any = tuple(f"'{printable(folder)}'" for folder in parts)
        remedy = "Both parts need the same class folders."
        check_same_classes(_names(train), _names(test), where, ordered=False, remedy=remedy)
        classes = _names(train, path)
    else:
        files, labels = _table(path) if path.is_file() else _folder(path, in_chans, pixels)
        classes = _names((files, labels), path)
        chosen = _held(labels, validation_share, seed)
        train = _pick(files, labels, [i for i in range(len(files)) if i not in chosen])
        test = _pick(files, labels, sorted(chosen))
    several = any(len(label) > 1 for label in train[1] + test[1])
    splits = [Split(ImageFiles(paths, in_chans, pixels), _numbers(y, classes, several)) for paths, y in (train, test)]
    for split in splits:
        refuse_bad([message for _, message in check_readable(split.source)])
    return Labelled(classes, *splits)


Files = tuple[list[str], list[tuple[str, ...]]]  # paths, and the labels of each


def _parts(root: Path) -> tuple[Path, Path] | None:
    """The folders for training and for validation; None if the folder holds classes."""
    found = [
        next((root / name for name in names if _has_folders(root / name)), None)
        for names in (TRAIN_FOLDERS, (*VALIDATION_FOLDERS, "test"))
    ]
    train, test = found
    if train is None:
        return None
    if test is None:
        expected = ", ".join((*VALIDATION_FOLDERS, "test"))
        raise ValueError(
            f"'{printable(root)}' has {train.name}/ and no folder to validate on, expected one of {expected}. To split "
            f"{train.name}/ by seed, give '{printable(train)}'."
        )
    return train, test


def _has_folders(folder: Path) -> bool:
    """True if it holds folders, so that it is a part with classes rather than a class of this name."""
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def _folder(root: Path, in_chans: int, pixels: Pixels) -> Files:
    source = FolderSource(root, in_chans, pixels)
    paths = sorted((source.path(i) for i in range(len(source))), key=natural_key)
    labels = [os.path.basename(os.path.dirname(os.path.relpath(path, root))) for path in paths]
    if "" in labels:
        lost = paths[labels.index("")]
        raise ValueError(f"{printable(lost)} is in no folder of a class; expected CLASS/IMAGE in '{printable(root)}'.")
    return paths, [(label,) for label in labels]


def _table(path: Path) -> Files:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"'{printable(path)}' cannot be read as CSV: {e}") from e
    if not {"name", "label"} <= set(columns):
        raise ValueError(f"'{printable(path)}' has the columns {columns}, expected name and label.")
    files, labels = [], []
    for number, row in enumerate(rows, start=2):
        label = tuple(dict.fromkeys(part.strip() for part in (row["label"] or "").split(SEPARATOR) if part.strip()))
        file = path.parent / (row["name"] or "")
        if not label or not file.is_file():
            what = f"no file '{printable(file)}'" if label else f"no label for '{row['name']}'"
            raise ValueError(f"'{printable(path)}' line {number}: {what}. Paths are relative to the CSV.")
        files.append(os.fspath(file))
        labels.append(label)
    return files, labels


def _names(files: Files, place: Path | None = None) -> list[str]:
    """The classes in order; with `place`, which error messages name, there must be at least two."""
    classes = sorted({name for label in files[1] for name in label}, key=natural_key)
    if place is not None and len(classes) < 2:
        has = f"one class, {classes[0]}" if classes else "no images"
        raise ValueError(f"'{printable(place)}' has {has}; expected at least two classes.")
    return classes


def _held(labels: list[tuple[str, ...]], share: float, seed: int) -> set[int]:
    """Indices of the test images: a fraction `share` of each class, at least one if the class has two."""
    generator = torch.Generator().manual_seed(seed)
    several = any(len(label) > 1 for label in labels)
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault("" if several else label[0], []).append(i)
    held: set[int] = set()
    for name in sorted(groups):
        members = groups[name]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.update(members[j] for j in torch.randperm(len(members), generator=generator)[:count].tolist())
    if not held:
        counts = ", ".join(f"{name} {n}" for name, n in Counter(label[0] for label in labels).items())
        raise ValueError(f"No class has two images, so none can be held out: {counts}. Add images.")
    return held


def _pick(files: list[str], labels: list[tuple[str, ...]], chosen: list[int]) -> Files:
    return [files[i] for i in chosen], [labels[i] for i in chosen]


def _numbers(labels: list[tuple[str, ...]], classes: list[str], several: bool) -> Tensor:
    number = {name: i for i, name in enumerate(classes)}
    if not several:
        return torch.tensor([number[label[0]] for label in labels])
    many = torch.zeros(len(labels), len(classes), dtype=torch.long)
    for i, label in enumerate(labels):
        many[i, [number[name] for name in label]] = 1
    return many
