"""Compare how similar the channels of ConvNeXt V1 and V2 are, block by block: feature collapse, figures 3 and 4.

    timm-convnextv2 collapse runs/mine convnextv2_tiny.fcmae convnext_tiny.fb_in1k --data-dir IMAGES --output collapse

Writes to --output:

    collapse.csv  model, block, depth, distance, dead: one row per block
    collapse.png  distance over depth, one line per model (the paper's figure 4)
    channels.png  64 channels of a block as small squares, for a few images (its figure 3)
"""

from ..console import say
from ..features.collapse import BlockCollapse
from ..features.collapse_models import collapse_of_models
from ..features.config import CollapseConfig
from ..features.figures import save_channels, save_distances
from ..files import claim_folder, write_csv
from .base import run

FILES = ("collapse.csv", "collapse.png", "channels.png")


def main(argv: list[str] | None = None) -> int:
    return run("collapse", __doc__, CollapseConfig, measure, argv)


def measure(config: CollapseConfig) -> None:
    folder = claim_folder(config.output, FILES, overwrite=config.overwrite)
    found, shown, maps = collapse_of_models(
        list(dict.fromkeys(config.models)), config.images, config.computation, layer=config.layer,
        batch_size=config.batch_size, progress=True,
    )  # fmt: skip
    rows = ([name, *block] for name, blocks in found.items() for block in blocks)
    write_csv(folder / FILES[0], ["model", *BlockCollapse._fields], rows)
    save_distances(found, folder / FILES[1])
    save_channels(shown, maps, folder / FILES[2])
    for name, blocks in found.items():
        lowest = min(blocks, key=lambda block: block.distance)
        mean, dead = (sum(getattr(block, key) for block in blocks) / len(blocks) for key in ("distance", "dead"))
        say(
            f"{name}: mean cosine distance {mean:.3f}, lowest {lowest.distance:.3f} in {lowest.block}; "
            f"{100 * dead:.2g} % of channels dead"
        )
    say(f"Written: {', '.join(str(folder / name) for name in FILES)}")
