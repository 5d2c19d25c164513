"""Compare frozen features on labelled images: nearest neighbours, ridge regression, linear probe and rank.

Two baselines are measured as well: random weights and plain pixels.
"""

from typing import Any

from ..console import say
from ..features.config import EvaluateConfig
from ..features.evaluate import evaluate_models
from ..features.figures import save_measures
from ..files import claim_folder, write_json
from .base import run

FILES = ("evaluation.json", "evaluation.png")


def main(argv: list[str] | None = None) -> int:
    return run("evaluate", __doc__, EvaluateConfig, measure, argv)


def measure(config: EvaluateConfig) -> None:
    folder = None if config.output is None else claim_folder(config.output, FILES, overwrite=config.overwrite)
    found = evaluate_models(
        config.models, config.data_dir, config.extraction, config.scoring, baselines=config.baselines,
        validation_share=config.validation_share, progress=True,
    )  # fmt: skip
    say(table(found))
    if folder is not None:
        write_json(folder / FILES[0], found, indent=2)
        save_measures(found, folder / FILES[1])
        say(f"Written: {' and '.join(str(folder / name) for name in FILES)}")


def table(found: dict[str, Any]) -> str:
    """The measures of `evaluate_models` as text: percent, with half of the 95 % interval, and the rank."""
    keys = list(found["results"][0]["measures"])
    head = ["model", *(key.replace("knn_", "kNN ") for key in keys), "images/s"]
    rows = []
    for result in found["results"]:
        cells = [_cell(key, result["measures"][key]) for key in keys]
        rows.append([result["model"], *cells, f"{result['images_per_second']:.0f}"])
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    for result in found["results"]:
        for base, gains in result.get("against", {}).items():
            shown = "; ".join(f"{key.replace('knn_', 'kNN ')} {gain}" for key, gain in gains.items())
            lines.append(f"{result['model']} against {base}, points and paired 95 % interval: {shown}")
    what = "mean average precision" if found["data"]["several_labels"] else "accuracy"
    lines.append(
        f"{what} in %, +- half of its 95 % interval (bootstrap over {found['data']['test_images']} test images); "
        f"chance is {100 * found['data']['chance']:.1f}. The rank compares runs of one method only."
    )
    return "\n".join(lines)


def _cell(key: str, estimate: dict[str, float]) -> str:
    if key == "rank":
        return f"{estimate['value']:.1f}"
    return f"{100 * estimate['value']:.1f} +-{50 * (estimate['high'] - estimate['low']):.1f}"
