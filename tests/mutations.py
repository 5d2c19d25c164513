"""Seeded damage: to the bytes of a file, and to the values in nested content; and a limit of time for what reads it."""

import contextlib
import copy
import random
import signal
from collections.abc import Iterator
from typing import Any

import torch

ODD: tuple[Any, ...] = (
    None, -1, 0, 3.5, 1e308, float("nan"), True, "", "10", "x" * 300, [], [1], ["a", None], {}, {"a": 1}, 10**30,
    [[1, 2], [3]], "../..", [float("inf")] * 3,
)  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One flipped bit, a stretch of zeros or noise, or the file cut off."""
    kind, at = rng.choice(("flip", "flip", "zeros", "noise", "cut", "gap")), rng.randrange(len(data))
    length = rng.choice((1, 16, 512, 4096))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "gap":
        return data[:at] + data[at + length :]
    stretch = bytes(length) if kind == "zeros" else rng.randbytes(length)
    return (data[:at] + stretch + data[at + length :])[: len(data)]


def _places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield *path, key
        yield from _places(value, (*path, key))


def damage_content(content: Any, rng: random.Random, odd: tuple = ODD) -> tuple[Any, str]:
    """A copy with one value of another type, missing, or a tensor of another shape, type or with a NaN; and what."""
    content = copy.deepcopy(content)
    by_depth: dict[int, list[tuple]] = {}
    for place in _places(content):
        by_depth.setdefault(len(place), []).append(place)
    place = rng.choice(by_depth[rng.choice(sorted(by_depth))])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    value, what = parent[place[-1]], rng.choice(("odd", "odd", "gone"))
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        spoiled = value.clone() if value.is_floating_point() else value.float()
        spoiled.view(-1)[:1] = float("nan")
        changes = {"shape": torch.zeros(3, 1, 2), "type": value.long(), "meta": value.to("meta"), "nan": spoiled}
        changes["sparse"] = value.reshape(-1).to_sparse()
        what = rng.choice(sorted(changes))
        parent[place[-1]] = changes[what]
    elif what == "gone":
        del parent[place[-1]]
    else:
        parent[place[-1]] = odd[rng.randrange(len(odd))]
        what = repr(parent[place[-1]])
    return content, f"{'/'.join(map(str, place))}: {what}"


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails what takes longer."""

    def stop(*_):
        raise AssertionError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
