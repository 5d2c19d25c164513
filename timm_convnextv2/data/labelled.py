"""Labelled images as rows: class folders, or a CSV of names and labels; and their split into two parts."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils.misc import natural_key

from ..console import check_same_classes
from ..files import read_cell, write_csv
from .formats.files import TRAIN_FOLDERS, VALIDATION_FOLDERS, printable
from .paths.lists import open_text
from .paths.walk import classes_in_several_folders
from .sources.files import FolderSource

SEPARATOR = ";"
NAMED = 12  # classes in a message
TEST_FOLDERS = (*VALIDATION_FOLDERS, "test")
COLUMNS = ("name", "label", "split")  # the last one is optional
SPLIT_FILE = "split.csv"  # in the folder of a run


class Row(NamedTuple):
    """A labelled image."""

    path: str
    labels: tuple[str, ...]
    group: str | None = None  # patient, slide, video, ...: all of one group are on one side of a split
    part: str | None = None  # one of `TRAIN_FOLDERS` or `TEST_FOLDERS`; None if the split is still to be made


def check_place(place: str | os.PathLike) -> None:
    """Refuses a folder or CSV that does not exist."""
    if not os.path.exists(place):
        raise ValueError(f"The labelled images '{printable(place)}' do not exist; expected a folder or a CSV.")


def read_labelled(
    place: str | os.PathLike, groups: str | None = None, group_by: str | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of a CSV or a folder, see `features.open_labelled`; and notes on possible mistakes and merged rows."""
    path, notes = Path(place), list[str]()
    if groups and group_by:
        raise ValueError("--groups and --group-by both name the groups: choose one.")
    check_place(path)
    if path.is_file():
        return _table(path, notes, groups, group_by), notes
    if groups:
        raise ValueError(f"--groups {groups} is a column of a CSV, but '{printable(path)}' is a folder: --group-by.")
    parts = split_folders(path)
    if parts is None:
        return rows_of_folder(path, notes, group_by), notes
    rows = [row._replace(part=part.name) for part in parts for row in rows_of_folder(part, notes, group_by)]
    return rows, notes


def check_classes(rows: Sequence[Row], place: str | os.PathLike) -> list[str]:
    """The names of the classes in natural order; refuses less than two."""
    classes = classes_of(rows)
    if len(classes) < 2:
        has = f"one class, {classes[0]}" if classes else "no images"
        raise ValueError(f"'{printable(place)}' has {has}; expected at least two classes.")
    return classes


def write_split(file: Path, train: Sequence[Row], test: Sequence[Row]) -> None:
    """Writes a CSV that `read_labelled` takes: each image by its path relative to the CSV, its label and its part."""
    start = os.path.realpath(file.parent)
    lines = (
        (os.path.relpath(row.path, start), SEPARATOR.join(row.labels), name)
        for name, rows in (("train", train), ("validation", test))
        for row in rows
    )
    write_csv(file, COLUMNS, lines, errors="surrogateescape")


def kept_rows(file: Path, paths: Sequence[str]) -> list[Row]:
    """The rows of a CSV of `write_split` whose image is one of `paths`; other images may be gone."""
    there = {os.path.realpath(path): path for path in paths}
    found = ((there.get(os.path.realpath(file.parent / line["name"])), line) for line in _lines(file, COLUMNS)[1])
    return [Row(path, (line["label"],), part=line["split"]) for path, line in found if path is not None]


