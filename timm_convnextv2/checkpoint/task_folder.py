"""The folder of a detector or a segmenter: `config.json`, `model.safetensors`, and its model card, `README.md`.

`config.json` has the arguments that make the model. Licence and origin have the keys of a timm folder,
`pretrained_cfg` and `training` (see `card`), so that publishing treats all folders alike.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCardData, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..hub_errors import HUB_ERRORS, hub_error
from . import card
from .card import HERE, OR_HUB
from .export import how_made, place_folder
from .provenance import MODEL_ARGS, WEIGHTS, check_config, check_training, check_types, is_ours, read_object

Model = TypeVar("Model", bound=nn.Module)

CONFIG = "config.json"
TASKS = {"detection": "detector", "segmentation": "segmenter"}
_COMMANDS = {"detection": "detect", "segmentation": "segment"}

# The metrics that the card states, with their names on the Hub: (key, type, name)
_STATED = {
    "detection": (("box_ap", "mAP", "box AP"), ("mask_ap", "mAP", "mask AP")),
    "segmentation": (
        ("miou", "mean_iou", "mIoU"),
        ("accuracy", "accuracy", "pixel accuracy"),
        ("mean_accuracy", "mean_accuracy", "mean accuracy"),
    ),
}
_CODE = {
    "detection": """import timm_convnextv2

detector = timm_convnextv2.open_detector({name}){or_hub}
found = detector.predict(["IMAGE"])[0]  # boxes in pixels, classes, scores{masks}""",
    "segmentation": """import timm_convnextv2

segmenter = timm_convnextv2.open_segmenter({name}){or_hub}
found = segmenter.predict(["IMAGE"])[0].classes  # [H, W], indices of segmenter.classes""",
}
# the types of the keys that are read here, in the words of `provenance`
_TYPES = {"classes": "a list of strings", "dataset": "a string without a line break"}
_TYPES |= {"metrics pretrained_cfg training": "a table"}
_METRICS = {
    "box_ap mask_ap miou accuracy mean_accuracy": "a number",
    "iou class_ap": "a list of numbers or null, one per class",
}
_BACKBONE = {"architecture license base_model": "a string without a line break", "model_args pixels": "a table"}
_PIPELINES = {"detection": "object-detection", "segmentation": "image-segmentation"}


def is_task(config: dict[str, Any]) -> bool:
    """True if a `config.json` describes a detector or a segmenter."""
    return config.get("task") in (*TASKS,) and isinstance(config.get("backbone"), dict)


def find_folder(name: str | os.PathLike) -> Path:
    """The folder of an exported model: `name` is that folder or its run, or `hf-hub:USER/NAME`, which is downloaded."""
    text = os.fspath(name)
    if text.startswith("hf-hub:"):
        repo, _, revision = text.removeprefix("hf-hub:").partition("@")
        try:
            paths = [hf_hub_download(repo, file, revision=revision or None) for file in (CONFIG, WEIGHTS)]
            return Path(paths[0]).parent
        except HUB_ERRORS as e:
            raise hub_error(e, text.removeprefix("hf-hub:"), "files", "give that folder") from e
    folder = Path(text.removeprefix("local-dir:"))
    return folder / "model" if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file() else folder


