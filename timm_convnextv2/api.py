"""What the commands do, as functions that return their results: `timm_convnextv2.pretrain`, `open_encoder`, ...

Keyword arguments are the options of the command of the same name, `--batch-size 16` as `batch_size=16`, converted and
checked as on the command line: a mistake is a `ValueError` with the text that the command prints.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, overload

from .commands import compare as comparison
from .config import build, from_keywords, read_yaml, words_of
from .console import invocation
from .features.channels import BlockCollapse
from .features.collapse_models import measure_collapse
from .features.config import CollapseConfig, CompareConfig, EvaluateConfig
from .features.encoder import Encoder, open_encoder
from .features.evaluate import evaluate as evaluate_config
from .pretraining.config import PretrainConfig
from .pretraining.resolve import configure
from .pretraining.setup import set_up
from .report.run import read_run
from .runs.device import fit_amp
from .runs.end import call_run
from .transfer.predict import Detector, PixelClassifier
from .transfer.predict import open_for_objects as open_detector
from .transfer.predict import open_for_pixels as open_segmenter

__all__ = [
    "Detector", "Encoder", "PixelClassifier", "Run", "collapse", "compare", "evaluate", "open_detector", "open_encoder",
    "open_run", "open_segmenter", "pretrain",
]  # fmt: skip

Place = str | os.PathLike
Places = Place | Sequence[Place]


@dataclass(frozen=True)
class Run:
    """The folder of a run of any task; `open_encoder`, `evaluate` and others take it as a model."""

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @cached_property
    def encoder(self) -> Encoder:
        """The exported encoder, see `open_encoder`."""
        return open_encoder(self.folder)

    @property
    def report(self) -> Path:
        """The page of the run, to open in a browser."""
        return self.folder / "report.html"

    @property
    def settings(self) -> dict[str, Any]:
        """All options of the run, also those that were not given."""
        return read_run(self.folder).settings

    @property
    def summary(self) -> list[dict[str, float]]:
        """The numbers of each epoch: `train_loss`, `lr`, `eval_knn`, ...; without those that were not measured."""
        return [row | {"epoch": epoch + 1} for epoch, row in read_run(self.folder).rows.items()]


def open_run(folder: Place) -> Run:
    """Opens the folder of a run; a `ValueError` if it is none."""
    return Run(read_run(Path(folder)).path)


@overload
def pretrain(images: Places = (), *, dry_run: Literal[True], **options: Any) -> None: ...
@overload
def pretrain(images: Places = (), *, dry_run: Literal[False] = False, **options: Any) -> Run: ...
def pretrain(images: Places = (), *, dry_run: bool = False, **options: Any) -> Run | None:
    """Pretrains on unlabelled images; returns the run in OUTPUT/EXPERIMENT.

        run = timm_convnextv2.pretrain("images", model="atto", epochs=100, batch_size=16, output="runs")
        run.encoder.embed("images")

    Args:
        images: Folders, .tar files or patterns; none: the demo data set, unless `dataset` or `data_list` names another.
        dry_run: Print settings, images and memory; train nothing and return None.
        options: Those of `timm-convnextv2 pretrain`, and `config`, a YAML file that sets any of them.
    """
    if options.get("replay"):
        raise ValueError("To repeat an update of a run, use the command: timm-convnextv2 pretrain --replay FILE.")
    file = options.pop("config", None)
    below = {} if file is None else read_yaml(PretrainConfig, file)
    given = _keywords(PretrainConfig, options, data_dir=images or None, dry_run=dry_run or None)
    config, start = configure(given, below)
    words = words_of(PretrainConfig, given) + ([] if file is None else ["--config", str(file)])
    command = shlex.join([*invocation("pretrain", distributed=True), *words])
    run = call_run("pretrain", config.compute.device, partial(set_up, config, start, command=command))
    return None if run is None else Run(run.folder.path)


def evaluate(models: Places | Run, data_dir: Place, **options: Any) -> dict[str, Any]:
    """Compares frozen features on labelled images, see `features.evaluate_models`; options are those of `evaluate`.

        found = timm_convnextv2.evaluate([run, "convnextv2_atto.fcmae"], "labelled")
        {result["model"]: result["measures"]["knn_10"]["value"] for result in found["results"]}

    Models are runs, `local-dir:FOLDER`, `hf-hub:USER/NAME` or names of timm.
    """
    given = _keywords(EvaluateConfig, options, models=models, data_dir=data_dir)
    return evaluate_config(fit_amp(build(EvaluateConfig, given), given))


def collapse(models: Places | Run, data_dir: Place | None = None, **options: Any) -> dict[str, list[BlockCollapse]]:
    """Measures how similar the channels of each block of ConvNeXt V1 and V2 are, by model; options of `collapse`.

    Nothing is written unless `output` is given.
    """
    given = _keywords(CollapseConfig, {"output": "", **options}, models=models, data_dir=data_dir)
    return measure_collapse(fit_amp(build(CollapseConfig, given), given))


def compare(data_dir: Place, *, finetune: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Finetunes from random weights, from your `encoder` and from others (`also`); options of `compare`.

    `finetune` are more words for `timm-convnextv2 finetune`, such as ["--batch-size", "32"]. Returns the content of
    compare.json in `output`; {} with `dry_run`. A `RuntimeError` has the last lines of a finetuning that failed.
    """
    config = build(CompareConfig, _keywords(CompareConfig, options, data_dir=data_dir))
    try:
        comparison.start(config, list(finetune))
    except subprocess.CalledProcessError as e:
        raise RuntimeError(comparison.failure(e)) from e
    return {} if config.dry_run else json.loads((Path(config.output) / "compare.json").read_text(encoding="utf-8"))


def _keywords(cls: type, options: dict[str, Any], **named: Any) -> dict[str, Any]:
    """Values of a config class from `options` and `named`, whose paths become text."""
    plain = {name: _as_text(value) for name, value in (named | options).items()}
    return from_keywords(cls, plain)


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_as_text(one) for one in value] if isinstance(value, list | tuple) else value
