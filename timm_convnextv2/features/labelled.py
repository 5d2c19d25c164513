"""Labelled images: folders of classes, or a table of names and labels."""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils.misc import natural_key
from torch import Tensor

from ..console import check_same_classes
from ..data import DemoSource, FolderSource, Pixels, Source, check_readable
from ..data.formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, printable
from ..data.formats.pixels import PLAIN
from ..data.measure.duplicates import shared_note
from ..data.paths.lists import open_text
from ..data.paths.walk import classes_in_several_folders
from ..data.sources.files import ImageFiles
from .extract import refuse_bad

SEPARATOR = ";"
NAMED = 12  # classes in a message
TEST_FOLDERS = (*VALIDATION_FOLDERS, "test")
_DEMO = {2: 512, 3: 400}  # seed and images to train on, and to test on


class Row(NamedTuple):
    """A labelled image."""

    path: str
    labels: tuple[str, ...]
    group: str | None = None  # patient, slide, video, ...: all of one group are on one side of a split


class Split(NamedTuple):
    """Images, and their labels: int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several."""

    source: Source
    labels: Tensor


class Labelled(NamedTuple):
    """A labelled data set: `train` to learn from, `test` to measure on, `classes` in the order of the labels."""

    classes: list[str]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()  # what may be a mistake, and what was merged

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

    def describe(self, place: str | os.PathLike) -> list[str]:
        """Lines on the data: images, classes and chance; then the notes."""
        named = ", ".join([*self.classes[:NAMED], *["..."] * (len(self.classes) > NAMED)])
        kind = "labels, several per image" if self.several else "classes"
        images = f"{len(self.train.labels)} images to train on and {len(self.test.labels)} to test on"
        chance = f"chance is {100 * self.chance:.1f} %"
        line = f"{printable(place)}: {images}, {len(self.classes)} {kind} ({named}); {chance}"
        return [line, *(f"warning: {note}" for note in self.notes)]


