"""`timm-convnextv2 collapse`: how similar the channels of models are, block by block."""

from pathlib import Path

from ..console import say
from ..features.collapse_models import FILES, measure_collapse
from ..features.config import CollapseConfig
from .base import run


def main(argv: list[str] | None = None) -> int:
    return run("collapse", measure, argv)


def measure(config: CollapseConfig) -> None:
    for name, blocks in measure_collapse(config).items():
        lowest = min(blocks, key=lambda block: block.distance)
        mean, dead = (sum(getattr(block, key) for block in blocks) / len(blocks) for key in ("distance", "dead"))
        say(
            f"{name}: mean cosine distance {mean:.3f}, lowest {lowest.distance:.3f} in {lowest.block}; "
            f"{100 * dead:.2g} % of channels dead"
        )
    if config.folder:
        say(f"Written: {', '.join(str(Path(config.folder) / name) for name in FILES)}")
