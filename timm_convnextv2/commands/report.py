"""`timm-convnextv2 report`: one HTML page for one or several runs."""

from dataclasses import dataclass
from pathlib import Path

from ..config import option
from ..console import say
from ..report.html import GENERATOR, write_report
from .base import run


@dataclass(frozen=True)
class ReportConfig:
    """Options of `report`."""

    runs: tuple[str, ...] = option(
        ...,
        "folder of a run of pretrain, detect or segment; several of one task side by side",
        metavar="RUN",
        positional=True,
    )
    output: str = option(
        "", "HTML file to write (default: RUN/report.html; for several runs ./report.html)", metavar="FILE"
    )


def main(argv: list[str] | None = None) -> int:
    return run(
        "report", "Show runs on one page.", ReportConfig, lambda config: report(config.runs, config.output), argv
    )


def report(folders: tuple[str, ...], output: str = "") -> None:
    """Writes the report, prints its path, and the notes about corrupt files to stderr."""
    resolved = [Path(name).resolve() for name in folders]
    duplicate = [name for i, name in enumerate(folders) if resolved[i] in resolved[:i]]
    if duplicate:
        raise ValueError(f"'{duplicate[0]}' is named twice. Name each run once.")
    path = Path(output) if output else Path(folders[0] if len(folders) == 1 else ".") / "report.html"
    _check_output(path)
    for note in write_report(folders, path):
        say(note, error=True)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _check_output(path: Path) -> None:
    """Refuses to replace a file that is not a report."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder, expected an HTML file such as {path / 'report.html'}.")
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            if GENERATOR not in file.read(2000):
                raise ValueError(f"{path} exists and is not a report, so it is not replaced. Name another --output.")
