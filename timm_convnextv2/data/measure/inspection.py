"""Inspects every file of a folder: its header, whether it decodes, and whether it duplicates another."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..formats.decode import faults_named, load_image, open_scene, read_header
from ..formats.errors import ImageError
from ..formats.files import Header, printable
from ..formats.pixels import PLAIN, Pixels
from ..formats.zarr import is_zarr

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


class _Files(Dataset):
    def __init__(self, source: Any, near: Callable[[np.ndarray], str] | None, window: int | None = None) -> None:
        self.source, self.near, self.window = source, near, window

    def __getitem__(self, i: int) -> Inspected:
        source = self.source
        path, name = source.path(i), source.name(i)
        try:
            digest = None if is_zarr(path) else _digest(path)
        except OSError as error:
            return Inspected(name, None, str(error))
        try:
            header = read_header(path, source.pixels.page)
        except (ImageError, OSError) as error:
            return Inspected(name, None, str(error), digest=digest)
        try:
            image = load_part(path, header.channels, source.pixels, self.window)
        except (ImageError, OSError) as error:
            return Inspected(name, header, str(error).removeprefix(f"{name}: "), digest=digest)
        flat = bool((image.amin((1, 2)) == image.amax((1, 2))).all())
        near = self.near(thumbnail(image)) if self.near and not flat else None
        return Inspected(name, header, "", flat, digest, near)


def load_part(
    path: str | os.PathLike, in_chans: int, pixels: Pixels = PLAIN, window: int | None = None
) -> torch.Tensor:
    """An image as `load_image` gives it; with a window, only its middle of at most `window` pixels per side."""
    if window is None:
        return load_image(path, in_chans, pixels)
    scene = open_scene(os.fspath(path), in_chans, pixels)
    try:
        sides = [min(window, n) for n in scene.size]
        top, left = ((n - side) // 2 for n, side in zip(scene.size, sides, strict=True))
        with faults_named(printable(path)):
            return scene.read(top, left, *sides)
    finally:
        scene.close()


def _digest(path: str) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            state.update(part)
    return state.digest()


def inspect_folder(
    source: Any, near: Callable[[np.ndarray], str] | None = None, workers: int = 0, window: int | None = None
) -> Iterator[Inspected]:
    """Inspects each file, in the order of the folder: reads and decodes all of it, or a window in its middle."""
    n = len(source)
    chunks = [list(range(i, min(i + _CHUNK, n))) for i in range(0, n, _CHUNK)]
    loader = DataLoader(
        _Files(source, near, window),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    for files in loader:
        yield from files


def perceptual_hash() -> Callable[[np.ndarray], str] | None:
    """The 64-bit perceptual hash of the package imagehash; None if it is not installed."""
    try:
        import imagehash  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        return None
    return lambda small: str(imagehash.phash(Image.fromarray((255 * small).astype(np.uint8))))


def thumbnail(image: torch.Tensor) -> np.ndarray:
    """An image `[C, H, W]` as RGB `[h, w, 3]` in [0, 1], at most 96 pixels per side; floats are stretched."""
    step = max(1, -(-max(image.shape[1:]) // _THUMBNAIL))
    x = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1))[:, ::step, ::step]
    if x.dtype == torch.uint8:
        return (x.float() / 255).permute(1, 2, 0).numpy()
    low, high = x.min(), x.max()
    return ((x - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy()


def findings(files: list[Inspected], img_size: int) -> list[Finding]:
    """All findings in the order of the files, perhaps several per file."""
    kinds: Counter[Any] = Counter((x.header.channels, x.header.kind) for x in files if x.header and not x.error)
    usual = kinds.most_common(1)[0][0] if kinds else None
    first: dict[bytes, str] = {}
    hashes: defaultdict[str, list[str]] = defaultdict(list)
    found = []
    for x in files:
        if x.error:
            found.append(Finding(x.name, "unreadable", x.error))
            continue
        header: Any = x.header
        if (header.channels, header.kind) != usual and usual is not None:
            of = f"{header.channels} channels of {header.kind}, most files have {usual[0]} of {usual[1]}"
            found.append(Finding(x.name, "differs", of))
        if x.flat:
            found.append(Finding(x.name, "flat", "every pixel has the same value"))
        if min(header.height, header.width) < img_size:
            found.append(Finding(x.name, "small", f"{header.height} x {header.width} pixels, crops are {img_size}"))
        if x.digest in first:
            found.append(Finding(x.name, "duplicate", f"the same bytes as {first[x.digest]}"))
            continue
        if x.digest is not None:
            first[x.digest] = x.name
        if x.near is not None:
            if hashes[x.near]:
                found.append(Finding(x.name, "near duplicate", f"looks like {hashes[x.near][0]}"))
            hashes[x.near].append(x.name)
    return found