def read_task(name: str | os.PathLike, task: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder (see `find_folder`) and `config.json` of a detector or segmenter; ValueError for any other folder."""
    folder = find_folder(name)
    try:
        config = read_object(folder / CONFIG)
        if not is_task(config) or task not in (None, config["task"]):
            raise ValueError(
                f"its {CONFIG} has the task {config.get('task')!r}, expected {task or ' or '.join(TASKS)}."
            )
        return folder, _checked(config, folder)
    except ValueError as e:
        tasks = [task] if task else [*TASKS]
        raise ValueError(
            f"'{os.fspath(name)}' is not a {' or '.join(TASKS[t] for t in tasks)}: {e} Pass the folder of a run of "
            f"`{' train` or `'.join(_COMMANDS[t] for t in tasks)} train` after its first evaluation, or its model/."
        ) from e


def read_folder_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a ConvNeXt V2 in a timm folder, or of a detector or segmenter on any backbone."""
    config = read_object(folder / CONFIG)
    return _checked(config, folder) if is_task(config) else check_config(config, folder / CONFIG)


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config, if the keys that the card and publishing read have the right types."""
    path, own = folder / CONFIG, TASKS[config["task"]]
    needed = f"classes metrics pretrained_cfg training {own}"
    check_types(path, config, _TYPES | {own: "a table"}, "", needed)
    check_types(path, config["metrics"], _METRICS, "metrics.")
    check_types(path, config["pretrained_cfg"], {"license": "a string without a line break"}, "pretrained_cfg.")
    check_types(path, config["backbone"], _BACKBONE, "backbone.", "architecture model_args pixels")
    if is_ours(config["backbone"]["architecture"]):
        check_types(path, config["backbone"]["model_args"], MODEL_ARGS, "backbone.model_args.")
    if config["task"] == "detection":
        check_types(path, config[own], {"boxes_only": "true or false"}, f"{own}.", "boxes_only")
    check_training(path, config)
    if not {"table", "made_with"} <= config["training"].keys():
        raise ValueError(f"'{path}' lacks the section training. Export the model again.")
    check_types(path, config["training"], {"table made_with": "a table"}, "training.", "table made_with")
    return config


def open_task(name: str | os.PathLike, task: str, build: Callable[[dict[str, Any]], Model]) -> tuple[Model, list[str]]:
    """The model that `build` makes from `config.json`, with its weights, in eval mode on the CPU; and its classes."""
    folder, config = read_task(name, task)
    try:
        model = build(config)
    except Exception as e:  # constructors raise anything for arguments of other types
        raise ValueError(f"The {TASKS[task]} in '{name}' cannot be opened ({type(e).__name__}: {e}).") from e
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as e:
        what = " ".join(str(e).split())
        raise ValueError(f"The weights '{folder / WEIGHTS}' cannot be loaded ({type(e).__name__}: {what}).") from e
    return model.eval(), list(config["classes"])


def write_task(
    folder: str | os.PathLike,
    model: nn.Module,
    config: dict[str, Any],
    *,
    metrics: dict[str, Any] | None = None,
    dataset: str | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """Writes the folder of a model; see `place_folder`.

    Args:
        config: `task`, `classes`, `backbone` (a `Backbone.record`), and the task's own arguments.
        metrics: Results on the validation images of `dataset`, kept in `config.json` and stated by the card.
        info: How the model was made, for a table in the card.
    """
    weights, backbone = model.state_dict(), config["backbone"]
    license = backbone["license"]
    training = {"inherited_license": license, "base_model": backbone["base_model"], **how_made(weights, info or {})}
    config = {
        **config,
        "metrics": metrics or {},
        "dataset": dataset,
        "pretrained_cfg": {"license": license} if license else {},
        "training": training | ({"pixels": backbone["pixels"]} if backbone["pixels"] else {}),
    }
    return place_folder(folder, weights, config, _render)


def render_folder_card(config: dict[str, Any], images: Sequence[str] = ()) -> str:
    """The model card of a timm folder, or of a detector or segmenter; see `card.render_card`."""
    return _render(config, images) if is_task(config) else card.render_card(config, images)


def _render(config: dict[str, Any], images: Sequence[str]) -> str:
    task, training, classes = config["task"], config["training"], config["classes"]
    boxes_only = task == "detection" and config["detector"]["boxes_only"]
    kind = "UPerNet" if task == "segmentation" else "Faster R-CNN" if boxes_only else "Mask R-CNN"
    architecture = config["backbone"]["architecture"]
    license, metrics = config["pretrained_cfg"].get("license"), config["metrics"]
    stated = [(kind, title, round(metrics[k], 4)) for k, kind, title in _STATED[task] if metrics.get(k, -1) >= 0]
    found = card.results(_PIPELINES[task], config.get("dataset"), stated, dataset_split="validation")
    data = ModelCardData(
        library_name="timm_convnextv2", pipeline_tag=_PIPELINES[task], license=license,
        base_model=training.get("base_model"), datasets=training.get("datasets") or None,
        tags=[_PIPELINES[task], "convnextv2" if "convnextv2" in architecture else "timm", kind.lower()],
        model_name=f"{kind} on {architecture}" if found else None, eval_results=found or None,
    )  # fmt: skip
    masks = ", masks" if kind == "Mask R-CNN" else ""
    more = f", and {len(classes) - 200} more" if len(classes) > 200 else ""
    named = ", ".join(map(card.escaped, classes[:200])) + more
    parts = [
        f"# {kind} on {card.escaped(architecture)}\n\nA {TASKS[task]} of {len(classes)} classes, "
        f"{'from label 1' if task == 'detection' else 'from index 0'}: {named}. It was trained with `timm_convnextv2` "
        f"{card.escaped(training['made_with'].get('timm_convnextv2'))} and opens with that package alone.",
        f"```python\n{_CODE[task].format(name=HERE, or_hub=OR_HUB, masks=masks)}\n```",
    ]
    if training.get("pixels"):
        by_whom = "`load_image` above and the commands of `timm_convnextv2` do it."
        parts.append(card.pixels_text(training["pixels"], by_whom))
    parts += ["## How it was made", card.table("", training["table"])]
    numbers = {name: f"{v:.4f}" for name, v in metrics.items() if isinstance(v, float) and v >= 0}
    for key, measure in (("iou", "IoU"), ("class_ap", "box AP")):
        if isinstance(metrics.get(key), list) and len(classes) <= 50:
            of_class = zip(classes, metrics[key], strict=True)
            numbers |= {f"{measure} of {name}": f"{v:.4f}" for name, v in of_class if v is not None}
    if numbers:
        where = f"validation images of {config['dataset']}" if config.get("dataset") else "validation images"
        parts += ["## Results", card.table(where, numbers)]
    parts += [*card.images_text(images), "## Licence and provenance", card.licence_text(license, training)]
    return card.with_metadata(data, parts)
