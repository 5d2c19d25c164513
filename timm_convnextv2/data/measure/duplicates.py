"""Images that two parts of a split share, byte for byte."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..formats.files import printable
from ..paths.find import file_size
from ..sources.source import Source
from ..sources.windows import WindowSource
from .inspection import digest_of

_MOST = 200_000  # files of a part that are compared
_THREADS = 16  # file systems may be remote
_NAMED = 3


def files_of(source: Source) -> list[str]:
    """The files of a source, each once, evenly spaced ones if they are very many; [] for a source without files."""
    if isinstance(source, WindowSource):
        source, numbers = source.source, source.files
    else:
        numbers = range(len(source)) if source.has_files else ()
    return [*dict.fromkeys(source.path(i) for i in _some(numbers))]


def _some(many: Sequence) -> Sequence:
    return many[:: -(-len(many) // _MOST) or 1]


def shared_images(train: Sequence[str], other: Sequence[str]) -> dict[str, str]:
    """The files of `other` that have the bytes of a file of `train`, which stands beside each."""
    train, other = _some(train), _some(other)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = [[*pool.map(file_size, paths)] for paths in (train, other)]
        common = {*sizes[0]} & {*sizes[1]} - {-1}  # few files are read
        first, second = (
            [path for path, size in zip(paths, found, strict=True) if size in common and os.path.isfile(path)]
            for paths, found in zip((train, other), sizes, strict=True)
        )
        by_digest = dict(zip(pool.map(_digest, reversed(first)), reversed(first), strict=True))
        digests = pool.map(_digest, second)
        return {path: by_digest[key] for path, key in zip(second, digests, strict=True) if key and key in by_digest}


def _digest(path: str) -> bytes | None:
    try:
        return digest_of(path)
    except OSError:  # told where it is read as an image
        return None


def shared_note(train: Sequence[str], other: Sequence[str], name: str) -> str:
    """A sentence about the files of `other` (such as 'held-out') that are in `train` as well; '' if there are none."""
    found = shared_images(train, other)
    if not found:
        return ""
    pairs = ", ".join(f"{printable(a)} = {printable(b)}" for a, b in [*found.items()][:_NAMED])
    images = f"{name} image has" if len(found) == 1 else f"{name} images have"
    compared = f"{len(_some(other))} compared with {len(_some(train))}"
    return (
        f"{len(found)} {images} the same bytes as a training image ({compared}): {pairs}"
        f"{', ...' * (len(found) > _NAMED)}. "
        "Results on them say nothing about new images: remove the copies."
    )
