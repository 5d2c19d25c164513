"""Labelled images: folders of classes, or a table of names and labels."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..console import count
from ..data import DemoSource, Pixels, Source, check_readable
from ..data.formats.files import printable
from ..data.formats.pixels import PLAIN
from ..data.labelled import NAMED, Row, check_classes, divide, read_labelled
from ..data.measure.duplicates import shared_note
from ..data.sources.files import ImageFiles
from .extract import refuse_bad

_DEMO = {2: 512, 3: 400}  # seed and images to train on, and to test on


class Split(NamedTuple):
    """Images, and their labels: int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several."""

    source: Source
    labels: Tensor
    groups: Tensor | None = None  # number of the patient, slide, video, ... of each image, from 0; int64 [N]


MANY_CLASSES, FEW_IMAGES = 10, 4  # more classes, of fewer images on average, may be patients or sessions


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
        images = f"{count(len(self.train.labels), 'image')} to train on and {len(self.test.labels)} to test on"
        line = f"{printable(place)}: {images}, {len(self.classes)} {kind} ({named}); "
        line += chance_words(self.chance, self.several)
        return [line, *(f"warning: {note}" for note in (*self.notes, *self._tiny_classes()))]

    def _tiny_classes(self) -> list[str]:
        """A note if there are many classes of so few images that they may be something else."""
        images = len(self.train.labels) + len(self.test.labels)
        if self.several or len(self.classes) < MANY_CLASSES or images > FEW_IMAGES * len(self.classes):
            return []
        each = f"{len(self.classes)} classes of {images / len(self.classes):.1f} images on average"
        return [f"{each}: are the folders patients or sessions? Give classes, and these as --groups."]


def chance_words(chance: float, several: bool) -> str:
    """What `Labelled.chance` is, with its value."""
    what = "constant scores give" if several else "always the most frequent class gives"
    return f"chance: {what} {100 * chance:.1f} %"


def open_labelled(
    place: str | os.PathLike, *, in_chans: int = 3, validation_share: float = 0.25, seed: int = 0,
    pixels: Pixels = PLAIN, groups: str | None = None, group_by: str | None = None
) -> Labelled:  # fmt: skip
    """Opens labelled images.

    Args:
        place: 'demo', the demo images, unless a folder has this name; or one of
            - a folder with `train/` and `validation/` (or timm's other names for them, or `test/`) of the same classes;
            - a folder of classes, which is split by `seed`, in the same proportion for each class;
            - a CSV with the columns `name` (path, relative to the CSV) and `label`, split in the same way or by its
              column `split`: `train`, or `validation` and its other names. Labels joined by `;` are several labels of
              one image; such data is split without regard to labels. Equal rows of an image count once; rows with
              different labels are an error.
        in_chans: Channels of the images.
        validation_share: Fraction of the images that become `test` in a split, above 0 and below 1.
        seed: Seed of that split.
        pixels: How stored values become pixels.
        groups: Column of the CSV with the group of each image: a group is on one side of the split.
        group_by: 'parent-folder' makes the folder of an image its group; class folders are then CLASS/GROUP/.

    A group on both sides of given folders, and a class that grouping leaves on one side only, are a `ValueError`.
    """
    if place == "demo" and not os.path.exists(place):
        sources = [DemoSource(count, in_chans=in_chans, seed=seed, pixels=pixels) for seed, count in _DEMO.items()]
        labels = [torch.tensor([source.label(i) for i in range(len(source))]) for source in sources]
        train, test = map(Split, sources, labels)
        return Labelled([*DemoSource.classes], train, test)
    rows, notes = read_labelled(place, groups, group_by)
    classes = check_classes(rows, place)
    train, test = divide(rows, place, validation_share, seed)
    several = any(len(row.labels) > 1 for row in [*train, *test])
    splits: list[Split] = []
    paths = [[row.path for row in part] for part in (train, test)]
    for part, names in zip((train, test), paths, strict=True):
        source = ImageFiles(names, in_chans, pixels)
        splits.append(Split(source, _numbers([row.labels for row in part], classes, several), _groups(part)))
        refuse_bad([message for _, message in check_readable(source)])
    shared = shared_note(paths[0], paths[1], "test")
    return Labelled(classes, splits[0], splits[1], (*notes, *([shared] if shared else [])))


def _groups(rows: list[Row]) -> Tensor | None:
    """The number of each row's group; None without groups."""
    number = {name: i for i, name in enumerate(dict.fromkeys(row.group for row in rows))}
    return None if None in number else torch.tensor([number[row.group] for row in rows])


def _numbers(labels: list[tuple[str, ...]], classes: list[str], several: bool) -> Tensor:
    number = {name: i for i, name in enumerate(classes)}
    if not several:
        return torch.tensor([number[label[0]] for label in labels])
    many = torch.zeros(len(labels), len(classes), dtype=torch.long)
    for i, label in enumerate(labels):
        many[i, [number[name] for name in label]] = 1
    return many
