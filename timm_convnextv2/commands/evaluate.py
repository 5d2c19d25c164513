"""The options of `timm-convnextv2 evaluate`, its table and its files."""

import json
from typing import Any

import torch

from ..console import PROGRAM, CommandParser, refused, say
from ..features.evaluate import evaluate_models
from ..features.figures import save_measures
from ..features.knn import NEIGHBOURS, TEMPERATURE
from ..files import claim_folder, whole_file

FILES = ("evaluation.json", "evaluation.png")


# fmt: off
def add_image_options(parser: CommandParser) -> None:
    """Options that the commands of this package share: models, how images are read, where the models run."""
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="a model of timm, local-dir:FOLDER, hf-hub:USER/NAME, or the folder of a run")
    add("--img-size", type=int, metavar="N", help="side of the square crops in pixels (default: each model's)")
    add("--nodata", type=float, metavar="V",
        help="stored value of pixels without data, which get the others' mean (default: each model's; nan: none)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D",
        help="where the models run (default: cuda if there is one, else cpu)")
    add("--amp", action="store_true", help="compute in bfloat16; what is measured stays float32")
    add("--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default: 0)")
    add("--overwrite", action="store_true", help="replace the files in --output")


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog=f"{PROGRAM} evaluate",
        description="Compare frozen features on labelled images: nearest neighbours, ridge regression, linear probe, "
        "rank; beside random weights and plain pixels.",
    )
    add_image_options(parser)
    add = parser.add_argument
    add("--data-dir", required=True, metavar="LABELLED",
        help="folder with train/ and validation/ of class folders; or of class folders, which are split; or a CSV with "
        "name and label")
    add("--output", metavar="DIR", help=f"folder to write {FILES[0]} and {FILES[1]} to (default: the table only)")
    add("-k", type=int, nargs="+", default=list(NEIGHBOURS), metavar="N",
        help="numbers of neighbours (default: 10 20 100 200)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T",
        help="neighbours weigh exp(cosine / T) (default: 0.07)")
    add("--no-probe", dest="probe", action="store_false", help="leave the linear probe out, which takes the longest")
    add("--no-baselines", dest="baselines", action="store_false", help="leave random weights and pixels out")
    add("--validation-share", type=float, default=0.25, metavar="SHARE",
        help="share of the images to test on, where --data-dir has no validation/ (default: 0.25)")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that decode images (default: 4)")
    return parser
# fmt: on


def main(argv: list[str] | None = None) -> int:
    """The command; whatever is wrong is one message and exit status 2."""
    try:
        options = vars(build_parser().parse_args(argv))
        output, overwrite = options.pop("output"), options.pop("overwrite")
        folder = None if output is None else claim_folder(output, FILES, overwrite=overwrite)
        devices = [device.strip() for device in options.pop("device").split(",")]
        found = evaluate_models(**options, devices=devices, progress=True)
        say(table(found))
        if folder is not None:
            with whole_file(folder / FILES[0]) as part:
                part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            save_measures(found, folder / FILES[1])
            say(f"Written: {' and '.join(str(folder / name) for name in FILES)}")
    except (ValueError, RuntimeError, OSError) as e:
        return refused("evaluate", e)
    except KeyboardInterrupt:
        say("Stopped; nothing was written.", error=True)
        return 130
    return 0


def table(found: dict[str, Any]) -> str:
    """The measures of `evaluate_models` as text: percent, with half of the 95 % interval, and the rank."""
    keys = list(found["results"][0]["measures"])
    head = ["model", *(_title(key) for key in keys), "images/s"]
    rows = []
    for result in found["results"]:
        cells = [_cell(key, result["measures"][key]) for key in keys]
        rows.append([result["model"], *cells, f"{result['images_per_second']:.0f}"])
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    what = "mean average precision" if found["data"]["several_labels"] else "accuracy"
    lines.append(
        f"{what} in %, +- half of its 95 % interval (bootstrap over {found['data']['test_images']} test images); "
        f"chance is {100 * found['data']['chance']:.1f}. The rank compares runs of one method only."
    )
    return "\n".join(lines)


def _title(key: str) -> str:
    return f"kNN {key.removeprefix('knn_')}" if key.startswith("knn_") else key


def _cell(key: str, estimate: dict[str, float]) -> str:
    if key == "rank":
        return f"{estimate['value']:.1f}"
    return f"{100 * estimate['value']:.1f} +-{50 * (estimate['high'] - estimate['low']):.1f}"
