"""`timm-convnextv2 export`: a model as ONNX or as a program of torch.export, checked against the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.export import how_made
from ..checkpoint.loading import model_name
from ..checkpoint.program import METADATA, Deployable, Normalized, check_form, write_program
from ..checkpoint.provenance import read_object
from ..checkpoint.task_folder import TASKS, find_folder, is_task
from ..console import count, say
from ..data import Pixels
from ..features.encoder import open_frozen
from ..files import check_free
from ..transfer import Backbone, create_backbone
from ..transfer.detection.detector import open_with_classes
from ..transfer.segmentation.segmenter import open_segmenter
from .base import run
from .options import ExportConfig

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def task_of(name: str) -> str | None:
    """'detection' or 'segmentation' if the folder or repository holds such a model, None for a model of timm."""
    if not name.startswith(("local-dir:", "hf-hub:")):
        return None
    config = read_object(find_folder(name) / "config.json")
    return config["task"] if is_task(config) else None


def open_model(config: ExportConfig) -> Deployable:
    """The model of the options with its normalisation inside, on the CPU."""
    name, outputs = model_name(config.model), config.outputs
    task = task_of(name)
    only = {"detection": "maps", "segmentation": "logits", None: outputs}[task]
    if task and outputs not in (None, only):
        raise ValueError(f"'{config.model}' is a {TASKS[task]}, of which --outputs {only} can be exported only.")
    if task == "segmentation":
        if "size" in config.dynamic:
            raise ValueError("--dynamic size: the pyramid pooling of a segmenter is exported for one --img-size only.")
        model = open_segmenter(name)
        return _deployable(config, model.backbone, model, ("logits",), model.classes)
    if only == "maps":
        body = open_with_classes(name)[0].backbone.body if task else create_backbone(name)
        model = Normalized(body, body.mean, body.std)
        return _deployable(config, body, model, tuple(f"map_{stride}" for stride in body.strides))
    encoder = open_frozen(name, config.img_size, device="cpu", **({"num_classes": 0} if outputs == "features" else {}))
    network: Any = encoder.model
    cfg, info = network.pretrained_cfg, getattr(network, "feature_info", None)
    if outputs == "logits" and not network.num_classes:
        raise ValueError(f"'{config.model}' has no classifier. Finetune it first, or pass --outputs features.")
    if cfg.get("fixed_input_size") and "size" in config.dynamic:
        raise ValueError(f"--dynamic size: '{config.model}' takes images of one size only. Leave it out.")
    kind = "logits" if network.num_classes else "features"
    about = {key: encoder.config[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    about |= {"architecture": cfg.get("architecture"), "license": cfg.get("license"), "pixels": encoder.pixels.record()}
    if kind == "logits" and cfg.get("label_names"):
        about["classes"] = cfg["label_names"]
    stride = info[-1]["reduction"] if info else 1
    model = Normalized(network, encoder.config["mean"], encoder.config["std"])
    return Deployable(model, encoder.config["input_size"], stride, (kind,), _complete(about, model))


def _deployable(
    config: ExportConfig, backbone: Backbone, model: Any, outputs: tuple[str, ...], classes: Sequence[str] = ()
) -> Deployable:
    """A model of `transfer`."""
    size, record = config.img_size or backbone.img_size, backbone.record()
    if size < backbone.strides[-1]:
        raise ValueError(f"--img-size {size} is smaller than the model's stride, {backbone.strides[-1]} pixels.")
    about = {key: record[key] for key in ("architecture", "mean", "std", "pixels", "license")}
    about |= {"classes": [*classes]} if classes else {}
    shape = (backbone.in_chans, size, size)
    return Deployable(model, shape, backbone.strides[-1], outputs, _complete(about, model))


def _complete(about: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    values = "0 to 1 for integers, divided by their largest value unless `pixels` says otherwise; mean and std inside"
    return {"values": values, **about, "made_with": how_made(model.state_dict(), {})["made_with"]}


def export(config: ExportConfig) -> None:
    """Opens, exports, checks and prints."""
    check_form(config.format)
    suffix = _SUFFIXES[config.format]
    path = Path(config.output or f"model{suffix}")
    if path.suffix != suffix:
        raise ValueError(f"--output {path} must end in {suffix} for --format {config.format}.")
    check_free(path, overwrite=config.overwrite)
    what = open_model(config)
    done = write_program(what, path, config.format, batch_size=config.batch_size, dynamic=config.dynamic)
    content, pixels = done.content, str(Pixels.from_record(what.about["pixels"]))
    free = f"; may change: {', '.join(config.dynamic)}" if config.dynamic else ""
    say(f"{path}: {done.size / 2**20:.1f} MiB; difference from the model {done.difference:.1e} of its largest output")
    say(f"input images: float32 {content['input']['shape']}{free}; mean and std are applied inside")
    say(f"  pixels in 0..1 before normalisation{f' ({pixels})' if pixels else ''}; their size is not changed")
    for name, shape in content["outputs"].items():
        say(f"output {name}: float32 {shape}")
    ratio = done.eager / done.exported
    say(
        f"CPU, {count(torch.get_num_threads(), 'thread')}, batch {config.batch_size}: model {1e3 * done.eager:.1f} ms, "
        f"exported {1e3 * done.exported:.1f} ms ({ratio:.2f} times as fast)"
    )
    say(f"The file states this and the class names as JSON: '{METADATA}'.")


def main(argv: Sequence[str] | None = None) -> int:
    return run("export", export, argv)