def _lines(path: Path, needed: Sequence[str] = COLUMNS[:2]) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns and the lines of a CSV."""
    try:
        with open_text(path, newline="", errors="surrogateescape" if needed == COLUMNS else "strict") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            lines = [{key: read_cell(x) if isinstance(x, str) else x for key, x in line.items()} for line in reader]
    except (OSError, UnicodeError, csv.Error) as e:
        raise ValueError(f"'{printable(path)}' cannot be read as CSV: {e}") from e
    if not set(needed) <= set(columns):
        raise ValueError(f"'{printable(path)}' has the columns {columns}, expected {' and '.join(needed)}.")
    return columns, lines


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


def rows_of_folder(root: Path, notes: list[str], group_by: str | None = None) -> list[Row]:
    source = FolderSource(root)
    paths = sorted((source.path(i) for i in range(len(source))), key=natural_key)
    folders = [os.path.dirname(os.path.relpath(path, root)).split(os.sep) for path in paths]
    few, expected = (2, "CLASS/GROUP/IMAGE") if group_by else (1, "CLASS/IMAGE")
    if lost := [path for path, above in zip(paths, folders, strict=True) if not above[0] or len(above) < few]:
        what = f"{printable(lost[0])} is in no folder of a {'group' if group_by else 'class'}"
        raise ValueError(f"{what}; expected {expected} in '{printable(root)}'.")
    notes += filter(None, [str(source.left)])
    if group_by:
        return [Row(path, (above[0],), above[-1]) for path, above in zip(paths, folders, strict=True)]
    rows = [Row(path, (above[-1],)) for path, above in zip(paths, folders, strict=True)]
    notes += filter(None, [classes_in_several_folders(os.path.relpath(path, root) for path in paths)])
    return rows


def _table(path: Path, notes: list[str], groups: str | None, group_by: str | None) -> list[Row]:
    columns, lines = _lines(path)
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
        part = line["split"] if "split" in columns else None
        if "split" in columns and part not in (*TRAIN_FOLDERS, *TEST_FOLDERS):
            raise ValueError(
                f"'{printable(path)}' line {number}: split is '{part}', expected train or validation; leave the column "
                "out to split by seed."
            )
        row = Row(os.fspath(file), labels, group, part)
        first, (_, before, other, side) = rows.setdefault(os.path.realpath(file), (number, row))
        if groups and other != group:
            raise ValueError(f"'{printable(path)}' has two groups for '{line['name']}': '{other}' and '{group}'.")
        if (side in TRAIN_FOLDERS) != (part in TRAIN_FOLDERS):
            raise ValueError(f"'{printable(path)}' has two splits for '{line['name']}': '{side}' and '{part}'.")
        if set(before) != set(labels):
            given = f"line {first} '{SEPARATOR.join(before)}', line {number} '{SEPARATOR.join(labels)}'"
            raise ValueError(
                f"'{printable(path)}' has two labels for '{line['name']}': {given}. Keep one row per image; if both "
                f"labels hold, join them with '{SEPARATOR}'."
            )
    if merged := len(lines) - len(rows):
        notes.append(f"{merged} of {len(lines)} rows repeat the label of an image and were merged.")
    return [row for _, row in rows.values()]


def classes_of(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.labels}, key=natural_key)


def divide(rows: list[Row], place: str | os.PathLike, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows of `place` to train and to test on: by their parts, else a fraction `share` for the test, by `seed`.

    Parts without the same classes, a group in both, and a class that grouping leaves in one only are a `ValueError`.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation_share is {share}, expected a fraction above 0 and below 1.")
    if not any(row.part for row in rows):
        held = _held(rows, share, seed)
        train, test = ([row for i, row in enumerate(rows) if (i in held) == part] for part in (False, True))
        return train, test
    train, test = ([row for row in rows if (row.part in TRAIN_FOLDERS) == part] for part in (True, False))
    where = [f"'{printable(Path(place) / str(part[0].part if part else name))}'"
             for name, part in (("train", train), ("validation", test))]  # fmt: skip
    remedy = "Both parts need the same classes."
    check_same_classes(classes_of(train), classes_of(test), (where[0], where[1]), ordered=False, remedy=remedy)
    if both := sorted({row.group for row in train if row.group} & {row.group for row in test if row.group}):
        raise ValueError(
            f"{len(both)} group{'s are' if len(both) > 1 else ' is'} in {where[0]} and in {where[1]}, such as "
            f"'{printable(both[0])}': move each to one side."
        )
    return train, test


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
