"""Which channels of which images of an update are removed (`--channel-dropout`)."""

import torch

from ..data import sample_seed
from ..models.masking import random_channels

__all__ = ["removed_channels"]

_STREAM = -1  # in the place of a process, so that no other random numbers are these


def removed_channels(
    p: float, in_chans: int, seed: int, number: int, step: int, steps: int, batch_size: int, rank: int, size: int
) -> torch.Tensor | None:
    """The channels that are removed from a batch: a function of the seed, the update and the place of each image in it.

    N processes, and any number of steps, remove the same from the images of an update as one batch of all would.

    Args:
        p: Probability of each channel.
        in_chans: Channels `C`.
        seed: Of the run.
        number: Updates of the run before this one.
        step: Batch of the update, from 0.
        steps: Batches of the update.
        batch_size: Images `B` of the batch.
        rank: Of this process.
        size: Number of processes, which take the images of a step in turn.

    Returns:
        Bool `[B, C]`, True = removed; None where `p` is 0.
    """
    if not p:
        return None
    generator = torch.Generator().manual_seed(sample_seed(seed, number, _STREAM))
    everywhere = random_channels(steps * batch_size * size, in_chans, p, generator)
    return everywhere[step * batch_size * size :][rank::size][:batch_size]
