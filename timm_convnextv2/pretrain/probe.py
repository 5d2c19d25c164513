"""`--probe-dir`: whether the features of the encoder serve, on labelled images, beside what costs no training.

The encoder stays as it is: kNN and ridge look at frozen features. Random weights of the same model and the plain
pixels are judged once, at the start; `probe.json` in the run's folder keeps them for a run that is resumed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Labelled, image_batches, pixels
from ..features import evaluate as judge
from ..features import extract as features
from ..features.knn import nearest
from ..files import whole_file
from ..models import ConvNeXtV2
from ..report.images import save_neighbours

Run = Callable[[int, ConvNeXtV2], dict[str, float]]
NEIGHBOURS = 20
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 6, 5


class Probe:
    """Judges an encoder on labelled images.

    Args:
        labelled: The images and labels.
        place: Where they are from.
        transform: Decoded image to `[C, H, W]` as the encoder takes it.
        batch_size: Images at a time.
        workers: Processes that decode.
        device: Where the encoder is.
        amp: Compute in bfloat16.

    Attributes:
        columns: Names of the numbers of `judge`.
        unit: What kNN and ridge are measured in: 'accuracy', or 'mAP' where images have several labels.
    """

    columns = ("knn", "ridge", "rank")

    def __init__(
        self, labelled: Labelled, place: str, transform: Callable, batch_size: int, workers: int, device: torch.device,
        amp: bool = False,
    ) -> None:  # fmt: skip
        self.labelled, self.place, self.transform = labelled, place, transform
        self.batch_size, self.workers, self.device, self.amp = batch_size, workers, device, amp
        self.neighbours = min(NEIGHBOURS, len(labelled.train.labels))
        self.unit = "mAP" if labelled.several else "accuracy"

    def rows(self, compute: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Features of the training and of the test images, float32 `[N, D]` and `[M, D]`, by `compute(batches)`."""
        train, test = (
            compute(image_batches(split.source, self.transform, self.batch_size, self.workers))
            for split in (self.labelled.train, self.labelled.test)
        )
        return train, test

    def of_encoder(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """`rows` of an encoder's features."""
        return self.rows(lambda batches: features(encoder, batches, devices=(self.device,), amp=self.amp))

    def judge(self, train: Tensor, test: Tensor) -> dict[str, float]:
        """kNN and ridge in %, and the rank of the features of the test images."""
        found = judge(
            train, self.labelled.train.labels, test, self.labelled.test.labels,
            num_classes=len(self.labelled.classes), k=(self.neighbours,), probe=False, draws=1,
        )  # fmt: skip
        knn, ridge = found[f"knn_{self.neighbours}"].value, found["ridge"].value
        return {"knn": round(100 * knn, 2), "ridge": round(100 * ridge, 2), "rank": round(found["rank"].value, 2)}

    def baselines(self, path: Path, random_encoder: Callable[[], nn.Module]) -> dict[str, dict[str, float]]:
        """What random weights and 8 x 8 pixels reach, from the file of a run that is resumed, or measured and written.

        Args:
            path: Of `probe.json`.
            random_encoder: Makes an encoder of the run's architecture.
        """
        about = {
            "data_dir": self.place,
            "classes": self.labelled.classes,
            "train": len(self.labelled.train.labels),
            "test": len(self.labelled.test.labels),
            "k": self.neighbours,
            "unit": self.unit,
            "chance": round(100 * self.labelled.chance, 2),
        }
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if all(before.get(key) == value for key, value in about.items()):
                return before["baselines"]
        plain = self.judge(*self.rows(pixels))
        plain.pop("rank")  # of few pixels, it is no rank of features
        found = {"random": self.judge(*self.of_encoder(random_encoder().to(self.device))), "pixels": plain}
        with whole_file(path) as part:
            part.write_text(json.dumps({**about, "baselines": found}, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return found

    def measure(self, folder: Path, mean: list[float], std: list[float]) -> Run:
        """The measure `knn`, `ridge`, `rank`, which also draws the nearest neighbours of a few test images.

        Args:
            folder: Where `epoch-0001.png` and so on go.
            mean: That the images are normalised with.
            std: Likewise.
        """

        def run(epoch: int, encoder: ConvNeXtV2) -> dict[str, float]:
            train, test = self.of_encoder(encoder)
            numbers = self.judge(train, test)
            self.draw(folder / f"epoch-{epoch:04d}.png", train, test, mean, std, f"epoch {epoch}")
            return numbers

        return run

    def draw(self, path: Path, train: Tensor, test: Tensor, mean: list[float], std: list[float], title: str) -> None:
        """A few test images, each with its nearest training images."""
        queries = [i * len(test) // min(SHOWN_QUERIES, len(test)) for i in range(min(SHOWN_QUERIES, len(test)))]
        _, found = nearest(train, test[queries], min(SHOWN_NEIGHBOURS, len(train)))
        chosen = sorted({i for row in found.tolist() for i in row})
        place = {i: len(queries) + n for n, i in enumerate(chosen)}
        images = [self.transform(self.labelled.test.source[i]) for i in queries]
        images += [self.transform(self.labelled.train.source[i]) for i in chosen]
        rows = [(n, [place[i] for i in row]) for n, row in enumerate(found.tolist())]
        path.parent.mkdir(exist_ok=True)
        save_neighbours(path, torch.stack(images), rows, mean, std, title)
