"""Compare how alike the channels of models are: the analysis of feature collapse of ConvNeXt V2, figures 3 and 4.

    timm-convnextv2 collapse runs/mine convnextv2_tiny.fcmae convnext_tiny.fb_in1k --data-dir IMAGES --output collapse

Written to `--output`:

    collapse.csv  model, block, depth, distance, dead: a row for each block, see `evaluate.BlockCollapse`
    collapse.png  distance over depth, a line for each model (the paper's figure 4)
    channels.png  64 channels of a block as small squares, for a few images (its figure 3)
"""

import csv
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import model_pixels
from ..console import PROGRAM, CommandParser, refused, say
from ..data import DataSet, ImageError, ImagePaths, TimmStream, check_readable, create_source
from ..data.samples.batches import preprocessing
from ..features.collapse import BlockCollapse, blocks_of, channel_maps, collapse
from ..features.evaluate import check_devices
from ..features.figures import save_channels, save_distances
from ..features.network import load_network, name_of_model
from ..files import claim_folder, whole_file
from ..report.images import displayable
from .evaluate import add_image_options

FILES = ("collapse.csv", "collapse.png", "channels.png")
SHOWN = 3  # images in the figure of channels


# fmt: off
def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog=f"{PROGRAM} collapse",
        description="Compare how alike the channels of ConvNeXt V1 and V2 are, block by block.",
    )
    add_image_options(parser)
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="folder with images anywhere below it, or the root of --dataset")
    add("--data-list", metavar="FILE", help="images that a .txt, .csv or .parquet names, relative to it or --data-dir")
    add("--dataset", default="", metavar="NAME", help="hfds/NAME, torch/NAME, or embedded; a folder if left out")
    add("--split", default="train", metavar="NAME", help="split of --dataset")
    add("--num-images", type=int, default=64, metavar="N", help="images to average over (default: 64)")
    add("--layer", metavar="NAME",
        help="block of the figure of channels (default: the last one of the last stage but one)")
    add("--output", default="collapse", metavar="DIR", help="folder to write to (default: collapse)")
    add("-b", "--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    return parser
# fmt: on


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one message and exit status 2."""
    try:
        options = vars(build_parser().parse_args(argv))
        folder = claim_folder(options.pop("output"), FILES, overwrite=options.pop("overwrite"))
        names = list(dict.fromkeys(options.pop("models")))
        found, shown, maps = collapse_of_models(names, **options, progress=True)
        with whole_file(folder / FILES[0]) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["model", *BlockCollapse._fields])
            writer.writerows([name, *block] for name, blocks in found.items() for block in blocks)
        save_distances(found, folder / FILES[1])
        save_channels(shown, maps, folder / FILES[2])
    except (ValueError, RuntimeError, OSError) as e:
        return refused("collapse", e)
    except KeyboardInterrupt:
        say("Stopped.", error=True)
        return 130
    for name, blocks in found.items():
        lowest = min(blocks, key=lambda block: block.distance)
        mean, dead = (sum(getattr(block, key) for block in blocks) / len(blocks) for key in ("distance", "dead"))
        say(
            f"{name}: mean cosine distance {mean:.3f}, lowest {lowest.distance:.3f} in {lowest.block}; "
            f"{100 * dead:.2g} % of channels dead"
        )
    say(f"Written: {', '.join(str(folder / name) for name in FILES)}")
    return 0


Maps = dict[str, tuple[str, Tensor]]


def collapse_of_models(
    models: Sequence[str],
    data_dir: str | os.PathLike | None,
    *,
    data_list: str | os.PathLike | None = None,
    dataset: str = "",
    split: str = "train",
    num_images: int = 64,
    layer: str | None = None,
    img_size: int | None = None,
    nodata: float | None = None,
    device: str = "cpu",
    amp: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[dict[str, list[BlockCollapse]], list[Tensor], Maps]:
    """Collapse of several models on the same images.

    Args:
        models: Of timm, `local-dir:FOLDER`, `hf-hub:USER/NAME`, or the folder of a run.
        data_dir: See `timm_convnextv2.data.create_source`.
        data_list: Likewise.
        dataset: Likewise; streams are not taken.
        split: Likewise.
        num_images: How many images, drawn by `seed`; those that cannot be decoded are replaced by others.
        layer: Block whose channels are shown, see `channel_maps`.
        img_size: Side of the square crops in pixels; each model's own if None.
        nodata: See `timm_convnextv2.data.load_image`; that of each model's own images if None.
        device: Where the models run.
        amp: Compute in bfloat16.
        seed: Of the choice of images.
        batch_size: Images at a time.
        progress: Tell on stderr what is done.

    Returns:
        By model what `collapse` gives; the images of the figure of channels, `[h, w, 3]`; by model the block and the
        channels of these.

    Raises:
        ValueError: A model without such blocks, or a model, the images, the device or a number cannot be used.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images and batch_size are at least 1, got {num_images} and {batch_size}.")
    tell = partial(say, error=True) if progress else lambda line: None
    check_devices([device])
    networks = {name: load_network(name_of_model(name), img_size, device) for name in models}
    for name, (network, _) in networks.items():
        blocks = blocks_of(network)
        if layer is not None and layer not in blocks:
            raise ValueError(f"'{name}' has no block '{layer}' (--layer); there are: {', '.join(blocks)}.")
    found: dict[str, list[BlockCollapse]] = {}
    shown: list[Tensor] = []
    maps: Maps = {}
    for name, (network, config) in networks.items():
        in_chans = config["input_size"][0]
        scale = model_pixels(name_of_model(name), in_chans, nodata)
        source = create_source(ImagePaths.of(data_dir, data_list), DataSet(dataset, split), in_chans, scale)
        if isinstance(source, TimmStream):
            raise ValueError(f"--dataset {dataset} is a stream, from which images cannot be drawn. Give a folder.")
        images = _draw(source, num_images, preprocessing(config), seed, tell if not found else lambda line: None)
        tell(f"{name}: {len(images)} images of {images.shape[2]} x {images.shape[3]}")
        found[name] = collapse(network, images, batch_size=batch_size, amp=amp)
        if not shown:
            shown = list(displayable(images[:SHOWN], torch.tensor(config["mean"]), torch.tensor(config["std"])))
        maps[name] = channel_maps(network, images[:SHOWN], layer)
    return found, shown, maps


def _draw(source: Any, count: int, transform: Callable, seed: int, tell: Callable[[str], Any]) -> Tensor:
    """Images of a source, the same for every model: `[count, C, H, W]`, or all where there are fewer."""
    check_readable(source)  # a folder of nothing but damaged files is one message
    images, bad = [], []
    for i in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == count:
            break
        try:
            images.append(transform(source[i]))
        except (ImageError, OSError) as e:
            bad.append(str(e))
    if note := str(source.left):
        tell(note)
    if bad:
        tell(f"{len(bad)} images that cannot be decoded are left out, for example: {bad[0]}")
    if len(images) < count:
        tell(f"There are {len(images)} images, fewer than the {count} asked for.")
    return torch.stack(images)
