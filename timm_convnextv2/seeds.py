"""Seeds from numbers, and random numbers from a seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mix(*numbers: int) -> int:
    """A well-mixed seed in 0 .. 2**63 - 1, the same on every machine."""
    text = ",".join(str(int(n)) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one sample in one epoch."""
    return mix(seed, epoch, index)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's CPU generator inside the block only."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would reseed the accelerators too, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        yield
