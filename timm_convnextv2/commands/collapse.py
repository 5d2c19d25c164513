"""Compare how similar the channels of ConvNeXt V1 and V2 are, block by block: feature collapse, figures 3 and 4.

    timm-convnextv2 collapse runs/mine convnextv2_tiny.fcmae convnext_tiny.fb_in1k --data-dir IMAGES --output collapse

Writes to --output:

    collapse.csv  model, block, depth, distance, dead: one row per block
    collapse.png  distance over depth, one line per model (the paper's figure 4)
    channels.png  64 channels of a block as small squares, for a few images (its figure 3)
"""

from pathlib import Path

from ..console import say
from ..features.collapse_models import FILES, measure_collapse
from ..features.config import CollapseConfig
from .base import run


def main(argv: list[str] | None = None) -> int:
    return run("collapse", __doc__, CollapseConfig, measure, argv)


def measure(config: CollapseConfig) -> None:
    for name, blocks in measure_collapse(config).items():
        lowest = min(blocks, key=lambda block: block.distance)
        mean, dead = (sum(getattr(block, key) for block in blocks) / len(blocks) for key in ("distance", "dead"))
        say(
            f"{name}: mean cosine distance {mean:.3f}, lowest {lowest.distance:.3f} in {lowest.block}; "
            f"{100 * dead:.2g} % of channels dead"
        )
    if config.output:
        say(f"Written: {', '.join(str(Path(config.output) / name) for name in FILES)}")
