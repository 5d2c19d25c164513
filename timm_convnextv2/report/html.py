"""The report of runs as one HTML file that needs no network and no other file; `kinds` has the texts per task."""

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import whole_file
from .charts import SERIES, Line, collapse_chart, epoch_colours, line_chart, precision_chart, spread
from .kinds import BASELINES, COST, KINDS, as_text, charts_of, in_one_line, last_numbers, probe_rows, verdict
from .run import RunRecord, read_run

GENERATOR = "timm_convnextv2 report"  # the command overwrites only files with this mark
MAX_IMAGES = 20  # epochs with an image: keeps the file at a few MB
MAX_CURVES = 12  # epochs of a collapse figure
MAX_ROWS = 30  # epochs of the table of numbers
MAX_CLASSES = 30  # the worst ones


def write_report(runs: Sequence[str | Path], path: str | Path) -> list[str]:
    """Writes a report of the runs in these folders; returns the notes about corrupt files.

    Raises:
        ValueError: See `read_runs`, or a run has no complete epoch.
        WriteError: (an OSError) The file cannot be written.
    """
    records = read_runs(runs)
    for run in records:
        if not run.rows:
            why = run.notes[0] if run.notes else "it has no summary.csv with a row, so no epoch is complete."
            raise ValueError(f"'{run.path}' has nothing to report yet: {why} Try again after the first epoch.")
    text = render(records)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")  # a file name need not be UTF-8
    return [f"{run.path}: {note}" for run in records for note in run.notes]


def read_runs(runs: Sequence[str | Path]) -> list[RunRecord]:
    """Reads runs, labelled by their folders' names, or by their paths if two have the same name.

    Raises:
        ValueError: See `read_run`; or the runs have different tasks.
    """
    paths = [Path(run) for run in runs]
    names = [path.resolve().name for path in paths]
    records = [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]
    other = next((run for run in records if run.task != records[0].task), None)
    if other is not None:
        raise ValueError(
            f"'{records[0].path}' is a run of {records[0].task} and '{other.path}' one of {other.task}, which share no "
            "number. Report runs of one task side by side."
        )
    return records