def open_labelled(
    place: str | os.PathLike, *, in_chans: int = 3, validation_share: float = 0.25, seed: int = 0,
    pixels: Pixels = PLAIN, groups: str | None = None, group_by: str | None = None
) -> Labelled:  # fmt: skip
    """Opens labelled images.

    Args:
        place: 'demo', the demo images, unless a folder has this name; or one of
            - a folder with `train/` and `validation/` (or timm's other names for them, or `test/`) of the same classes;
            - a folder of classes, which is split by `seed`, in the same proportion for each class;
            - a CSV with the columns `name` (path, relative to the CSV) and `label`, split in the same way. Labels
              joined by `;` are several labels of one image; such data is split without regard to labels. Equal rows
              of an image count once; rows with different labels are an error.
        in_chans: Channels of the images.
        validation_share: Fraction of the images that become `test` in a split, above 0 and below 1.
        seed: Seed of that split.
        pixels: How stored values become pixels.
        groups: Column of the CSV with the group of each image: a group is on one side of the split.
        group_by: 'parent-folder' makes the folder of an image its group; class folders are then CLASS/GROUP/.

    A group on both sides of given folders, and a class that grouping leaves on one side only, are a `ValueError`.
    """
    notes: list[str] = []
    if groups and group_by:
        raise ValueError("--groups and --group-by both name the groups: choose one.")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}, expected a fraction above 0 and below 1.")
    if place == "demo" and not os.path.exists(place):
        sources = [DemoSource(count, in_chans=in_chans, seed=seed, pixels=pixels) for seed, count in _DEMO.items()]
        labels = [torch.tensor([source.label(i) for i in range(len(source))]) for source in sources]
        train, test = map(Split, sources, labels)
        return Labelled([*DemoSource.classes], train, test)
    path = Path(place)
    if not path.exists():
        raise ValueError(f"The labelled images '{printable(path)}' do not exist; expected a folder or a CSV.")
    if groups and not path.is_file():
        raise ValueError(f"--groups {groups} is a column of a CSV, but '{printable(path)}' is a folder: --group-by.")
    parts = None if path.is_file() else split_folders(path)
    if parts is not None:
        train, test = (rows_of_folder(part, in_chans, pixels, notes, group_by) for part in parts)
        where = f"'{printable(parts[0])}'", f"'{printable(parts[1])}'"
        remedy = "Both parts need the same class folders."
        check_same_classes(_classes(train), _classes(test), where, ordered=False, remedy=remedy)
        rows = train
        if both := sorted({row.group for row in train if row.group} & {row.group for row in test}):
            raise ValueError(
                f"{len(both)} group{'s are' if len(both) > 1 else ' is'} in {where[0]} and in {where[1]}, such as "
                f"'{printable(both[0])}': move each to one side."
            )
    else:
        is_table = path.is_file()
        rows = (
            _table(path, notes, groups, group_by)
            if is_table
            else rows_of_folder(path, in_chans, pixels, notes, group_by)
        )
    classes = _classes(rows)
    if len(classes) < 2:
        has = f"one class, {classes[0]}" if classes else "no images"
        raise ValueError(f"'{printable(path)}' has {has}; expected at least two classes.")
    if parts is None:
        held = _held(rows, validation_share, seed)
        train, test = ([row for i, row in enumerate(rows) if (i in held) == part] for part in (False, True))
    several = any(len(row.labels) > 1 for row in [*train, *test])
    splits: list[Split] = []
    paths = [[row.path for row in part] for part in (train, test)]
    for part, names in zip((train, test), paths, strict=True):
        source = ImageFiles(names, in_chans, pixels)
        splits.append(Split(source, _numbers([row.labels for row in part], classes, several)))
        refuse_bad([message for _, message in check_readable(source)])
    shared = shared_note(paths[0], paths[1], "test")
    return Labelled(classes, splits[0], splits[1], (*notes, *([shared] if shared else [])))


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders for training and for validation; None if the folder holds classes."""

    def has_folders(folder: Path) -> bool:  # so that it is a part with classes rather than a class of this name
        return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())

    train, test = (
        next((root / name for name in names if has_folders(root / name)), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train is not None and test is None:
        expected = (
            f"expected one of {', '.join(TEST_FOLDERS)}. To split {train.name}/ by seed, give '{printable(train)}'"
        )
        raise ValueError(f"'{printable(root)}' has {train.name}/ and no folder to validate on, {expected}.")
    return None if train is None or test is None else (train, test)


def rows_of_folder(root: Path, in_chans: int, pixels: Pixels, notes: list[str], group_by: str | None) -> list[Row]:
    source = FolderSource(root, in_chans, pixels)
    paths = sorted((source.path(i) for i in range(len(source))), key=natural_key)
    folders = [os.path.dirname(os.path.relpath(path, root)).split(os.sep) for path in paths]
    few, expected = (2, "CLASS/GROUP/IMAGE") if group_by else (1, "CLASS/IMAGE")
    if lost := [path for path, above in zip(paths, folders, strict=True) if not above[0] or len(above) < few]:
        what = f"{printable(lost[0])} is in no folder of a {'group' if group_by else 'class'}"
        raise ValueError(f"{what}; expected {expected} in '{printable(root)}'.")
    if group_by:
        return [Row(path, (above[0],), above[-1]) for path, above in zip(paths, folders, strict=True)]
    rows = [Row(path, (above[-1],)) for path, above in zip(paths, folders, strict=True)]
    notes += filter(None, [classes_in_several_folders(os.path.relpath(path, root) for path in paths)])
    return rows


def _table(path: Path, notes: list[str], groups: str | None, group_by: str | None) -> list[Row]:
    try:
        with open_text(path, newline="") as file:
            reader = csv.DictReader(file)
            columns, lines = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeError, csv.Error) as e:
        raise ValueError(f"'{printable(path)}' cannot be read as CSV: {e}") from e
    if not {"name", "label"} <= set(columns):
        raise ValueError(f"'{printable(path)}' has the columns {columns}, expected name and label.")
    if groups and groups not in columns:
        raise ValueError(f"--groups {groups}: '{printable(path)}' has the columns {', '.join(columns)}.")
    rows: dict[str, tuple[int, Row]] = {}  # line and row, by the file itself
    for number, line in enumerate(lines, start=2):
        labels = tuple(dict.fromkeys(part.strip() for part in (line["label"] or "").split(SEPARATOR) if part.strip()))
        file = path.parent / (line["name"] or "")
        if not labels or not file.is_file():
            what = f"no file '{printable(file)}'" if labels else f"no label for '{line['name']}'"
            raise ValueError(f"'{printable(path)}' line {number}: {what}. Paths are relative to the CSV.")
        group = line[groups] if groups else os.fspath(file.parent) if group_by else None
        if groups and not group:
            raise ValueError(f"'{printable(path)}' line {number}: no {groups} for '{line['name']}'.")
        row = Row(os.fspath(file), labels, group)
        first, (_, before, other) = rows.setdefault(os.path.realpath(file), (number, row))
        if groups and other != group:
            raise ValueError(f"'{printable(path)}' has two groups for '{line['name']}': '{other}' and '{group}'.")
        if set(before) != set(labels):
            given = f"line {first} '{SEPARATOR.join(before)}', line {number} '{SEPARATOR.join(labels)}'"
            raise ValueError(
                f"'{printable(path)}' has two labels for '{line['name']}': {given}. Keep one row per image; if both "
                f"labels hold, join them with '{SEPARATOR}'."
            )
    if merged := len(lines) - len(rows):
        notes.append(f"{merged} of {len(lines)} rows repeat the label of an image and were merged.")
    return [row for _, row in rows.values()]


def _classes(rows: list[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.labels}, key=natural_key)


def _held(rows: list[Row], share: float, seed: int) -> set[int]:
    """Indices of the test images: a fraction `share` of each class, at least one if the class has two."""
    labels, generator = [row.labels for row in rows], torch.Generator().manual_seed(seed)
    if any(row.group for row in rows):
        return _held_groups(rows, share, generator)
    several = any(len(label) > 1 for label in labels)
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault("" if several else label[0], []).append(i)
    held: set[int] = set()
    for _, members in sorted(groups.items()):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.update(members[j] for j in torch.randperm(len(members), generator=generator)[:count].tolist())
    if not held:
        counts = ", ".join(f"{name} {n}" for name, n in Counter(label[0] for label in labels).items())
        raise ValueError(f"No class has two images, so none can be held out: {counts}. Add images.")
    return held


def _held_groups(rows: list[Row], share: float, generator: torch.Generator) -> set[int]:
    """Indices of the test images: whole groups, taken in random order while they bring classes nearer to `share`."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(str(row.group), []).append(i)
    total = Counter(label for row in rows for label in row.labels)
    missing = {label: share * count for label, count in total.items()}
    held: set[int] = set()
    names = sorted(members)
    for j in torch.randperm(len(names), generator=generator).tolist():
        has = Counter(label for i in members[names[j]] for label in rows[i].labels)
        # relative to the class, so that rare classes count as much as frequent ones
        nearer = sum((abs(missing[label]) - abs(missing[label] - n)) / total[label] for label, n in has.items())
        if nearer > 0:
            held.update(members[names[j]])
            missing |= {label: missing[label] - n for label, n in has.items()}
    for side in ("training", "test"):
        there = {label for i, row in enumerate(rows) if (i in held) == (side == "test") for label in row.labels}
        if lost := sorted(set(total) - there):
            count = len({row.group for row in rows if lost[0] in row.labels})
            raise ValueError(
                f"Grouping leaves no {side} image of {', '.join(map(printable, lost[:NAMED]))}; {printable(lost[0])} "
                f"has {count} of {len(names)} groups. Each class needs two or more: add groups, leave the class out, "
                "or change --validation-share or --seed."
            )
    return held


def _numbers(labels: list[tuple[str, ...]], classes: list[str], several: bool) -> Tensor:
    number = {name: i for i, name in enumerate(classes)}
    if not several:
        return torch.tensor([number[label[0]] for label in labels])
    many = torch.zeros(len(labels), len(classes), dtype=torch.long)
    for i, label in enumerate(labels):
        many[i, [number[name] for name in label]] = 1
    return many
