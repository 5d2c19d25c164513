"""Opens the source that options name."""

import os
from collections.abc import Callable, Sequence

import torch

from ...console import say
from ..config import DataSet, Dirs, ImagePaths, PixelOptions, WindowOptions
from ..formats.errors import ImageError, listed
from ..formats.files import printable
from ..formats.pixels import PLAIN, Pixels, one_page
from ..formats.values import noting_stored
from ..paths.listing import Listing, list_files, origins_of
from .files import FolderSource, ImageFiles, PageSource
from .groups import sampling_groups
from .picked import JoinedSource
from .source import Bad, Source
from .stream import StreamOrder, TimmStream
from .timm import MAPS, STREAMS, TimmSource, prefix_of, unknown_dataset
from .windows import WindowSource, check_windows


def create_source(
    paths: ImagePaths | Dirs = None,
    data_set: DataSet | None = None,
    in_chans: int = 3,
    pixels: Pixels = PLAIN,
    *,
    order: StreamOrder | None = None,
    source_weights: Sequence[float] | None = None,
    listing: Listing | None = None,
) -> Source | TimmStream:
    """Opens the images that options name.

    - No `dataset`: folders, `.tar` files and patterns such as `scans/2024-*/**/*.png` in `data_dir`, joined if there
      are several; with `data_list`, the images that the lists name.
    - 'demo': the demo data set; any split other than 'train' gives other images.
    - `torch/...`, `hfds/...`: `TimmSource`. `wds/...`, `hfids/...`, `tfds/...`: `TimmStream`.

    Args:
        paths: Where the files are, or the root of the data set; a path alone is a `data_dir`.
        source_weights: Share of an epoch for each of the folders or lists, in any unit.
        listing: The files of `paths`, if they are listed already.
    """
    paths = paths if isinstance(paths, ImagePaths) else ImagePaths.of(paths)
    data_set, pixels = data_set or DataSet(), pixels.check(in_chans)
    name, prefix = data_set.dataset, prefix_of(data_set.dataset)
    if not name:
        return _open_files(paths, in_chans, pixels, source_weights, listing)
    root = _root_of(paths, name, source_weights)
    if name == "demo":
        from ..demo import DemoSource

        length, seed = data_set.num_images or 2048, int(data_set.split != "train")
        return DemoSource(length, 128, in_chans, seed, pixels=pixels)
    if prefix in STREAMS:
        return TimmStream(data_set, root, in_chans, pixels, order)
    if prefix in MAPS:
        return TimmSource(data_set, root, in_chans, pixels)
    raise unknown_dataset(name)


def open_images(
    images: str | os.PathLike | Sequence[str | os.PathLike], in_chans: int = 3, pixels: Pixels = PLAIN
) -> Source:
    """Image files in the given order; or all images of folders, `.tar` files and patterns, see `create_source`."""
    places = [os.fspath(one) for one in ([images] if isinstance(images, str | os.PathLike) else images)]
    if not places:
        raise ValueError("No images given. Give files, folders, .tar files or patterns such as 'scans/**/*.png'.")
    if all(os.path.isfile(place) and not place.endswith(".tar") for place in places):
        return ImageFiles(places, in_chans, pixels.check(in_chans))
    return _open_files(ImagePaths.of(places), in_chans, pixels.check(in_chans), None, None)


def _root_of(paths: ImagePaths, dataset: str, source_weights: Sequence[float] | None) -> str | None:
    """The root of a data set; refuses several, and options of image files."""
    if paths.data_list is not None or source_weights is not None:
        option = "--source-weights" if paths.data_list is None else "--data-list"
        raise ValueError(f"{option} is for image files: leave it out with --dataset {dataset}.")
    roots = paths.data_dir or ()
    if len(roots) > 1:
        raise ValueError(f"--dataset {dataset} has one --data-dir, got {' '.join(map(str, roots))}.")
    return roots[0] if roots else None


def _open_files(
    paths: ImagePaths, in_chans: int, pixels: Pixels, source_weights: Sequence[float] | None, listing: Listing | None
) -> Source:
    """Opens the image files of each folder, tar file or list, joined if there are several."""
    listing = listing or list_files(origins_of(paths.data_dir, paths.data_list))
    parts: list[Source] = [
        TimmSource(DataSet(), origin.root, in_chans, pixels)
        if origin.kind == "tar"
        else FolderSource(origin.root, in_chans, pixels, names, grows=origin.kind != "list")
        for origin, names in zip(listing.origins, listing.names, strict=True)
    ]
    source = parts[0] if len(parts) == 1 else JoinedSource(parts)
    source.left.merge(listing.left)  # pyright: ignore[reportAttributeAccessIssue]  # of files it is a LeftOut
    if listing.weights is not None and len(listing.weights) != len(source):
        raise ValueError("A list with weights cannot be joined with a tar file.")
    names = [printable(origin.given) for origin in listing.origins]
    source.groups = sampling_groups([len(part) for part in parts], source_weights, listing.weights, names)
    return source


def pages_and_windows(
    source: Source | TimmStream, pixels: PixelOptions, windows: WindowOptions, tick: Callable[[int], None] | None = None
) -> Source | TimmStream:
    """The requested pages and windows of a source's images, or the source itself; `tick(1)` follows each header."""
    check_windows(windows)
    pages, windowed = bool(pixels.pages) and one_page(pixels.pages) is None, windows.window_size is not None
    if not pages and not windowed:
        return source
    if isinstance(source, TimmStream):
        raise ValueError("--pages and --window-size need image files; a stream has none. Leave them out.")
    if source.groups is not None:
        raise ValueError(
            "Weights of sources and lists apply to whole images: leave them out with --window-size, which draws by "
            "area, and with several --pages."
        )
    if pages:
        numbers = [page for page in pixels.pages or () if isinstance(page, int)]
        source = PageSource(source, numbers or None, tick)
    return WindowSource(source, windows, tick) if windowed else source


def check_readable(source: Source, tries: int = 32, visit: Callable[[torch.Tensor], None] | None = None) -> Bad:
    """Decodes up to `tries` images spread over a source, calls `visit` with each, and returns those that fail.

    If none can be decoded, a ValueError names up to three.
    """
    count = max(1, min(tries, len(source)))
    bad: Bad = []
    kinds: dict[str, str] = {}
    clear: dict[str, float] = {}
    for i in (k * len(source) // count for k in range(count)):
        try:
            with noting_stored(measure=False) as stored:
                image = source[i]
        except (ImageError, OSError) as error:
            bad.append((i, source.reason(i, error)))
            continue
        if stored.kind:
            kinds.setdefault(stored.kind, source.name(i))
        if stored.clear:
            clear[source.name(i)] = stored.clear
        if visit is not None:
            visit(image)
    if len(kinds) > 1 and source.pixels.divide is None:
        shown = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
        say(
            f"The images store values in {len(kinds)} ways: {shown}. Integers are divided by the largest value of "
            "their type or bits. If all are on one scale, pretrain with --divide.",
            error=True,
        )
    if clear:
        name = max(clear, key=lambda name: clear[name])
        say(
            f"{len(clear)} of {count} images tried have pixels with alpha 0, up to {clear[name]:.0%} ({name}). Alpha "
            "is dropped, so that their stored colours count as data.",
            error=True,
        )
    if len(bad) == count:
        reasons = listed([message for _, message in bad], 3)
        raise ValueError(f"None of {count} images tried (of {len(source)}) can be read, for example:\n{reasons}")
    return bad
