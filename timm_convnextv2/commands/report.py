"""The options of `timm-convnextv2 report`."""

from pathlib import Path

from ..console import PROGRAM, CommandParser, refused, say
from ..files import whole_file
from ..report.html import GENERATOR, read_runs, render


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog=f"{PROGRAM} report", description="Show runs on one page.")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run of pretrain, detect or segment; several of one task side by side",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="HTML file to write (default: RUN/report.html; of several runs ./report.html)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; whatever is wrong is one message and exit status 2."""
    try:
        args = build_parser().parse_args(argv)
        report(args.runs, args.output)
    except (ValueError, OSError) as e:
        return refused("report", e)
    return 0


def report(folders: list[str], output: str | None) -> None:
    """Writes the report and says where it is, and what is missing in it."""
    twice = [name for i, name in enumerate(folders) if Path(name).resolve() in map(_resolved, folders[:i])]
    if twice:
        raise ValueError(f"'{twice[0]}' is named twice. Name each run once.")
    path = Path(output) if output else Path(folders[0] if len(folders) == 1 else ".") / "report.html"
    _check_output(path)
    runs = read_runs(folders)
    for run in runs:
        if not run.rows:
            why = run.notes[0] if run.notes else "it has no summary.csv with a row, so that no epoch is complete."
            raise ValueError(f"'{run.path}' has nothing to report yet: {why} Look again after the first epoch.")
    text = render(runs)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    for run in runs:
        for note in run.notes:
            say(f"{run.path}: {note}", error=True)
    say(f"{path}: {len(text) / 1e6:.1f} MB; open it in a browser")


def _resolved(folder: str) -> Path:
    return Path(folder).resolve()


def _check_output(path: Path) -> None:
    """Refuses to replace what is not a report."""
    if path.is_dir():
        raise ValueError(
            f"--output {path} is a folder, expected an HTML file to write, such as {path / 'report.html'}."
        )
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        if GENERATOR not in file.read(2000):
            raise ValueError(f"{path} is there and is not a report, so that it is not replaced. Name another --output.")
