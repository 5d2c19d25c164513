"""Write one row of features per image."""

import sys
import time

from ..config import add_options, build, words_given
from ..console import PROGRAM, CommandParser, refused, say
from ..features.config import EmbedConfig
from ..features.embed import embed


def build_parser() -> CommandParser:
    parser = CommandParser(prog=f"{PROGRAM} embed", description=__doc__)
    add_options(parser, EmbedConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a user error is one message and exit status 2."""
    output, start = "OUTPUT", time.perf_counter()
    try:
        config = build(EmbedConfig, words_given(build_parser(), sys.argv[1:] if argv is None else argv))
        output = config.output
        rows, skipped = embed(
            config.model, config.images, output, config.extraction, max_bad_images=config.max_bad_images,
            resume=config.resume, overwrite=config.overwrite, progress=True,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError) as e:
        return refused("embed", e)
    except KeyboardInterrupt:
        say(f"Stopped. The finished rows are in '{output}.parts': resume with --resume.", error=True)
        return 130
    for reason in skipped.values():
        say(f"skipped: {reason}", error=True)
    rate = rows / (time.perf_counter() - start)
    say(f"{output}: {rows} rows; {len(skipped)} images skipped; {rate:.1f} images/s")
    return 0
