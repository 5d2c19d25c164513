"""What is measured and drawn during a run.

A measure is a plain callable `(epoch, encoder) -> dict` of numbers, run on the first process after epochs of its
interval; `epoch` counts from 1, `encoder` is the `ConvNeXtV2` in training. Its numbers become columns `eval_*` of
summary.csv, which need their names beforehand: they are empty where nothing was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import collate
from ..files import system_reason
from ..models import FCMAE, ConvNeXtV2
from ..report import save_reconstructions

__all__ = ["Measure", "attempt", "measure_epoch", "reconstructions"]


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


def attempt(what: str, act: Callable[[], Any], note: Callable[[str], Any]) -> str:
    """Does something that a run can do without; where the disk refuses, that is a warning.

    Args:
        what: Its name.
        act: Does it.
        note: Prints a line.

    Returns:
        The warning, '' where all went well.
    """
    try:
        act()
    except OSError as e:
        warning = f"Warning: {what} failed ({system_reason(e)}). Training continues without it."
        note(warning)
        return warning
    return ""


def measure_epoch(
    measures: list[Measure], epoch: int, epochs: int, encoder: ConvNeXtV2, note: Callable[[str], Any] = print
) -> dict[str, float | str]:
    """Runs what is due after an epoch; every column of every measure, '' where it was not.

    A measure that cannot write or read its files is a warning, printed by `note`.
    """
    numbers: dict[str, float | str] = {}
    for measure in measures:
        numbers |= dict.fromkeys(measure.columns, "")
        if measure.due(epoch, epochs):
            found: dict[str, float] = {}
            attempt("a measure", lambda run=measure.run, found=found: found.update(run(epoch, encoder)), note)
            numbers |= found
    return numbers


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
