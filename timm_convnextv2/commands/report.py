"""`timm-convnextv2 report`: one HTML page for one or several runs."""

from pathlib import Path

from ..console import say
from ..files import check_free
from ..report.html import GENERATOR, write_report
from ..report.run import read_run
from .base import run
from .options import ReportConfig


def main(argv: list[str] | None = None) -> int:
    return run("report", report, argv)


def report(config: ReportConfig) -> None:
    """Writes the report, prints its path, and the notes about corrupt files to stderr."""
    folders, output = config.runs, config.output
    resolved = [Path(name).resolve() for name in folders]
    duplicate = [name for i, name in enumerate(folders) if resolved[i] in resolved[:i]]
    if duplicate:
        raise ValueError(f"'{duplicate[0]}' is named twice. Name each run once.")
    for name in folders:
        if not Path(name).is_dir():
            read_run(Path(name))  # says so, before the folder of the page is made
    path = Path(output) if output else Path(folders[0] if len(folders) == 1 else ".") / "report.html"
    check_free(path, overwrite=False, flag="", marks=[GENERATOR])  # only a report is replaced
    for note in write_report(folders, path):
        say(note, error=True)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
