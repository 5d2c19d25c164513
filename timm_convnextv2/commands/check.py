"""Look at every file of a folder before pretraining: what is there, and what is unreadable, odd, flat or double.

    timm-convnextv2 check IMAGES --img-size 224

Writes FILE.json, a list of what was found, and FILE.png, small images of it; FILE is check.json by default. The exit
status is 0 where nothing was found, 1 where something was, 2 for a mistake in the options. Every file is read and
decoded, as pretraining would. Near duplicates, those of one perceptual hash, need `pip install imagehash`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..console import PROGRAM, CommandParser, refused, say
from ..data import ImageError, ImagePaths, Pixels, create_source
from ..data.formats.pixels import one_page
from ..data.measure.inspection import Finding, Look, findings, inspect_folder, load_part, perceptual_hash, thumbnail
from ..files import whole_file
from ..report.images import save_contact_sheet
from ..runs.progress import ImageProgress
from .images import add_place_options, one_place, page_word
from .stats import check_output, listed

_SHOWN = 48
_LINES = 10


# fmt: off
def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog=f"{PROGRAM} check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="*", metavar="DATA", help="the same as --data-dir")
    add_place_options(add)
    add("--nodata", type=float, metavar="V", help="stored value of pixels without data")
    add("--img-size", type=int, default=224, metavar="N", help="side of the crops; smaller images are listed")
    add("--window-size", type=int, metavar="S", help="decode a window of S x S alone; smaller images are listed")
    add("--pages", type=page_word, nargs="+", metavar="P", help="as of pretraining; of several pages the first is read")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that read and decode (default: 4)")
    add("--output", default="check.json", metavar="FILE", help="JSON to write; the images have its name and .png")
    add("--overwrite", action="store_true", help="replace --output and its images")
    return parser
# fmt: on


def check(args: argparse.Namespace) -> tuple[dict[str, Any], list[Finding]]:
    """Looks at the files and writes what was found.

    Raises:
        ValueError: A mistake in the options, or no image below the folder.
        OSError: The output cannot be written.
    """
    data_dir = one_place(args.data, args.data_dir)
    if not data_dir and not args.data_list:
        raise ValueError("No images named. Give a folder: check DATA.")
    if args.window_size is not None and args.window_size < 1:
        raise ValueError(f"--window-size is a side in pixels, got {args.window_size}.")
    if args.workers < 0 or args.img_size < 1:
        raise ValueError(f"--workers is at least 0 and --img-size 1, got {args.workers} and {args.img_size}.")
    output = Path(args.output)
    check_output(output, data_dir, args.overwrite)
    args.dataset = ""
    listing = listed(args, data_dir) if args.index else None
    page = one_page(args.pages)
    pixels = Pixels(args.nodata, page=0 if args.pages and page is None else page)
    source = create_source(ImagePaths.of(data_dir, args.data_list), pixels=pixels, listing=listing)
    if not source.has_files:
        raise ValueError("check looks at files, and a tar file is one: unpack it, and give the folder.")
    near = perceptual_hash()
    if near is None:
        say("Near duplicates are not looked for: `pip install imagehash` for them.")
    bar, looks = ImageProgress(len(source)), []
    try:
        for look in inspect_folder(source, near, args.workers, args.window_size):
            looks.append(look)
            bar.update(1)
    finally:
        bar.close()
    found = findings(looks, args.window_size or args.img_size)
    content = summary(source, looks, found)
    with whole_file(output) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    headers = {look.name: look.header.channels for look in looks if look.header}
    if found:
        sheet = [
            (shown(f, headers.get(f.name), pixels, args.window_size), label(f, getattr(source, "root", "")))
            for f in found[:_SHOWN]
        ]
        save_contact_sheet(sheet, output.with_suffix(".png"), f"{len(sheet)} of {len(found)} findings")
    return content, found


def shown(finding: Finding, channels: int | None, pixels: Pixels, window: int | None) -> np.ndarray | None:
    """The image of a finding, None where it cannot be decoded."""
    try:
        return None if channels is None else thumbnail(load_part(finding.name, channels, pixels, window))
    except (ImageError, OSError):
        return None


def label(finding: Finding, root: str) -> str:
    """Its kind and the end of its path, in two short lines."""
    name = finding.name.removeprefix(f"{root}/")
    return f"{finding.kind}\n{name if len(name) <= 24 else '...' + name[-21:]}"


def summary(source: Any, looks: list[Look], found: list[Finding]) -> dict[str, Any]:
    """What is there and what was found, for the JSON file."""
    headers = [look.header for look in looks if look.header]

    def counted(values: Any) -> dict[str, int]:
        return {str(key): count for key, count in Counter(values).most_common()}

    heights, widths = ([getattr(h, side) for h in headers] or [0] for side in ("height", "width"))
    return {
        "files": len(looks),
        "ignored": source.left.ignored,
        "not_opened": source.left.num_special,
        "formats": counted(h.format for h in headers),
        "channels": counted(h.channels for h in headers),
        "types": counted(h.kind for h in headers),
        "height": [min(heights), float(np.median(heights)), max(heights)],
        "width": [min(widths), float(np.median(widths)), max(widths)],
        "found": counted(f.kind for f in found),
        "findings": [{"file": f.name, "kind": f.kind, "why": f.why} for f in found],
    }


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 1 where something was found, 2 for a mistake, told in one message."""
    try:
        args = build_parser().parse_args(argv)
        content, found = check(args)
    except (ValueError, RuntimeError, OSError) as e:
        return refused("check", e)
    except KeyboardInterrupt:
        say("Stopped; nothing was written.", error=True)
        return 130

    def listed(key: str) -> str:
        return ", ".join(f"{count} {name}" for name, count in content[key].items()) or "none"

    say(f"{content['files']} files: {listed('formats')}; types: {listed('types')}")
    say(f"channels: {', '.join(f'{n} files with {c}' for c, n in content['channels'].items()) or 'none'}")
    (h0, h1, h2), (w0, w1, w2) = content["height"], content["width"]
    say(f"height {h0} to {h2}, median {h1:g}; width {w0} to {w2}, median {w1:g}")
    for finding in found[:_LINES]:
        say(f"{finding.kind}: {finding.name}: {finding.why}")
    if len(found) > _LINES:
        say(f"and {len(found) - _LINES} more, see {args.output}")
    say(
        f"Found: {listed('found')}. Written: {args.output}"
        + (f", {Path(args.output).with_suffix('.png')}" * bool(found))
    )
    return int(bool(found))
