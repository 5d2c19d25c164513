"""Inspects every file of a folder: its header, whether it decodes, and whether it duplicates another."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...console import count
from ..display import display_of
from ..formats.decode import faults_named, load_image, open_scene, read_header
from ..formats.errors import ImageError
from ..formats.files import Header, printable
from ..formats.pixels import PLAIN, Pixels
from ..formats.zarr import is_zarr
from ..samples.batches import load_batches
from ..sources.source import Source

_THUMBNAIL = 96
_CHUNK = 16


class Inspected(NamedTuple):
    """An inspected file."""

    name: str  # path, safe to print
    header: Header | None  # None if it cannot be read
    error: str  # reason why the file cannot be decoded, or ''
    flat: bool = False  # whether each channel has one value only
    digest: bytes | None = None  # hash of the bytes; None if they cannot be read
    near: str | None = None  # perceptual hash; None if not requested


class Finding(NamedTuple):
    """A problem with a file."""

    name: str  # path of the file
    kind: str  # 'unreadable', 'differs', 'flat', 'small', 'duplicate' or 'near duplicate'
    why: str  # reason, in words
    partner: str = ""  # path of the file that it is a duplicate of


def inspect_folder(
    source: Source, near: Callable[[np.ndarray], str] | None = None, workers: int = 0, window: int | None = None
) -> Iterator[Inspected]:
    """Inspects each file, in the order of the folder: reads and decodes all of it, or a window in its middle."""
    numbers = range(len(source))
    chunks = [numbers[i : i + _CHUNK] for i in numbers[::_CHUNK]]
    for files in load_batches(partial(_inspect, source, near, window), chunks, workers):
        yield from files


def _inspect(source: Source, near: Callable[[np.ndarray], str] | None, window: int | None, i: int) -> Inspected:
    path, name = source.path(i), source.name(i)
    header = digest = None
    try:
        digest = None if is_zarr(path) else digest_of(path)
        header = read_header(path, source.pixels.page)
        image = load_part(path, header.channels, source.pixels, window)
    except (ImageError, OSError) as error:
        return Inspected(name, header, str(error).removeprefix(f"{name}: "), digest=digest)
    flat = bool((image.amin((1, 2)) == image.amax((1, 2))).all())
    return Inspected(name, header, "", flat, digest, near(thumbnail(image)) if near and not flat else None)


def load_part(
    path: str | os.PathLike, in_chans: int, pixels: Pixels = PLAIN, window: int | None = None
) -> torch.Tensor:
    """An image as `load_image` gives it; with a window, only its middle of at most `window` pixels per side."""
    if window is None:
        return load_image(path, in_chans, pixels)
    with closing(open_scene(os.fspath(path), in_chans, pixels)) as scene, faults_named(printable(path)):
        sides = [min(window, n) for n in scene.size]
        top, left = ((n - side) // 2 for n, side in zip(scene.size, sides, strict=True))
        return scene.read(top, left, *sides)


def digest_of(path: str | os.PathLike) -> bytes:
    """Hash of the bytes of a file."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            state.update(part)
    return state.digest()


def perceptual_hash() -> Callable[[np.ndarray], str] | None:
    """The 64-bit perceptual hash of the package imagehash; None if it is not installed."""
    try:
        import imagehash  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        return None
    return lambda small: str(imagehash.phash(Image.fromarray((255 * small).astype(np.uint8))))


def thumbnail(image: torch.Tensor, bands: Sequence[int] | None = None) -> np.ndarray:
    """An image `[C, H, W]` as RGB `[h, w, 3]` in [0, 1], at most 96 pixels per side; `bands` it lacks are ignored."""
    step = max(1, -(-max(image.shape[1:]) // _THUMBNAIL))
    x = image[:, ::step, ::step]
    return display_of([x], bands if bands and max(bands) <= len(x) else None).rgb(x).numpy()


def findings(files: list[Inspected], img_size: int) -> list[Finding]:
    """All findings in the order of the files, perhaps several per file."""
    kinds: Counter[Any] = Counter((x.header.channels, x.header.kind) for x in files if x.header and not x.error)
    usual = kinds.most_common(1)[0][0] if kinds else None
    first: dict[Any, str] = {}  # name of the first file with these bytes, or with this perceptual hash
    return [finding for x in files for finding in _problems(x, usual, first, img_size)]


def some_of_each(found: Sequence[Finding], most: int) -> list[Finding]:
    """At most `most` findings, as many of each kind as there is room for, the rarest kind first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in found:
        kinds.setdefault(finding.kind, []).append(finding)
    chosen: list[Finding] = []
    rarest = sorted(kinds.values(), key=len)
    for i, of_kind in enumerate(rarest):
        chosen += of_kind[: (most - len(chosen)) // (len(rarest) - i)]
    return chosen


def _problems(x: Inspected, usual: Any, first: dict[Any, str], img_size: int) -> Iterator[Finding]:
    finding, header = partial(Finding, x.name), x.header
    if x.error:
        yield finding("unreadable", x.error)
        return
    assert header is not None  # it was decoded
    if (header.channels, header.kind) != usual:
        why = f"{count(header.channels, 'channel')} of {header.kind}, most files have {usual[0]} of {usual[1]}"
        yield finding("differs", why)
    if x.flat:
        yield finding("flat", "every pixel has the same value")
    if min(header.height, header.width) < img_size:
        yield finding("small", f"{header.height} x {header.width} pixels, crops are {img_size}")
    if x.digest in first:
        yield finding("duplicate", f"the same bytes as {first[x.digest]}", first[x.digest])
        return
    if x.near in first:
        yield finding("near duplicate", f"looks like {first[x.near]}", first[x.near])
    for key in filter(None, (x.digest, x.near)):
        first.setdefault(key, x.name)
