"""`Plan`: the length of a run and its peak learning rate; and a warning if it is too short."""

import math
from typing import NamedTuple

from ..console import count

FEW_UPDATES = 150  # a pretraining on drawn images learned in 192


class Plan(NamedTuple):
    """The arithmetic of a run; its last epoch may be shorter than the others."""

    updates: int  # optimizer updates of the whole run
    updates_per_epoch: int
    images_per_update: int  # over all processes
    lr: float  # peak learning rate
    warmup_updates: int = 0  # of linear warmup

    @property
    def epochs(self) -> int:
        """Epochs, the last one possibly shorter."""
        return math.ceil(self.updates / self.updates_per_epoch)

    def updates_in(self, epoch: int) -> int:
        """Updates of an epoch, counted from 0."""
        return min(self.updates_per_epoch, self.updates - epoch * self.updates_per_epoch)


def few_updates(updates: int, per_epoch: int, more_epochs: int = 0) -> str:
    """A warning about a run of so few updates that it hardly learns, or ''; `more_epochs` are not in --epochs."""
    if updates >= FEW_UPDATES:
        return ""
    epochs = max(1, math.ceil(FEW_UPDATES / per_epoch) - more_epochs)
    return (
        f"{count(updates, 'update')} may be too few to learn: raise --epochs ({FEW_UPDATES} updates are --epochs "
        f"{epochs}), or lower --batch-size."
    )
