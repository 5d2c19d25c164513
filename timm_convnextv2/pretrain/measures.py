"""What is measured and drawn during a run.

A measure is a plain callable `(epoch, encoder) -> dict` of numbers, run on the first process after epochs of its
interval; `epoch` counts from 1, `encoder` is the `ConvNeXtV2` that an export would write: the one in training, or its
moving average. Its numbers become columns `eval_*` of
summary.csv, which need their names beforehand: they are empty where nothing was measured.
"""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data import collate
from ..features import collapse
from ..files import whole_file
from ..models import FCMAE, ConvNeXtV2
from ..report.images import save_reconstructions
from ..runs.end import attempt
from ..runs.summary import read_rows

# what may decide, and whether more of it is better
KEEP_BEST = {"knn": True, "ridge": True, "loss": False}


class Best:
    """The best value of a measure so far.

    Args:
        name: One of `KEEP_BEST`.
        rows: Of summary.csv, where a run is resumed.
    """

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name = name
        self.value = -math.inf
        for row in rows:
            self.improves({name: row.get(f"eval_{name}") or ""})

    def improves(self, measured: dict[str, float | str]) -> bool:
        """Whether an epoch is the best so far, which is kept in mind; False where the measure was not due."""
        found = measured.get(self.name, "")
        if found == "" or not math.isfinite(float(found)):
            return False
        value = float(found) if KEEP_BEST[self.name] else -float(found)
        better = value > self.value
        self.value = max(value, self.value)
        return better


@dataclass
class Measure:
    """A measure and when it runs.

    Attributes:
        run: `(epoch, encoder) -> numbers`.
        interval: Epochs between two of its runs; it also runs after the first epoch and after the last.
        columns: Names of its numbers.
    """

    run: Callable[[int, ConvNeXtV2], dict[str, float]]
    interval: int
    columns: tuple[str, ...] = ()

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether it runs after this epoch, counted from 1."""
        return epoch in (1, epochs) or epoch % self.interval == 0


def measure_epoch(
    measures: list[Measure], epoch: int, epochs: int, encoder: ConvNeXtV2, note: Callable[[str], Any] = print
) -> dict[str, float | str]:
    """Runs what is due after an epoch; every column of every measure, '' where it was not.

    A measure that cannot write or read its files, or its labelled images, is a warning, printed by `note`.
    """
    numbers: dict[str, float | str] = {}
    for measure in measures:
        numbers |= dict.fromkeys(measure.columns, "")
        if measure.due(epoch, epochs):
            found: dict[str, float] = {}
            act = partial(_fill, found, measure.run, epoch, encoder)
            attempt("a measure", act, note, (OSError, ValueError))
            numbers |= found
    return numbers


def _fill(found: dict[str, float], run: Callable, epoch: int, encoder: ConvNeXtV2) -> None:
    found.update(run(epoch, encoder))


def reconstructions(
    folder: Path, model: FCMAE, shown: list, mean: list[float], std: list[float], title: Callable[[int], str]
) -> Callable[[int, ConvNeXtV2], dict[str, float]]:
    """The measure that draws what the model predicts of a few images, always the same with the same masks.

    Args:
        folder: Where `epoch-0001.png` and so on go.
        model: The FCMAE around the encoder.
        shown: Samples `(image, mask, bad)`.
        mean: That the images were normalised with.
        std: Likewise.
        title: The line above the images, by the epoch.
    """

    def draw(epoch: int, _encoder: ConvNeXtV2) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        batch: Any = collate(shown)
        images, masks, _ = batch
        save_reconstructions(folder / f"epoch-{epoch:04d}.png", model, images, masks, mean, std, title(epoch))
        return {}

    return draw


def held_out_loss(
    model: Callable[[], FCMAE], batches: Iterable, amp_dtype: torch.dtype | None = None
) -> Callable[[int, ConvNeXtV2], dict[str, float]]:
    """The measure of the loss on images that are never trained on: `loss`.

    Args:
        model: Gives the FCMAE around the encoder.
        batches: `(images, masks, bad)`, the same whenever it is iterated.
        amp_dtype: Type to compute in; None for that of the weights.
    """

    @torch.no_grad()
    def measure(_epoch: int, _encoder: ConvNeXtV2) -> dict[str, float]:
        fcmae = model()
        training, device = fcmae.training, fcmae.mask_token.device
        fcmae.eval()
        total, count = 0.0, 0
        for images, masks, _ in batches:
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = fcmae(images.to(device), masks.to(device), return_pred=False).loss
            total, count = total + float(loss) * len(images), count + len(images)
        fcmae.train(training)
        return {"loss": total / count}

    return measure


def collapse_of_blocks(path: Path, watched: list) -> Callable[[int, ConvNeXtV2], dict[str, float]]:
    """The measure of how much the channels of each block resemble each other: `distance` and `dead`, means of blocks.

    Args:
        path: CSV that gets a line a block and epoch.
        watched: Samples `(image, mask, bad)`.
    """
    columns = ("epoch", "block", "depth", "distance", "dead")

    def measure(epoch: int, encoder: ConvNeXtV2) -> dict[str, float]:
        batch: Any = collate(watched)
        found = collapse(encoder, batch[0])
        rows, _ = read_rows(path)  # without what a resumed run measures again
        before = [row for row in rows if int(str(row["epoch"])) < epoch]
        with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([row[name] for name in columns] for row in before)
            writer.writerows((epoch, b.block, round(b.depth, 4), f"{b.distance:.6g}", f"{b.dead:.6g}") for b in found)
        count = len(found)
        return {"distance": sum(b.distance for b in found) / count, "dead": sum(b.dead for b in found) / count}

    return measure
