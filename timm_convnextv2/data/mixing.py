"""Seeds from numbers."""

import hashlib

__all__ = ["mix"]


def mix(*numbers: int) -> int:
    """A seed in 0 .. 2**63 - 1, well mixed, the same everywhere and always."""
    text = ",".join(str(int(n)) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
