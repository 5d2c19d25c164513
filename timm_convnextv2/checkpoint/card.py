"""The model card, made from a timm folder's `config.json` alone, so that publishing can write it again.

Values for which timm's format has no field are in the section `training` of `config.json`:

    made_with           versions
    table               rows of the table 'How it was made'
    base_model          Hub id of the model that training started from, or null
    datasets            Hub ids of data sets, for links
    metrics             {"top1": 81.2, "top5": ..., "dataset": name, "split": name}, or null
    inherited_license   the licence of the weights that training started from, or null
    pixels              how stored values become pixels, before mean and std, see `data.Pixels`; null by default
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import Pixels
from ..version import __version__
from .provenance import is_ours, training_of

# Images beside a card, and their captions.
IMAGES = {
    "loss.png": "Training loss and learning rate",
    "reconstructions.png": "Original, masked input, prediction, prediction with the visible patches",
    "predictions.png": "Validation images: ground truth and predictions",
}
HERE, OR_HUB = '"local-dir:path/to/this/folder"', '  # or "hf-hub:user/name"'

_CODE = {
    "encoder": """import timm
model = timm.create_model({name}, pretrained=True, num_classes=10){or_hub}
config = timm.data.resolve_model_data_config(model)  # image size, mean and std of the pretraining""",
    "classifier": """import timm
model = timm.create_model({name}, pretrained=True).eval(){or_hub}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for PIL images""",
    "fcmae": """import timm, timm_convnextv2
model = timm.create_model({name}, pretrained=True){or_hub}
loss, pred, mask = model(images)  # images [B, {in_chans}, H, W]; draws a mask""",
}
_TEXT = {
    "encoder": """# {architecture}, pretrained with FCMAE

ConvNeXt V2 encoder without classifier, pretrained by [FCMAE](https://arxiv.org/abs/2301.00808) with
`timm_convnextv2` {version}. It is an ordinary [timm](https://github.com/huggingface/pytorch-image-models) model: to
use it, nothing but timm is needed.""",
    "classifier": """# {architecture}, {num_classes} classes

ConvNeXt V2 classifier, finetuned with timm's `train.py` and exported by `timm_convnextv2` {version}. It is an ordinary
[timm](https://github.com/huggingface/pytorch-image-models) model: to use it, nothing but timm is needed.""",
    "fcmae": """# {architecture}: encoder and decoder

A whole [FCMAE](https://arxiv.org/abs/2301.00808), encoder and decoder, to continue the pretraining where it stopped.
It was made with `timm_convnextv2` {version} and needs that package.""",
}
_FEATURES = "`num_classes=0` gives features `[B, {num_features}]`, `features_only=True` the maps of the four stages."
_PIXELS = """`timm_convnextv2` does this itself in finetuning, validation, prediction, embedding, evaluation, detection
and segmentation; with timm alone, do the same to your images."""
_USE = {
    "encoder": _FEATURES,
    "classifier": _FEATURES,
    "fcmae": "`timm-convnextv2 pretrain --model {bare} --pretrained` continues the pretraining; `model.encoder`\n"
    "is the backbone.",
}


def licence_text(license: str | None, training: dict[str, Any]) -> str:
    """The card's sentence about the licence."""
    if license is None:
        return "Not stated: ask the author of the weights."
    if training.get("inherited_license"):
        base = training.get("base_model")
        source = f"[{escaped(base)}](https://huggingface.co/{quote(base)})" if base else "earlier weights"
        return f"{escaped(license)}. Training started from {source} under this licence, which still applies."
    return f"{escaped(license)}, as stated by the author of the weights."


def pixels_text(record: dict[str, Any], by_whom: str) -> str:
    """The card's sentences about a record of pixels."""
    return f"Before mean and standard deviation, stored values are prepared: {Pixels.from_record(record)}. {by_whom}"


def escaped(text: object) -> str:
    """A user's text as Markdown shows it: one line, no HTML, links, code or cells of a table."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("://", "&#58;//")
    return re.sub(r"([\\`|\[\]])", r"\\\1", line)


def table(head: str, values: dict[str, Any]) -> str:
    """A Markdown table of two columns."""
    rows = [(head, ""), ("---", "---"), *values.items()]
    return "\n".join(f"| {escaped(name)} | {escaped(value)} |" for name, value in rows)


def images_in(folder: Path) -> list[str]:
    """The names of a card's images that are in a folder."""
    return [name for name in IMAGES if (folder / name).is_file()]


