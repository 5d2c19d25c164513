"""`Plan`: the length of a run and its peak learning rate."""

import math
from typing import NamedTuple


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
