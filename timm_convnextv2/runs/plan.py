"""`Plan`: the length of a run and its peak learning rate."""

import math
from typing import NamedTuple


class Plan(NamedTuple):
    """The arithmetic of a run.

    Attributes:
        updates: Optimizer updates of the whole run; the last epoch may be shorter than the others.
        updates_per_epoch: Updates of a whole epoch.
        images_per_update: Images per update over all processes.
        lr: Peak learning rate.
        warmup_updates: Updates of linear warmup.
    """

    updates: int
    updates_per_epoch: int
    images_per_update: int
    lr: float
    warmup_updates: int = 0

    @property
    def epochs(self) -> int:
        """Epochs, the last one possibly shorter."""
        return math.ceil(self.updates / self.updates_per_epoch)

    def updates_in(self, epoch: int) -> int:
        """Updates of an epoch, counted from 0."""
        return min(self.updates_per_epoch, self.updates - epoch * self.updates_per_epoch)
