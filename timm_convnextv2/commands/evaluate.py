"""`timm-convnextv2 evaluate`: compares frozen features on labelled images."""

from pathlib import Path
from typing import Any

from ..console import say
from ..features.config import EvaluateConfig
from ..features.evaluate import BUDGET_FILES, FILES, evaluate
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
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    lines += [line for result in found["results"] for line in result.get("verdict", ())]
    what = "mean average precision" if found["data"]["several_labels"] else "accuracy"
    lines.append(
        f"{what} in %, +- half of its 95 % interval (bootstrap over {found['data']['test_images']} test images); "
        f"chance is {100 * found['data']['chance']:.1f}. Differences are in points, with paired 95 % intervals. "
        "The rank compares runs of one method only."
    )
    return "\n".join(lines)


def _cell(key: str, estimate: dict[str, float]) -> str:
    if key == "rank":
        return f"{estimate['value']:.1f}"
    return f"{100 * estimate['value']:.1f} +-{50 * (estimate['high'] - estimate['low']):.1f}"