def render(runs: Sequence[RunRecord]) -> str:
    """The report as HTML. Escapes all text of the user, and the page's policy allows no script but its own.

    Adds corrupt images to the notes of the runs.
    """
    import jinja2
    from markupsafe import Markup

    kind = KINDS[runs[0].task]
    folder = resources.files("timm_convnextv2.report") / "templates"
    script, style, page = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css", "html"))
    charts = [{"title": title, "note": note, "svg": Markup(svg), "result": result} for title, note, svg, result in
              _charts(runs)]  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page).render(
        title=f"{kind.title} of " + ", ".join(run.label for run in runs),
        kind=kind,
        generator=GENERATOR,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=[_view(run, i, MAX_IMAGES if len(runs) == 1 else max(6, MAX_IMAGES // len(runs))) for i, run in
              enumerate(runs)],
        facts=_table(kind.facts(run) for run in runs),
        numbers=_table(last_numbers(run, kind.measures) for run in runs),
        charts=charts,
        places=len({kind.facts(run)["Data"] for run in runs}) > 1,
        settings=_settings(runs),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ tables


def _table(columns: Iterable[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows of a table with one column per run, without rows that are empty in all of them."""
    every = list(columns)
    names = list(dict.fromkeys(name for column in every for name in column))
    rows = [(name, [column.get(name, "") for column in every]) for name in names]
    return [(name, cells) for name, cells in rows if any(cells)]


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """All settings with True for those that differ between runs; these come first."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [(name, [str(run.settings.get(name, "")) for run in runs]) for name in names]
    marked = [(name, cells, len(set(cells)) > 1) for name, cells in rows]
    return sorted(marked, key=lambda row: not row[2])


# ------------------------------------------------------------------------------------------------------------ charts


def _charts(runs: Sequence[RunRecord]) -> list[tuple[str, str, str, bool]]:
    """Title, note and SVG of each chart that at least one run measured, and whether it shows results.

    If none does, the first one stands for them.
    """
    made = []
    for chart in charts_of(runs, KINDS[runs[0].task]):
        lines = [
            Line({epoch: value * (chart.scale or 1) for epoch, value in values.items()}, i, dashed)
            for column, dashed in chart.columns.items()
            for i, run in enumerate(runs)
            if (values := run.column(column))
        ]
        if lines:
            lows = _baselines(runs, chart.baseline) if chart.baseline else {}
            words = _in_words(chart.title, lines, lows, chart.dashed)
            svg = line_chart("-".join(chart.columns), lines, lows, words, bool(chart.scale), chart.top)
            note = chart.note if any(line.dashed for line in lines) else chart.solid or chart.note
            made.append((chart.title, note, svg, chart.result))
    return made if any(result for *_, result in made) else [(*of[:3], i == 0) for i, of in enumerate(made)]


def _baselines(runs: Sequence[RunRecord], measure: str) -> dict[str, float]:
    """Values by the label of their line, with the number of the run if runs differ."""
    found: dict[str, dict[int, float]] = {}
    for i, run in enumerate(runs, 1):
        for name, of in run.probe.get("baselines", {}).items():
            if measure in of:
                found.setdefault(str(BASELINES.get(name, name)), {})[i] = of[measure]
    lines: dict[str, float] = {}
    for text, values in found.items():
        same = len({*values.values()}) == 1
        lines |= {text if same else f"{text}, run {i}": value for i, value in values.items()}
    return lines


def _in_words(title: str, lines: Sequence[Line], baselines: dict[str, float], dashed: str) -> str:
    """The text alternative of a chart."""
    parts = []
    for line in lines:
        first, last = min(line.values), max(line.values)
        what = f"run {line.series + 1}{f' ({dashed})' if line.dashed else ''}"
        parts.append(
            f"{what}: {line.values[first]:.4g} after epoch {first}, {line.values[last]:.4g} after epoch {last}"
        )
    parts += [f"{name}: {value:.4g}" for name, value in baselines.items()]
    return f"{title} over epochs. {'; '.join(parts)}."


# -------------------------------------------------------------------------------------------------------- of each run


def _view(run: RunRecord, number: int, max_images: int) -> dict[str, Any]:
    """The data of one run for the page."""
    bad, kind = run.progress.get("bad_images"), KINDS[run.task]
    predictions = _embed(run, run.predictions, max_images)
    neighbours = _embed(run, run.neighbours, 2)
    return {
        "id": f"run-{number}",
        "number": number,
        "label": run.label,
        "about": in_one_line(kind.facts(run)),
        "verdict": verdict(run),
        "place": kind.facts(run)["Data"],
        "probe": probe_rows(run) if run.task == "pretraining" else [],
        "findings": kind.findings(run),
        "predictions": predictions,
        "left_out": len(run.predictions) - len(predictions),
        "collapse": _collapse(run, number),
        "neighbours": neighbours,
        "classes": _classes(run, number),
        "rows": _rows(run),
        "bad_images": list(bad.values())[:100] if isinstance(bad, dict) else [],
        "next_steps": kind.next_steps(run.settings, run.path)
        if (run.path / kind.model / "config.json").exists()
        else [],
        "notes": run.notes,
    }


def _classes(run: RunRecord, number: int) -> dict[str, Any]:
    """The table of classes, the worst first; the confusion in % of each true class; curves of precision."""
    from markupsafe import Markup

    if run.classes is None:
        return {}
    known = sorted((c for c in run.classes.classes if c.value is not None), key=lambda c: c.value or 0.0)
    rows = [(c.name, as_text(c.value or 0.0, "{:.1%}"), f"{c.count:,}", c.mistake) for c in known[:MAX_CLASSES]]
    names = [c.name for c in run.classes.classes]
    shares = [[round(100 * n / max(1, sum(counts))) for n in counts] for counts in run.classes.confusion or ()]
    curves = {c.name: c.precision for c in known[:SERIES] if c.precision}
    about = f"Precision over recall of {', '.join(curves)}."
    return {
        "measure": run.classes.measure, "unit": run.classes.unit, "rows": rows, "all": len(known),
        "mistakes": any(c.mistake for c in known), "confusion": list(zip(names, shares, strict=False)),
        "precision": [*curves] and Markup(precision_chart(f"precision-{number}", [*curves.values()], about)),
        "curves": [*curves],
    }  # fmt: skip


def _collapse(run: RunRecord, number: int) -> dict[str, Any]:
    """The figures of distances and (if any) dead channels, and the colours of the epochs."""
    from markupsafe import Markup

    curves = {epoch: run.collapse[epoch] for epoch in spread(run.collapse, MAX_CURVES)}
    if not curves:
        return {}
    first, last = min(curves), max(curves)
    means = {e: sum(row["distance"] for row in curves[e]) / len(curves[e]) for e in (first, last)}
    about = (
        f"Distance of channels over depth, {len(curves[last])} blocks. Mean {means[first]:.3f} after epoch {first}, "
        f"{means[last]:.3f} after epoch {last}."
    )
    figures = [("Mean cosine distance of channels", Markup(collapse_chart(f"collapse-{number}", curves, about=about)))]
    if any(row.get("dead", 0) > 0 for rows in curves.values() for row in rows):
        svg = collapse_chart(f"dead-{number}", curves, "dead", "Share of dead channels over depth.")
        figures.append(("Share of dead channels", Markup(svg)))
    return {"figures": figures, "colours": list(epoch_colours([*curves]).items()), "dead": len(figures) > 1}


def _rows(run: RunRecord) -> dict[str, Any]:
    """The table of numbers, of at most `MAX_ROWS` epochs."""
    columns = {name: of for name, of in (KINDS[run.task].measures | COST).items() if run.column(name)}
    epochs = spread(run.rows, MAX_ROWS)
    return {
        "columns": [title for title, _ in columns.values()],
        "rows": [
            (epoch + 1, [as_text(run.rows[epoch][name], form) if name in run.rows[epoch] else ""
                         for name, (_, form) in columns.items()])
            for epoch in epochs
        ],
        "all": len(epochs) == len(run.rows),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ images


def _embed(run: RunRecord, images: dict[int, Path], count: int) -> list[dict[str, Any]]:
    """Images by epoch as data of the page; corrupt ones are noted."""
    shown = []
    for epoch in spread(images, count):
        path = images[epoch]
        try:
            status = path.stat()
            source, width, height = _data(str(path), status.st_mtime_ns, status.st_size)
        except (OSError, ValueError, SyntaxError) as e:  # Pillow raises these for a corrupt PNG
            run.notes.append(f"{path.parent.name}/{path.name} cannot be read ({e}).")
            continue
        shown.append({"epoch": epoch, "source": source, "width": width, "height": height})
    return shown


@functools.lru_cache(maxsize=3 * MAX_IMAGES)  # a run in training redraws its report again and again
def _data(path: str, _changed: int, _size: int) -> tuple[str, int, int]:
    """A PNG as a `data:` address (as WebP or JPEG if smaller), its width and height."""
    from PIL import Image, features

    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        pixels = image.convert("RGB")
    kind, packed = "webp" if features.check("webp") else "jpeg", io.BytesIO()
    pixels.save(packed, kind.upper(), quality=82)
    if packed.tell() >= len(content):
        kind, packed = "png", io.BytesIO(content)
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}", pixels.width, pixels.height
