"""Measures: what is computed and drawn between epochs.

A measure is a callable `(epoch, encoder) -> dict` of numbers that rank 0 runs after some epochs, counted from 1.
`encoder` is the `ConvNeXtV2` that an export would write: the one in training, or its moving average. The numbers become
columns `eval_*` of summary.csv; they are named beforehand, because they stay empty in epochs without the measure.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import collate
from ..features import collapse
from ..files import read_rows
from ..models import FCMAE, ConvNeXtV2
from ..report.images import save_reconstructions
from ..runs.errors import attempt
from ..runs.summary import write_rows
from .config import KEEP_BEST

Run = Callable[[int, ConvNeXtV2], dict[str, float]]


class Best:
    """The best value so far of a measure in `KEEP_BEST`, also in the `rows` of a resumed run's summary.csv."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name = name
        self.value = -math.inf
        for row in rows:
            self.improves({name: row.get(f"eval_{name}") or ""})

    def improves(self, measured: dict[str, float | str]) -> bool:
        """Records an epoch; returns whether it is the best so far. False if the measure was not due."""
        value = float(measured.get(self.name, "") or "nan") * (1 if KEEP_BEST[self.name] else -1)
        better = math.isfinite(value) and value > self.value
        self.value = value if better else self.value
        return better


@dataclass
class Measure:
    """A measure and its schedule."""

    run: Run
    interval: int  # epochs between two runs; it also runs after the first epoch and after the last
    columns: tuple[str, ...] = ()  # names of its numbers

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether it runs after this epoch, counted from 1."""
        return epoch in (1, epochs) or epoch % self.interval == 0


def measure_epoch(
    measures: list[Measure], epoch: int, epochs: int, encoder: ConvNeXtV2, note: Callable[[str], Any] = print
) -> dict[str, float | str]:
    """The columns of all measures after an epoch, '' if not due; `note` prints a warning if files cannot be used."""
    numbers: dict[str, float | str] = {}
    for measure in measures:
        numbers.update(dict.fromkeys(measure.columns, ""))
        if measure.due(epoch, epochs):

            def act(run: Run = measure.run) -> None:
                numbers.update(run(epoch, encoder))

            attempt("a measure", act, note, (OSError, ValueError))
    return numbers


def affordable(images: list, images_seen: int, runs: int) -> list:
    """Images of a measure whose `runs` cost about a hundredth of the training; at least eight."""
    # an update of FCMAE costs about as much per image as the forward of an unmasked one
    count = min(len(images), max(8, images_seen // (100 * runs)))
    return [images[i * len(images) // count] for i in range(count)]


def reconstructions(
    folder: Path, model: FCMAE, shown: list, title: Callable[[int], str], bands: Sequence[int] | None = None
) -> Run:
    """The measure that draws the predictions for a few samples `(image, mask, bad)` into `epoch-0001.png` and so on.

    `title` is the line above, by epoch; for `bands` see `display_of`.
    """

    def draw(epoch: int, _encoder: ConvNeXtV2) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        batch: Any = collate(shown)
        images, masks, _ = batch
        save_reconstructions(folder / f"epoch-{epoch:04d}.png", model, images, masks, title(epoch), bands)
        return {}

    return draw


def held_out_loss(model: Callable[[], FCMAE], batches: Iterable, amp_dtype: torch.dtype | None = None) -> Run:
    """The measure `loss`, on `batches` of `(images, masks, bad)` that are the same whenever they are iterated."""

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


def collapse_of_blocks(path: Path, watched: list) -> Run:
    """The measures `distance` and `dead`: the similarity of channels, the mean over blocks; `path` gets each block."""

    def measure(epoch: int, encoder: ConvNeXtV2) -> dict[str, float]:
        batch: Any = collate(watched)
        found = collapse(encoder, batch[0])
        rows, _ = read_rows(path)
        rows = [row for row in rows if int(str(row["epoch"])) < epoch]  # a resumed run measures an epoch again
        for b in found:
            numbers = {"depth": round(b.depth, 4), "distance": f"{b.distance:.6g}", "dead": f"{b.dead:.6g}"}
            rows.append({"epoch": epoch, "block": b.block, **numbers})
        write_rows(path, rows)
        return {name: sum(getattr(b, name) for b in found) / len(found) for name in ("distance", "dead")}

    return measure
