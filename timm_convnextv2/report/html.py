"""The report of runs of pretraining: one HTML file, which needs no network and no other file."""

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from ..files import whole_file
from .charts import Line, collapse_chart, epoch_colours, line_chart, spread
from .next_steps import next_steps
from .run import RunRecord, read_run

__all__ = ["GENERATOR", "read_runs", "render", "write_report"]

GENERATOR = "timm_convnextv2 report"
MAX_IMAGES = 20  # reconstructions of a report, so that it stays below some MB
MAX_CURVES = 12  # epochs of a collapse figure
MAX_ROWS = 30  # epochs of the table of numbers
BASELINES = {"random": "random weights", "pixels": "plain pixels"}
# Columns of summary.csv in the table of numbers: heading and format.
COLUMNS = {
    "train_loss": ("loss", "{:.4f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_knn": ("kNN %", "{:.1f}"),
    "eval_ridge": ("ridge %", "{:.1f}"),
    "eval_rank": ("RankMe", "{:.1f}"),
    "eval_distance": ("distance", "{:.3f}"),
    "eval_dead": ("dead channels", "{:.1%}"),
    "train_images_per_s": ("images/s", "{:.1f}"),
    "train_data_wait": ("data wait", "{:.0%}"),
    "train_memory_gib": ("memory GiB", "{:.2f}"),
    "lr": ("learning rate", "{:.2e}"),
}


def write_report(runs: Sequence[str | Path], path: str | Path) -> list[str]:
    """Writes a report of one run, or of several side by side.

    Args:
        runs: Their folders.
        path: HTML file to write.

    Returns:
        What was left out and why; nothing where all is whole.

    Raises:
        ValueError: A folder is not that of a run of pretraining, or its args.yaml is damaged.
        WriteError: (an OSError) The file cannot be written.
    """
    records = read_runs(runs)
    text = render(records)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return [f"{run.path}: {note}" for run in records for note in run.notes]


def read_runs(runs: Sequence[str | Path]) -> list[RunRecord]:
    """The runs by their folders' names, or by their paths where two have the same name; see `read_run`."""
    paths = [Path(run) for run in runs]
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def render(runs: Sequence[RunRecord]) -> str:
    """The report as HTML. Whatever the user named is escaped, and no script but the page's own may run.

    Args:
        runs: Of `read_runs`; what turns out to be damaged is added to their notes.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files("timm_convnextv2.report") / "templates"
    script, style, page = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css", "html"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page).render(
        title="Pretraining of " + ", ".join(run.label for run in runs),
        generator=GENERATOR,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=[_view(run, i, MAX_IMAGES if len(runs) == 1 else max(6, MAX_IMAGES // len(runs))) for i, run in
              enumerate(runs)],
        facts=_table(_facts(run) for run in runs),
        numbers=_table(_numbers(run) for run in runs),
        charts=[
            {"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in _charts(runs)
        ],
        settings=_settings(runs),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- facts


def _table(columns: Iterable[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column a run; a row that is empty in all of them is left out."""
    every = list(columns)
    names = list(dict.fromkeys(name for column in every for name in column))
    rows = [(name, [column.get(name, "") for column in every]) for name in names]
    return [(name, cells) for name, cells in rows if any(cells)]


def _facts(run: RunRecord) -> dict[str, str]:
    """What was trained on what."""
    of, progress = run.settings, run.progress
    chans, height, width = of["input_size"]
    places = [of["dataset"], of["data_dir"], of.get("data_list")]
    named = [word for place in places if place for word in (place if isinstance(place, list) else [place])]
    data = "the embedded data set" if of["dataset"] == "embedded" else " ".join(named)
    images = progress.get("num_images") or of.get("train_num_samples")
    accum = f" x {of['grad_accum_steps']} steps" if of["grad_accum_steps"] > 1 else ""
    processes = progress.get("world_size", 1)
    processes = f" x {processes} processes" if processes > 1 else ""
    start = "random weights" if not of["pretrained"] else str(of.get("weights") or "published or given weights")
    probe = run.probe
    probed = f"{probe.get('data_dir', '')}: {len(probe.get('classes') or [])} classes, {probe.get('train', '?')} train"
    return {
        "Model": of["model"],
        "Started from": start,
        "Data": data,
        "Images": f"{images:,}" if isinstance(images, int) else "",
        "Input": f"{chans} x {height} x {width}, stem patch {of['patch_size']}",
        "Method": f"FCMAE, mask ratio {of['mask_ratio']:g}, decoder {of['decoder_depth']} x {of['decoder_dim']}, "
        + ("targets normalised per patch" if of.get("norm_pix_loss") else "plain pixels"),
        "Epochs": f"{len(run.rows) and max(run.rows) + 1} of {of['epochs']}",
        "Batch": f"{of['batch_size']}{accum}{processes}",
        "Device": f"{of.get('device', '')}{', ' + str(of.get('amp_dtype')) if of.get('amp') else ''}",
        "Seed": str(of["seed"]),
        "Probe": f"{probed}, {probe.get('test', '?')} test images" if probe else "",
        "Versions": run.versions,
        "Folder": str(run.path),
        "Command": run.command,
    }


def _about(run: RunRecord) -> str:
    """The run in a line."""
    facts = _facts(run)
    images = f"{facts['Images']} images" if facts["Images"] else "images"
    size = " x ".join(map(str, run.settings["input_size"]))
    return f"{facts['Model']} on {facts['Data']}, {images} of {size}, {facts['Epochs']} epochs"


def _numbers(run: RunRecord) -> dict[str, str]:
    """How it went, in the last numbers that were measured."""
    rows = run.rows.values()
    seconds = sum(row.get("train_seconds", 0.0) for row in rows)
    speeds = [row["train_images_per_s"] for row in rows if "train_images_per_s" in row]
    waits = [row["train_data_wait"] for row in rows if "train_data_wait" in row]
    memory = [row["train_memory_gib"] for row in rows if "train_memory_gib" in row]
    bad = run.progress.get("bad_images") or {}
    last_bad = _last(run, "train_bad_images", "{:.0f}")
    return {
        "Loss": _last(run, "train_loss", "{:.4f}"),
        "Held-out loss": _last(run, "eval_loss", "{:.4f}"),
        "kNN": _last(run, "eval_knn", "{:.1f}%"),
        "Ridge": _last(run, "eval_ridge", "{:.1f}%"),
        "RankMe": _last(run, "eval_rank", "{:.1f}"),
        "Distance of channels": _last(run, "eval_distance", "{:.3f}"),
        "Dead channels": _last(run, "eval_dead", "{:.2%}"),
        "Training time": _duration(seconds) if seconds else "",
        "Speed": f"{median(speeds):.1f} images/s" if speeds else "",
        "Waiting for data": f"{100 * median(waits):.0f} % of the time" if waits else "",
        "Peak memory": f"{max(memory):.2f} GiB" if memory else "",
        "Images that cannot be decoded": str(len(bad)) if bad else last_bad,
        "Skipped updates": str(run.progress["bad_steps"]) if "bad_steps" in run.progress else "",
    }


def _last(run: RunRecord, column: str, form: str) -> str:
    values = run.column(column)
    return form.format(values[max(values)]).replace("%", " %") if values else ""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """Every setting, those first in which runs differ; whether they do."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [(name, [str(run.settings.get(name, "")) for run in runs]) for name in names]
    marked = [(name, cells, len(set(cells)) > 1) for name, cells in rows]
    return sorted(marked, key=lambda row: not row[2])


# ------------------------------------------------------------------------------------------------------------ charts


def _charts(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    """Title, note and SVG of what runs have in common; none of what was not measured."""
    made = []

    def add(title: str, columns: dict[str, bool], note: str = "", scale: float = 0, baseline: str = "") -> None:
        """A chart of columns, dashed or not; a scale is for shares, and lets the axis begin at 0."""
        lines = [
            Line({epoch: value * (scale or 1) for epoch, value in values.items()}, i, dashed)
            for column, dashed in columns.items()
            for i, run in enumerate(runs)
            if (values := run.column(column))
        ]
        if lines:
            lows = _baselines(runs, baseline) if baseline else {}
            name = "-".join(columns)
            made.append((title, note, line_chart(name, lines, lows, _in_words(title, lines, lows), bool(scale))))

    held_out = any(run.column("eval_loss") for run in runs)
    note = "Solid: training. Dashed: held-out images." if held_out else "On masked patches of the training images."
    add("Loss", {"train_loss": False, "eval_loss": True}, note)
    add("kNN accuracy, %", {"eval_knn": False}, "Dotted: baselines that need no training.", baseline="knn")
    add("Ridge accuracy, %", {"eval_ridge": False}, "A linear classifier in closed form.", baseline="ridge")
    add("RankMe", {"eval_rank": False}, "Compares runs of one method only.", baseline="rank")
    add("Mean distance of channels", {"eval_distance": False}, "0: collapsed. About 0.5: independent.")
    add("Dead channels, %", {"eval_dead": False}, "Channels whose norm is next to nothing.", 100)
    add("Speed, images/s", {"train_images_per_s": False}, scale=1)
    add("Waiting for data, % of the time", {"train_data_wait": False}, "More than a few %: add data workers.", 100)
    add("Learning rate", {"lr": False})
    return made


def _baselines(runs: Sequence[RunRecord], measure: str) -> dict[str, float]:
    """Value by what stands on its line, with the number of the run where runs have others."""
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


def _in_words(title: str, lines: Sequence[Line], baselines: dict[str, float]) -> str:
    """A chart for those who do not see it."""
    parts = []
    for line in lines:
        first, last = min(line.values), max(line.values)
        what = f"run {line.series + 1}{' (held out)' if line.dashed else ''}"
        parts.append(
            f"{what}: {line.values[first]:.4g} after epoch {first}, {line.values[last]:.4g} after epoch {last}"
        )
    parts += [f"{name}: {value:.4g}" for name, value in baselines.items()]
    return f"{title} over epochs. {'; '.join(parts)}."


# -------------------------------------------------------------------------------------------------------- of each run


def _view(run: RunRecord, number: int, max_images: int) -> dict[str, Any]:
    """What the page shows of one run alone."""
    bad = run.progress.get("bad_images")
    reconstructions = _embed(run, run.reconstructions, max_images)
    neighbours = _embed(run, run.neighbours, 2)
    return {
        "id": f"run-{number}",
        "number": number,
        "label": run.label,
        "about": _about(run),
        "findings": _findings(run),
        "reconstructions": reconstructions,
        "left_out": len(run.reconstructions) - len(reconstructions),
        "collapse": _collapse(run, number),
        "neighbours": neighbours,
        "rows": _rows(run),
        "bad_images": list(bad.values())[:100] if isinstance(bad, dict) else [],
        "next_steps": next_steps(run.settings, run.path) if (run.path / "encoder" / "config.json").exists() else [],
        "notes": run.notes,
    }


def _findings(run: RunRecord) -> list[str]:
    """What the numbers say, in sentences."""
    found = []
    for column, name, key in (("eval_knn", "kNN", "knn"), ("eval_ridge", "Ridge", "ridge")):
        values = run.column(column)
        if not values:
            continue
        last = max(values)
        sides = [
            f"{_side(values[last], of[key])} {BASELINES.get(base, base)} ({of[key]:.1f} %)"
            for base, of in run.probe.get("baselines", {}).items()
            if key in of
        ]
        found.append(f"{name} after epoch {last} is {values[last]:.1f} %{': ' if sides else ''}{', '.join(sides)}.")
    held_out = run.column("eval_loss")
    if held_out:
        best, last = min(held_out, key=lambda epoch: held_out[epoch]), max(held_out)
        since = "" if best == last else f", and is {held_out[last]:.4f} after epoch {last}"
        found.append(f"The held-out loss was lowest after epoch {best} ({held_out[best]:.4f}){since}.")
    return found


def _side(value: float, baseline: float) -> str:
    return "above" if value > baseline else "below" if value < baseline else "equal to"


def _collapse(run: RunRecord, number: int) -> dict[str, Any]:
    """The figure of the distances, that of dead channels where there are some, and the colours of the epochs."""
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
    """The numbers of some epochs as text."""
    columns = {name: of for name, of in COLUMNS.items() if run.column(name)}
    epochs = spread(run.rows, MAX_ROWS)
    return {
        "columns": [title for title, _ in columns.values()],
        "rows": [
            (epoch + 1, [form.format(run.rows[epoch][name]) if name in run.rows[epoch] else ""
                         for name, (_, form) in columns.items()])
            for epoch in epochs
        ],
        "all": len(epochs) == len(run.rows),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ images


def _embed(run: RunRecord, images: dict[int, Path], count: int) -> list[dict[str, Any]]:
    """Images by epoch as data of the page; what cannot be decoded is noted."""
    shown = []
    for epoch in spread(images, count):
        path = images[epoch]
        try:
            status = path.stat()
            source, width, height = _data(str(path), status.st_mtime_ns, status.st_size)
        except (OSError, ValueError, SyntaxError) as e:  # what Pillow raises of a damaged PNG
            run.notes.append(f"{path.parent.name}/{path.name} cannot be read ({e}).")
            continue
        shown.append({"epoch": epoch, "source": source, "width": width, "height": height})
    return shown


@functools.lru_cache(maxsize=3 * MAX_IMAGES)  # a run in training draws its report at every checkpoint
def _data(path: str, _changed: int, _size: int) -> tuple[str, int, int]:
    """A PNG as a `data:` address, as WebP or JPEG where that is smaller; its width and height."""
    from PIL import Image, features

    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        pixels = image.convert("RGB")
    smallest, kind = content, "png"
    webp: dict[str, Any] = {"quality": 82, "method": 4}
    jpeg: dict[str, Any] = {"quality": 82, "optimize": True}
    for name, options in [("webp", webp)] if features.check("webp") else [("jpeg", jpeg)]:
        packed = io.BytesIO()
        pixels.save(packed, name.upper(), **options)
        if packed.tell() < len(smallest):
            smallest, kind = packed.getvalue(), name
    return f"data:image/{kind};base64,{base64.b64encode(smallest).decode()}", pixels.width, pixels.height
