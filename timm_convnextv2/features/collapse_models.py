"""Feature collapse of several models on the same images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import check_limits
from ..console import count as plural
from ..console import say
from ..data import DataSet, ImageError, ImagePaths, TimmStream, check_readable, create_source
from ..data.display import display_of
from ..data.paths.find import check_places
from ..data.sources.source import Source
from ..files import claim_folder, write_csv
from ..report.images import FIGURE_OF
from .channels import BlockCollapse, blocks_of, channel_maps, collapse
from .config import CollapseConfig, Computation, DrawnImages
from .encoder import open_encoder
from .extract import COMPUTATION
from .figures import save_channels, save_distances

FILES = ("collapse.csv", "collapse.png", "channels.png")
COLUMNS = ["model", *BlockCollapse._fields]
SHOWN = 3  # images in the figure of channels
Maps = dict[str, tuple[str, Tensor]]


def measure_collapse(config: CollapseConfig) -> dict[str, list[BlockCollapse]]:
    """The results of `collapse` by model, which also go to the folder --output unless it is ''."""
    images = config.images
    check_places(ImagePaths.of(images.data_dir, images.data_list), images.dataset)
    marks = (",".join(COLUMNS[:3]), FIGURE_OF) if config.output is None else ()
    folder = claim_folder(config.folder, FILES, overwrite=config.overwrite, marks=marks) if config.folder else None
    found, shown, maps = collapse_of_models(
        list(dict.fromkeys(config.models)), config.images, config.computation, layer=config.layer,
        batch_size=config.batch_size, progress=True,
    )  # fmt: skip
    if folder is not None:
        rows = ([name, *block] for name, blocks in found.items() for block in blocks)
        write_csv(folder / FILES[0], COLUMNS, rows)
        save_distances(found, folder / FILES[1])
        save_channels(shown, maps, folder / FILES[2])
    return found


def collapse_of_models(
    models: Sequence[str], images: DrawnImages, computation: Computation = COMPUTATION, *, layer: str | None = None,
    batch_size: int = 8, progress: bool = False,
) -> tuple[dict[str, list[BlockCollapse]], list[Tensor], Maps]:  # fmt: skip
    """Measures several models on the same images; images that cannot be decoded are replaced by others.

    Returns the results of `collapse`; images `[h, w, 3]` for the figure; and `channel_maps` of `layer`.
    """
    check_limits(images)
    note = partial(say, error=True) if progress else lambda line: None
    how = computation.img_size, computation.nodata, computation.device
    encoders = {name: open_encoder(name, *how) for name in models}
    for name, encoder in encoders.items():
        blocks = blocks_of(encoder.model)
        if layer is not None and layer not in blocks:
            raise ValueError(f"'{name}' has no block '{layer}' (--layer); there are: {', '.join(blocks)}.")
    found: dict[str, list[BlockCollapse]] = {}
    shown: list[Tensor] = []
    maps: Maps = {}
    folder, names = ((value,) if value else None for value in (images.data_dir, images.data_list))
    paths = ImagePaths(data_dir=folder, data_list=names)
    for name, encoder in encoders.items():
        source = create_source(paths, DataSet(images.dataset, images.split), encoder.in_chans, encoder.pixels)
        if isinstance(source, TimmStream):
            raise ValueError(f"--dataset {images.dataset} is a stream, and images cannot be drawn. Give a folder.")
        once = note if not found else lambda line: None
        drawn = draw_images(source, images.num_images, encoder.transform, images.seed, once)
        note(f"{name}: {plural(len(drawn), 'image')} of {drawn.shape[2]} x {drawn.shape[3]}")
        found[name] = collapse(encoder.model, drawn, batch_size=batch_size, amp=computation.amp)
        if not shown:
            shown = list(display_of([*drawn[:SHOWN]]).rgb(drawn[:SHOWN]))
        maps[name] = channel_maps(encoder.model, drawn[:SHOWN], layer)
    return found, shown, maps


def draw_images(source: Source, count: int, transform: Callable, seed: int, note: Callable[[str], Any]) -> Tensor:
    """Draws `[count, C, H, W]` by `seed`, or all images if there are fewer."""
    check_readable(source)  # one message if all files are corrupt
    images, bad = [], []
    for i in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == count:
            break
        try:
            images.append(transform(source[i]))
        except (ImageError, OSError) as e:
            bad.append(str(e))
    if left := str(source.left):
        note(left)
    if bad:
        note(f"left out {plural(len(bad), 'image')} that cannot be decoded, for example: {bad[0]}")
    if len(images) < count:
        note(f"Found {plural(len(images), 'image')}, fewer than the {count} requested.")
    return torch.stack(images)
