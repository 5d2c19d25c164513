"""Seeds from numbers."""

import hashlib


def mix(*numbers: int) -> int:
    """A seed in 0 .. 2**63 - 1, well mixed, the same everywhere and always."""
    text = ",".join(str(int(n)) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed in 0 .. 2**63 - 1 of one sample in one epoch, well mixed, the same everywhere and always."""
    return mix(seed, epoch, index)
