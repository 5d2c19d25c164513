"""`timm-convnextv2 check`: inspects every file of a folder before pretraining."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import count, say
from ..data import ImageError, Pixels, Source, create_source
from ..data.display import check_bands
from ..data.formats.pixels import one_page
from ..data.measure.inspection import (
    Finding,
    Inspected,
    findings,
    inspect_folder,
    load_part,
    perceptual_hash,
    some_of_each,
    thumbnail,
)
from ..data.paths.find import check_places, find_files
from ..files import write_json
from ..report.images import save_contact_sheet
from ..runs.group import Processes
from ..runs.progress import ImageProgress
from .base import run
from .options import CheckConfig
from .stats import check_output, made_by

_SHOWN = 48
_LINES = 10


def check(config: CheckConfig) -> int:
    """Inspects the files, writes and prints the findings; 1 if there are any."""
    paths = config.paths
    if not paths.data_dir and not paths.data_list:
        raise ValueError("No images given. Name a folder: check IMAGES.")
    check_bands(config.show_bands, max(config.show_bands or (3,)))
    check_places(paths)
    output = check_output("check", config.output, paths.data_dir, config.overwrite)
    figure = output.with_suffix(".png")
    page = one_page(config.pages)
    pixels = Pixels(config.nodata, page=0 if config.pages and page is None else page)
    source = create_source(paths, pixels=pixels, listing=find_files(paths, "", 1.0, Processes()))
    if not isinstance(source, Source) or not source.has_files:
        raise ValueError("check inspects single files, not tar files: unpack it, and name the folder.")
    near = perceptual_hash()
    if near is None:
        say("Not searching for near duplicates: run `pip install imagehash`.")
    bar, files = ImageProgress(len(source)), []
    try:
        for one in inspect_folder(source, near, config.workers, config.window_size):
            files.append(one)
            bar.update(1)
    finally:
        bar.close()
    found = findings(files, config.window_size or config.img_size)
    content = summary(source, files, found)
    write_json(output, content, indent=2)
    if not found:
        figure.unlink(missing_ok=True)  # of an earlier check
    else:
        headers = {one.name: one.header.channels for one in files if one.header}
        root = source.folders()[0] if len(source.folders()) == 1 else ""
        like = {"duplicate": "the same as", "near duplicate": "looks like"}
        sheet = [
            (shown(name, headers.get(name), pixels, config), label(kind, name, root))
            for of in some_of_each(found, _SHOWN)
            for kind, name in ((of.kind, of.name), (like.get(of.kind, ""), of.partner))
            if name
        ]
        which = "channels " + " ".join(map(str, config.show_bands or ("1", "to", "3, or 1")))
        shares = f"{min(len(found), _SHOWN)} of {len(found)} findings"
        save_contact_sheet(sheet, figure, f"{shares}; {which}, percentiles 2 to 98")
    for line in lines(content, found, output):
        say(line)
    say(f"Found: {counts(content['found'])}. Written: {output}" + f", {figure}" * bool(found))
    return int(bool(found))


def shown(name: str, channels: int | None, pixels: Pixels, config: CheckConfig) -> np.ndarray | None:
    """The image of a file, None if it cannot be decoded."""
    if channels is None:
        return None
    try:
        return thumbnail(load_part(name, channels, pixels, config.window_size), config.show_bands)
    except (ImageError, OSError):
        return None


def label(kind: str, name: str, root: str) -> str:
    """The kind of a finding and the end of a path, in two short lines."""
    name = name.removeprefix(f"{root}/")
    return f"{kind}\n{name if len(name) <= 24 else '...' + name[-21:]}"


def summary(source: Any, files: list[Inspected], found: list[Finding]) -> dict[str, Any]:
    """The content of the JSON file."""
    headers = [one.header for one in files if one.header]

    def counted(values: Iterable[Any]) -> dict[str, int]:
        return {str(key): count for key, count in Counter(values).most_common()}

    heights, widths = ([getattr(h, side) for h in headers] or [0] for side in ("height", "width"))
    return {
        "made_by": made_by("check"),
        "files": len(files),
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


def counts(numbers: dict[str, int]) -> str:
    """'2 flat, 1 small', or 'none'."""
    return ", ".join(f"{count} {name}" for name, count in numbers.items()) or "none"


def lines(content: dict[str, Any], found: list[Finding], output: Path) -> list[str]:
    """The files in numbers, and the first findings."""
    (h0, h1, h2), (w0, w1, w2) = content["height"], content["width"]
    more = len(found) - _LINES
    channels = [f"{count(n, 'file')} with {c}" for c, n in content["channels"].items()]
    return [
        f"{count(content['files'], 'file')}: {counts(content['formats'])}; types: {counts(content['types'])}",
        f"channels: {', '.join(channels) or 'none'}",
        f"height {h0} to {h2}, median {h1:g}; width {w0} to {w2}, median {w1:g}",
        *(f"{finding.kind}: {finding.name}: {finding.why}" for finding in some_of_each(found, _LINES)),
        *([f"and {more} more, see {output}"] if more > 0 else []),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run("check", check, argv)
