"""`timm-convnextv2 evaluate`: compares frozen features on labelled images."""

from pathlib import Path
from typing import Any

from ..console import count, say
from ..features.config import EvaluateConfig
from ..features.evaluate import BUDGET_FILES, FILES, evaluate
from ..features.labelled import chance_words
from .base import run


def main(argv: list[str] | None = None) -> int:
    return run("evaluate", measure, argv)


def measure(config: EvaluateConfig) -> None:
    say(table(evaluate(config)))
    if config.output is not None:
        names = FILES + (BUDGET_FILES if config.scoring.label_budgets else ())
        say(f"Written: {', '.join(str(Path(config.output) / name) for name in names)}")


def table(found: dict[str, Any]) -> str:
    """The measures of `evaluate_models` as text: percent, with half of the 95 % interval, and the rank."""
    keys = list(found["results"][0]["measures"])
    head = ["model", *(key.replace("knn_", "kNN ") for key in keys), "images/s"]
    rows = []
    for result in found["results"]:
        cells = [_cell(key, result["measures"][key]) for key in keys]
        rate = f"{result['images_per_second']:.0f}" if "images_per_second" in result else ""
        rows.append([result["model"], *cells, rate])
    lines = _aligned([head, *rows])
    if budgets := [result for result in found["results"] if "budgets" in result]:
        lines += ["", *_aligned(_budgets(budgets)), ""]
    lines += [line for result in found["results"] for line in result.get("verdict", ())]
    data = found["data"]
    what = "mean average precision" if data["several_labels"] else "accuracy"
    over = (
        f"{data['test_groups']} groups of test images"
        if data["test_groups"]
        else count(data["test_images"], "test image")
    )
    lines += [
        *found["notes"],
        f"{what} in %, +- half of its 95 % interval (bootstrap over {over}); "
        f"{chance_words(data['chance'], data['several_labels'])}. Differences are in points, with paired 95 % "
        "intervals. The rank compares runs of one method only.",
    ]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _budgets(results: list[dict[str, Any]]) -> list[list[str]]:
    """The measures by number of labelled images, a column each."""
    first = results[0]["budgets"]
    head = [f"labelled images ({' / '.join(first[0]['measures'])})", *(str(budget["images"]) for budget in first)]
    values = (
        (result["model"], *([of["value"] for of in budget["measures"].values()] for budget in result["budgets"]))
        for result in results
    )
    return [head, *([name, *(" / ".join(f"{100 * v:.1f}" for v in of) for of in cells)] for name, *cells in values)]


def _cell(key: str, estimate: dict[str, float]) -> str:
    if key == "rank":
        return f"{estimate['value']:.1f}"
    return f"{100 * estimate['value']:.1f} +-{50 * (estimate['high'] - estimate['low']):.1f}"
