"""Charts of a run as SVG elements that take the colours of their HTML page."""

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# Marker colours: in the SVG they become variables of the page, which has a light and a dark theme.
_INK, _GRID, _MUTED = "#fe0001", "#fe0002", "#fe0003"
SERIES = 8
LABEL = 0.07  # height of a label, relative to the axis
LEAST_SPAN = 0.02  # of an axis, relative to its values
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)", _MUTED: "var(--muted)"}
_VARIABLES |= {f"#fe01{i:02x}": f"var(--series-{i})" for i in range(SERIES)}
_SIZE = (4.6, 2.9)  # inches; 331 x 209 SVG units, about the width of a small phone


@dataclass(frozen=True)
class Line:
    """A curve over epochs."""

    values: Mapping[int, float]  # by epoch, from 1
    series: int = 0  # index of its colour on the page
    dashed: bool = False  # draw a dashed line


def spread(epochs: Iterable[int], count: int) -> list[int]:
    """At most `count` of the epochs, evenly spaced, including the first and the last."""
    every = sorted(epochs)
    if len(every) <= count:
        return every
    return sorted({every[round(i * (len(every) - 1) / (count - 1))] for i in range(count)})


def epoch_colours(epochs: Sequence[int]) -> dict[int, str]:
    """One colour per epoch, from grey to red, all visible on white and on black."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("epochs", ["#94a3b8", "#7c6fdc", "#e5484d"])
    last = max(len(epochs) - 1, 1)
    return {epoch: to_hex(scale(i / last if len(epochs) > 1 else 1.0)) for i, epoch in enumerate(epochs)}


def line_chart(
    name: str, lines: Sequence[Line], baselines: Mapping[str, float], about: str, zero: bool = False, top: float = 0
) -> str:  # fmt: skip
    """Curves over epochs as an SVG element.

    Args:
        name: Unique on the page.
        lines: At least one has a value.
        baselines: Horizontal lines by label.
        about: Text alternative; escaped here.
        zero: Begin the axis at 0.
        top: Let the axis reach at least from 0 to here.
    """
    figure, axis = _figure()
    longest = max(len(line.values) for line in lines)
    for line in lines:
        axis.plot(
            [*line.values], [*line.values.values()], color=f"#fe01{line.series % SERIES:02x}", linewidth=1.8,
            linestyle=(0, (3, 2)) if line.dashed else "-", marker="o" if longest < 30 else None, markersize=3.2,
        )  # fmt: skip
    for value in baselines.values():
        axis.axhline(value, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportAttributeAccessIssue]
    axis.margins(x=0.03, y=0.12)
    low, high = axis.get_ylim()
    if high - low < LEAST_SPAN * max(abs(low), abs(high)):  # labels of many digits would be cut
        middle, half = (low + high) / 2, LEAST_SPAN * max(abs(low), abs(high)) / 2
        axis.set_ylim(middle - half, middle + half)
    if max(abs(low), abs(high)) < 1e-9:
        axis.set_ylim(0, 1)
    if zero or top:
        axis.set_ylim(0, max(top, axis.get_ylim()[1]))
    low, high = axis.get_ylim()
    near: list[tuple[float, list[str]]] = []  # labels on top of each other would be read as neither
    for text, value in sorted(baselines.items(), key=lambda item: item[1]):
        lines_above = -(-len(near[-1][1]) // 2) if near else 0  # of the label below, two names each
        if near and value - near[-1][0] < LABEL * lines_above * (high - low):
            near[-1] = value, [*near[-1][1], text]
        else:
            near.append((value, [text]))
    for value, texts in near:
        pairs = [", ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
        axis.annotate(
            ",\n".join(pairs), (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", color=_MUTED, fontsize=8.5,
        )  # fmt: skip
    last = max((epoch for line in lines for epoch in line.values), default=1)
    if last == 1:  # one point would be drawn between epochs that do not exist
        axis.set(xlim=(0.5, 1.5), xticks=[1])
    return _svg(figure, name, about)


def precision_chart(name: str, curves: Sequence[Sequence[float]], about: str) -> str:
    """Precision over recall as an SVG element; a curve holds the precision at equally spaced recalls from 0 to 1."""
    figure, axis = _figure()
    for i, curve in enumerate(curves):
        recalls = [j / max(len(curve) - 1, 1) for j in range(len(curve))]
        axis.plot(recalls, curve, color=f"#fe01{i % SERIES:02x}", linewidth=1.8)
    axis.set(xlim=(0, 1.01), ylim=(0, 1.02))
    axis.set_xlabel("recall")
    return _svg(figure, name, about)


def collapse_chart(
    name: str, curves: Mapping[int, Sequence[Mapping[str, float]]], column: str = "distance", about: str = ""
) -> str:
    """A column over depth as an SVG element, one line per epoch; see `line_chart`."""
    figure, axis = _figure()
    for epoch, colour in epoch_colours([*curves]).items():
        rows = [row for row in curves[epoch] if column in row]
        axis.plot(
            [row["depth"] for row in rows], [row[column] for row in rows], color=colour, linewidth=1.6, marker="o",
            markersize=2.4,
        )  # fmt: skip
    axis.set_xlabel("depth (0: first block, 1: last)")
    axis.set_ylim(0, max(0.5, axis.get_ylim()[1]) if column == "distance" else None)
    return _svg(figure, name, about)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    figure.patch.set_visible(False)
    axis = figure.add_axes((0.125, 0.17, 0.86, 0.77))  # a computed layout would double the time
    axis.patch.set_visible(False)
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GRID)
    axis.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=9.5, length=3)
    axis.ticklabel_format(scilimits=(-3, 5))
    axis.yaxis.offsetText.set(color=_MUTED, fontsize=8.5)
    axis.xaxis.label.set(color=_MUTED, fontsize=9.5)
    return figure, axis


def _svg(figure: Any, name: str, about: str) -> str:
    """The figure as an SVG element with unique ids; text stays text, colours become variables of the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    written = io.StringIO()
    key = hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest()[:8]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif", "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    box = re.search(r'viewBox="([\d. ]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)
    # ids must be unique on the whole page
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"#fe0[01][0-9a-f]{2}\b", lambda found: _VARIABLES[found[0]], body)
    return f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(about)}">{body}'
