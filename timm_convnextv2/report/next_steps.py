"""Commands to paste for the model of a run."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.provenance import read_object
from ..console import interpreter, invocation
from ..data.formats.pixels import PLAIN, Pixels


class Step(NamedTuple):
    """A next command: its purpose (a line before a colon) and the words for a shell."""

    why: str
    command: str

    def __str__(self) -> str:
        return f"{self.why}:\n  {self.command}"


def publish_preview(folder: Path, model: Path) -> str:
    """The command that previews a publication of a run; asks for a licence if the exported `model` states none."""
    try:
        licensed = read_object(model / "config.json").get("pretrained_cfg", {}).get("license")
    except (ValueError, AttributeError):
        licensed = None
    license = [] if licensed else ["--license", "ID"]
    return shlex.join([*invocation("publish"), str(near(folder)), "USER/NAME", *license, "--dry-run"])


def near(path: Path) -> Path:
    """The path from the working folder if it lies below it, for commands to paste; else as it is."""
    return path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path


def _device(settings: dict[str, Any]) -> list[str]:
    """--device, if the run was not on the default of timm's scripts and of our commands."""
    device = str(settings.get("device") or "cuda")
    return [] if device.startswith("cuda") else ["--device", device]


def next_steps(settings: dict[str, Any], folder: Path) -> list[Step]:
    """Commands to judge, load, finetune and publish the `encoder/` in the folder of a run with these settings."""
    run = str(near(folder))
    encoder, (chans, height, width) = near(folder) / "encoder", settings["input_size"]
    size = f"--img-size {height}" if chans == 3 and height == width else f"--input-size {chans} {height} {width}"
    own_images = settings["data_dir"] or settings.get("data_list") or settings["dataset"] not in ("", "demo")
    recipe = "small-data" if own_images else "smoke"
    finetune = shlex.join([*invocation("finetune"), "--recipe", recipe, *_device(settings)])
    python = shlex.quote(interpreter())
    load = f"import timm; print(timm.create_model('local-dir:{encoder}', pretrained=True, num_classes=10))"
    why = "Load it in Python, with timm alone"
    if Pixels.from_record(settings) != PLAIN:
        why += " (convert stored values as its README says; timm_convnextv2.open_encoder does)"
    return [
        Step(
            "Judge its features on labelled images, beside baselines",
            shlex.join([*invocation("evaluate"), run, "--data-dir", "LABELLED"]),
        ),
        Step(why, f'{python} -c "{load}"'),
        Step(
            "Finetune it with timm's train.py and a recipe, on a folder with train/ and validation/",
            f'{finetune} --model "local-dir:{encoder}" {size} --data-dir DATA',
        ),
        Step(
            "Compute a row of features per image",
            shlex.join([*invocation("embed"), "IMAGES", "--model", run, "--output", "features.npy"]),
        ),
        Step("Preview a publication", publish_preview(folder, encoder)),
    ]


def next_steps_of_finetuning(settings: dict[str, Any], folder: Path) -> list[Step]:
    """Commands to measure and publish the classifier in `model/`."""
    model, data = near(folder) / "model", settings.get("data_dir") or settings.get("data") or "DATA"
    words = ["--model", f"local-dir:{model}", "--data-dir", str(data), *_device(settings)]
    return [
        Step("Evaluate it again", shlex.join([*invocation("validate"), *words])),
        Step("Preview a publication", publish_preview(folder, model)),
    ]


def next_steps_of_transfer(settings: dict[str, Any], folder: Path) -> list[Step]:
    """Commands to evaluate, use and publish the detector or segmenter in `model/`."""
    command = {"detection": "detect", "segmentation": "segment"}[settings["task"]]
    model, device = near(folder) / "model", _device(settings)
    output = {"detection": "--output found.json", "segmentation": "--output masks"}[settings["task"]]
    evaluate = [*invocation(command), "eval", "--model", str(model), "--data-dir", str(settings["data_dir"]), *device]
    predict = shlex.join([*invocation(command), "predict", "--model", str(model), *device])
    return [
        Step("Evaluate it again", shlex.join(evaluate)),
        Step("Use it on other images", f"{predict} --data-dir IMAGES {output}"),
        Step("Preview a publication", publish_preview(folder, model)),
    ]


def next_commands(settings: dict[str, Any], folder: Path, last_epoch: int) -> str:
    """The next commands and the files to look at, as text."""
    *use, publish = map(str, next_steps(settings, folder))
    here = near(folder)
    files = [here / "report.html", here / "loss.png", here / "reconstructions" / f"epoch-{last_epoch:04d}.png"]
    shown = "".join(f"\n  {path}" for path in files if path.exists())  # resuming a run that has ended draws nothing
    images = [f"Look at the loss and the predictions:{shown}"] if shown else []
    return "\n".join([*use, *images, publish])
