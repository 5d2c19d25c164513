"""`timm-convnextv2 embed`: one row of features per image."""

import time
from pathlib import Path

from ..console import count, say
from ..features.config import EmbedConfig
from ..features.embed import embed
from ..features.rows import paths_beside
from .base import run


def main(argv: list[str] | None = None) -> int:
    return run("embed", write, argv)


def write(config: EmbedConfig) -> int:
    start = time.perf_counter()
    try:
        rows, skipped = embed(
            config.model, config.images, config.output, config.extraction, max_bad_images=config.max_bad_images,
            resume=config.resume, overwrite=config.overwrite, progress=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        say(f"Stopped. The finished rows are in '{config.output}.parts': resume with --resume.", error=True)
        return 130
    for reason in skipped.values():
        say(f"skipped: {reason}", error=True)
    rate = rows / (time.perf_counter() - start)
    say(f"{config.output}: {count(rows, 'row')}; {count(len(skipped), 'image')} skipped; {rate:.1f} images/s")
    if beside := [str(path) for path in paths_beside(Path(config.output)) if path and path.exists()]:
        say(f"Their names, and what was skipped: {', '.join(beside)}")
    return 0
