"""Names of millions of files, in one block of bytes that processes share."""

import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

__all__ = ["FileNames"]


class FileNames:
    """Names of files, as the file system knows them: a block of bytes, and where each name ends in it.

    A name takes its length and 8 bytes. No object a name is kept, so that forked workers share the memory.

    Args:
        block: The names one after the other, bytes or uint8.
        ends: Position in `block` where each begins, and the end of the last: int64 `[n + 1]`.
    """

    def __init__(self, block: Any, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def collect(cls, names: Iterable[bytes]) -> "FileNames":
        """Those of an iterable."""
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name
            ends.append(len(block))
        return cls(block, np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.raw(i))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def raw(self, i: int) -> bytes:
        """Name `i` as bytes."""
        return bytes(self.block[self.ends[i] : self.ends[i + 1]])

    def part(self, first: int, count: int) -> "FileNames":
        """`count` names from `first` on; nothing is copied."""
        return FileNames(self.block, self.ends[first : first + count + 1])
