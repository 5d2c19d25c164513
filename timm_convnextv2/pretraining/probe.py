"""`--probe-dir`: kNN and ridge on frozen features of labelled images, compared with baselines that need no training.

The baselines, random weights of the same model and those of `plain_baselines`, are measured once at the start;
`probe.json` in the run's folder keeps them for a resumed run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from ..config import read_json
from ..data.formats.files import printable
from ..features import Labelled, Scoring, image_batches, rankme
from ..features.baselines import plain_baselines
from ..features.evaluate import resampled_features
from ..features.extract import extract_many
from ..features.linear import difference
from ..features.neighbours import nearest
from ..files import write_json
from ..models import ConvNeXtV2
from ..report.images import save_neighbours
from ..seeds import seeded
from .measures import Run

NEIGHBOURS = 20
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 6, 5
PLAIN = ("pixels", "histogram", "border")  # names in probe.json, in the order of `plain_baselines`


class Rows(NamedTuple):
    """How labelled images become rows of features."""

    transform: Callable  # from a decoded image to the encoder's input, [C, H, W]
    batch_size: int
    workers: int
    device: torch.device
    amp: bool = False


@contextmanager
def naming_probe(place: str) -> Iterator[None]:
    """Lets errors of the labelled images at `place` name --probe-dir, because a run has other images too."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"--probe-dir {printable(place)}: {e}") from e


def random_encoder(encoder: Any, seed: int) -> nn.Module:
    """An encoder of the same architecture with random weights."""
    with seeded(seed):  # leaves the run's random numbers unchanged
        return timm.create_model(encoder.pretrained_cfg["architecture"], num_classes=0, **encoder._model_args)


class Probe:
    """Evaluates encoders on the labelled images at `place`; `rows` says how they become rows of features.

    For `bands`, the channels that are drawn, see `display_of`.
    """

    columns = ("knn", "ridge", "rank")

    def __init__(self, labelled: Labelled, place: str, rows: Rows, bands: Sequence[int] | None = None) -> None:
        self.labelled, self.place, self.rows, self.bands = labelled, place, rows, bands
        self.neighbours = min(NEIGHBOURS, len(labelled.train.labels))
        self.unit = "mAP" if labelled.several else "accuracy"
        self.record: dict[str, Any] = {}  # content of probe.json, see `baselines`

    def features(self, *models: nn.Module | Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Features of the training and of the test images, float32 `[N, D]` and `[M, D]`, per model or function."""
        how: dict[str, Any] = {"devices": (self.rows.device,), "amp": self.rows.amp}
        with naming_probe(self.place):
            train, test = (
                extract_many(models, image_batches(split.source, *self.rows[:3]), **how)
                for split in (self.labelled.train, self.labelled.test)
            )
        return [*zip(train, test, strict=True)]

    def score(self, train: Tensor, test: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """kNN and ridge in % and the rank of the test features; and kNN and ridge on resampled test images."""
        scoring = Scoring(k=(self.neighbours,), probe=False)
        labels = self.labelled.train.labels, self.labelled.test.labels
        how: dict[str, Any] = {"num_classes": len(self.labelled.classes), "scoring": scoring}
        values = resampled_features(train, labels[0], test, labels[1], **how)
        values = {"knn": values[f"knn_{self.neighbours}"], "ridge": values["ridge"]}
        numbers = {name: round(100 * float(value[0]), 2) for name, value in values.items()}
        return {**numbers, "rank": round(rankme(test), 2)}, values

    def baselines(self, path: Path, random_encoder: Callable[[], nn.Module]) -> dict[str, dict[str, float]]:
        """Scores of random weights and of the plain baselines, read from the `probe.json` at `path`, or measured."""
        of = self.labelled
        about = {
            "data_dir": self.place, "classes": of.classes, "train": len(of.train.labels), "test": len(of.test.labels),
            "k": self.neighbours, "unit": self.unit, "chance": round(100 * of.chance, 2),
        }  # fmt: skip
        if path.exists():
            before = read_json(path)
            if all(before.get(key) == value for key, value in about.items()) and "resampled" in before:
                self.record = before
                return before["baselines"]
        plain = plain_baselines(of.train.source, self.rows.transform)
        rows = self.features(random_encoder().to(self.rows.device), *plain.values())
        scores = {name: self.score(*pair) for name, pair in zip(("random", *PLAIN), rows, strict=True)}
        for name in PLAIN:
            scores[name][0].pop("rank")  # the rank of so few numbers says nothing about features
        resampled = {
            base: {key: [round(v, 6) for v in value.tolist()] for key, value in values.items()}
            for base, (_, values) in scores.items()
        }
        self.record = {**about, "baselines": {name: of for name, (of, _) in scores.items()}, "resampled": resampled}
        write_json(path, self.record)
        return self.record["baselines"]

    def compare(self, path: Path, epoch: int, values: dict[str, Tensor]) -> None:
        """Writes the differences to the baselines, with paired intervals, to the `probe.json` at `path`."""
        against = {
            base: {key: difference(values[key], torch.tensor(of[key], dtype=torch.float64)) for key in values}
            for base, of in self.record["resampled"].items()
        }
        write_json(path, {**self.record, "latest": {"epoch": epoch, "against": against}})

    def describe(self, baselines: dict[str, dict[str, float]]) -> str:
        """The baselines in one line."""
        texts = [f"{name} kNN {found['knn']:.1f} %, ridge {found['ridge']:.1f} %" for name, found in baselines.items()]
        return f"Frozen features on {len(self.labelled.test.labels)} test images, {self.unit}: {'; '.join(texts)}"

    def measure(self, folder: Path) -> Run:
        """The measure `knn`, `ridge`, `rank`, which also draws the neighbours of a few test images into `folder`."""

        def run(epoch: int, encoder: ConvNeXtV2) -> dict[str, float]:
            ((train, test),) = self.features(encoder)
            numbers, values = self.score(train, test)
            self.compare(folder.with_name("probe.json"), epoch, values)
            self.draw(folder / f"epoch-{epoch:04d}.png", train, test, f"epoch {epoch}")
            return numbers

        return run

    def draw(self, path: Path, train: Tensor, test: Tensor, title: str) -> None:
        """Draws a few test images, each with its nearest training images."""
        count = min(SHOWN_QUERIES, len(test))
        queries = [i * len(test) // count for i in range(count)]
        _, found = nearest(train, test[queries], min(SHOWN_NEIGHBOURS, len(train)))
        chosen = sorted({i for row in found.tolist() for i in row})
        position = {i: count + n for n, i in enumerate(chosen)}  # in the list of images to draw
        images = [self.rows.transform(self.labelled.test.source[i]) for i in queries]
        images += [self.rows.transform(self.labelled.train.source[i]) for i in chosen]
        rows = [(n, [position[i] for i in row]) for n, row in enumerate(found.tolist())]
        path.parent.mkdir(exist_ok=True)
        save_neighbours(path, torch.stack(images), rows, title, self.bands)
