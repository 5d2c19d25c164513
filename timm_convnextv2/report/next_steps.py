"""What to do with the model of a run: commands that are ready to paste."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from ..console import interpreter, invocation


class Step(NamedTuple):
    """A command that comes next.

    Attributes:
        why: What it does, as the start of a line that ends in a colon.
        command: For a shell.
    """

    why: str
    command: str


def next_steps(settings: dict[str, Any], folder: Path) -> list[Step]:
    """Loading, finetuning and publishing.

    Args:
        settings: Of the run.
        folder: Of the run; it holds `encoder/`.
    """
    encoder, (chans, height, width) = folder.resolve() / "encoder", settings["input_size"]
    size = f"--img-size {height}" if chans == 3 and height == width else f"--input-size {chans} {height} {width}"
    own_images = settings["data_dir"] or settings.get("data_list") or settings["dataset"] not in ("", "embedded")
    finetune = shlex.join([*invocation("finetune"), "--recipe", "small-data" if own_images else "smoke"])
    publish = shlex.join([*invocation("publish"), str(folder), "USER/NAME"])
    publish += "" if settings["license"] or settings["pretrained"] else " --license ID"
    python = shlex.quote(interpreter())
    load = f"import timm; print(timm.create_model('local-dir:{encoder}', pretrained=True, num_classes=10))"
    return [
        Step("Load it in Python, with timm alone", f'{python} -c "{load}"'),
        Step(
            "Finetune it with timm's train.py and a recipe, on a folder with train/ and validation/",
            f'{finetune} --model "local-dir:{encoder}" {size} --data-dir DATA',
        ),
        Step("See what publishing would send", f"{publish} --dry-run"),
    ]


def next_steps_of_transfer(settings: dict[str, Any], folder: Path) -> list[Step]:
    """Measuring, finding, and publishing, with the detector or segmenter of a run.

    Args:
        settings: Of the run.
        folder: Of the run; it holds `model/`.
    """
    command = {"detection": "detect", "segmentation": "segment"}[settings["task"]]
    model = str(folder.resolve() / "model")
    place = {"detection": "--output found.json", "segmentation": "--output masks"}[settings["task"]]
    evaluate = [*invocation(command), "eval", "--model", model, "--data-dir", str(settings["data_dir"])]
    predict = shlex.join([*invocation(command), "predict", "--model", model])
    publish = shlex.join([*invocation("publish"), str(folder), "USER/NAME"])
    return [
        Step("Measure it again", shlex.join(evaluate)),
        Step("Use it on other images", f"{predict} --images IMAGES {place}"),
        Step("See what publishing would send", f"{publish} --dry-run"),
    ]


def next_commands(settings: dict[str, Any], folder: Path, last_epoch: int) -> str:
    """What to do with the result, ready to paste, and what to look at."""
    *use, publish = (f"{step.why}:\n  {step.command}" for step in next_steps(settings, folder))
    here = folder.resolve()
    files = [here / "report.html", here / "loss.png", here / "reconstructions" / f"epoch-{last_epoch:04d}.png"]
    shown = "".join(f"\n  {path}" for path in files if path.exists())  # a run that had ended draws nothing
    look = [f"Look at the loss and at what it predicts:{shown}"] if shown else []
    return "\n".join([*use, *look, publish])