def images_text(images: Sequence[str]) -> list[str]:
    """The card's paragraphs with images."""
    return [f"![{IMAGES[name]}]({name})\n\n*{IMAGES[name]}.*" for name in IMAGES if name in images]


def with_metadata(data: ModelCardData, parts: Sequence[str]) -> str:
    """A card: metadata at its head, then paragraphs."""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"))


def results(
    task: str, dataset: str | None, measured: Sequence[tuple[str, str, float]], **more: Any
) -> list[EvalResult]:
    """The results that the Hub shows beside the card; `measured` holds id, name and value of each metric."""
    name = dataset or "unnamed data set"
    # the id of a data set that is not on the Hub
    more["dataset_type"] = more.get("dataset_type") or "".join(c if c.isalnum() else "-" for c in name.lower())
    return [
        EvalResult(task_type=task, dataset_name=name, metric_type=kind, metric_name=title, metric_value=value, **more)
        for kind, title, value in measured
    ]


def render_card(config: dict[str, Any], images: Sequence[str] = ()) -> str:
    """The README.md of a timm folder with this `config.json`; `images` are names from `IMAGES` of files beside it."""
    architecture, training, cfg = config.get("architecture"), training_of(config), config.get("pretrained_cfg", {})
    if not is_ours(architecture):
        raise ValueError(f"No card for the architecture {architecture!r}: not a ConvNeXt V2.")
    num_classes = config.get("num_classes", cfg.get("num_classes"))
    kind = "fcmae" if str(architecture).startswith("fcmae_") else "classifier" if num_classes else "encoder"
    license, metrics = cfg.get("license"), training.get("metrics") or {}
    task = "image-classification" if kind == "classifier" else "image-feature-extraction"
    stated = [("accuracy", f"Top-{k} accuracy (%)", v) for k in (1, 5) if (v := metrics.get(f"top{k}")) is not None]
    where = {"dataset_type": metrics.get("dataset_id"), "dataset_split": metrics.get("split")}
    found = results("image-classification", metrics.get("dataset"), stated, **where)
    data = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        license=license,
        base_model=training.get("base_model"),
        datasets=training.get("datasets") or None,
        tags=["timm", task, "convnextv2"] + (["fcmae", "self-supervised-learning"] if kind != "classifier" else []),
        metrics=["accuracy"] if found else None,
        model_name=architecture if found else None,
        eval_results=found or None,
    )
    fields = dict(
        architecture=architecture, version=escaped(training.get("made_with", {}).get("timm_convnextv2", __version__)),
        num_features=config.get("num_features"), num_classes=config.get("num_classes"),
        in_chans=cfg.get("input_size", (3,))[0], name=HERE, or_hub=OR_HUB, bare=HERE.strip('"'),
    )  # fmt: skip
    parts = [_TEXT[kind], f"```python\n{_CODE[kind]}\n```", _USE[kind]]
    parts = [part.format(**fields) for part in parts]
    if training.get("pixels"):
        parts.append(pixels_text(training["pixels"], _PIXELS))
    if training.get("table"):
        parts += ["## How it was made", table("", training["table"])]
    if found:
        where = f"{metrics.get('dataset')}, {metrics['split']}" if metrics.get("split") else metrics.get("dataset")
        parts += ["## Results", table(str(where), {str(r.metric_name): r.metric_value for r in found})]
    parts += images_text(images)
    parts += ["## Licence and provenance", licence_text(license, training)]
    if cfg.get("origin_url"):
        parts += [f"Code behind the published weights: <{quote(cfg['origin_url'], safe=':/')}>"]
    return with_metadata(data, parts)


def card_for_repo(card: str, repo_id: str, revision: str | None = None) -> str:
    """A card whose code loads the model from the Hub instead of from a folder."""
    name = f"hf-hub:{repo_id}" + (f"@{revision}" if revision not in (None, "main") else "")
    return card.replace(OR_HUB, "").replace(HERE.strip('"'), name)
