"""Several models on the same labelled images, compared with baselines that need no model or no training."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import check_limits
from ..console import say
from ..data import Pixels
from ..data.sources.source import Source
from ..files import claim_folder, write_json
from ..runs.device import check_device
from ..runs.progress import ImageProgress
from .config import EvaluateConfig, Extraction, Scoring
from .encoder import Encoder, open_encoder
from .extract import EXTRACTION, SCORING, extract_features, image_batches, pixel_features
from .figures import save_measures
from .labelled import Labelled, open_labelled
from .linear import Estimate, difference, estimate, linear_probe, resampled, ridge
from .neighbours import capped, knn_scores
from .rank import rankme

BASELINE_SIDE = 8  # pixels
FILES = ("evaluation.json", "evaluation.png")


def resampled_features(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, num_classes: int,
    scoring: Scoring = SCORING, device: str | torch.device = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """The measures of `measure_features` except the rank, as values on all test images and on resamples.

    See `resampled`: values of several models on the same images give paired differences.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "seed": scoring.seed}
    near = train.to(device), train_labels, test.to(device), scoring.k, scoring.temperature
    scores = {f"knn_{k}": votes for k, votes in knn_scores(*near, num_classes=num_classes).items()}
    scores["ridge"] = ridge(train, train_labels, test, **options)
    if scoring.probe:
        scores["probe"] = linear_probe(train, train_labels, test, device=device, **options)
    draws: dict[str, Any] = {"draws": scoring.draws, "seed": scoring.seed}
    return {name: resampled(value, test_labels, **draws) for name, value in scores.items()}


def measure_features(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **options: Any
) -> dict[str, Estimate]:
    """kNN, ridge, linear probe and rank of frozen features; `resampled_features` has the options.

    Features are `[N, D]`, labels int64 `[N]`, or 0 and 1 `[N, num_classes]` if images have several. kNN and the probe
    run on `device`. Returns `knn_10`, ... (`k` capped at N), `ridge`, `probe` and `rank`: accuracy 0 to 1, or mean
    average precision if images have several labels, and the `rankme` of the test features.
    """
    values, rank = resampled_features(train, train_labels, test, test_labels, **options), rankme(test)
    return {**{name: estimate(value) for name, value in values.items()}, "rank": Estimate(rank, rank, rank)}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The results of `evaluate_models`, which also go to the folder --output if there is one."""
    folder = None if config.output is None else claim_folder(config.output, FILES, overwrite=config.overwrite)
    found = evaluate_models(
        config.models, config.data_dir, config.extraction, config.scoring, baselines=config.baselines,
        validation_share=config.validation_share, progress=True,
    )  # fmt: skip
    if folder is not None:
        write_json(folder / FILES[0], found, indent=2)
        save_measures(found, folder / FILES[1])
    return found


def evaluate_models(
    models: Sequence[str], data_dir: str | os.PathLike, extraction: Extraction = EXTRACTION,
    scoring: Scoring = SCORING, *, baselines: bool = True, validation_share: float = 0.25, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measures the frozen features of each model, see `open_encoder`, on the same images, see `open_labelled`.

    `baselines` adds images averaged to 8 x 8 pixels, and the first model's architecture with random weights. Returns
    JSON values: `data`, `settings` and `results`, a list with `model`, `measures` (by name, `value`, `low` and `high`,
    see `measure_features`), `against` (paired differences to the baselines), `images_per_second` and `preprocessing`.
    """
    if not models:
        raise ValueError("There are no models to evaluate.")
    check_limits(extraction)
    note = partial(say, error=True) if progress else lambda line: None
    for device in extraction.devices:
        check_device(device)
    capped(scoring.k, 1)  # refuses k < 1 before any work

    @cache
    def labelled(in_chans: int, pixels: Pixels) -> Labelled:
        how: dict[str, Any] = {"validation_share": validation_share, "seed": scoring.seed}
        return open_labelled(data_dir, in_chans=in_chans, pixels=pixels, **how)

    encoders = [open_encoder(name, extraction.img_size, extraction.nodata, "cpu") for name in models]
    first = [labelled(encoder.in_chans, encoder.pixels) for encoder in encoders][0]
    for line in first.describe(data_dir):
        note(line)
    k = capped(scoring.k, len(first.train.labels))
    if max(scoring.k) > k[-1]:
        note(f"kNN: at most {k[-1]} neighbours, as many as there are training images (asked for {max(scoring.k)})")

    values: dict[str, dict[str, Tensor]] = {}  # resampled measures by model

    def result(name: str, encoder: Encoder, network: nn.Module | None) -> dict[str, Any]:
        data = labelled(encoder.in_chans, encoder.pixels)
        total = len(data.train.labels) + len(data.test.labels)
        note(f"{name}: features of {total} images")
        bar, start = ImageProgress(total, enabled=progress), time.perf_counter()

        def rows(source: Source) -> Tensor:
            batches = image_batches(source, encoder.transform, extraction.batch_size, extraction.workers)
            if network is None:
                return pixel_features(_counted(batches, bar.update), BASELINE_SIDE)
            where = extraction.devices
            return extract_features(network, batches, devices=where, amp=extraction.amp, progress=bar.update)

        try:
            train, test = rows(data.train.source), rows(data.test.source)
        finally:
            bar.close()
        rate = total / (time.perf_counter() - start)
        how: dict[str, Any] = {"num_classes": len(data.classes), "scoring": scoring, "device": extraction.devices[0]}
        try:
            values[name] = resampled_features(train, data.train.labels, test, data.test.labels, **how)
            rank = rankme(test)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        found = {key: estimate(value) for key, value in values[name].items()} | {"rank": Estimate(rank, rank, rank)}
        return {
            "model": name, "measures": {key: value._asdict() for key, value in found.items()},
            "features": train.shape[1], "images_per_second": round(rate, 1),
            "preprocessing": {**encoder.settings, "pixels": encoder.pixels.record()}
        }  # fmt: skip

    results: list[dict[str, Any]] = []
    if baselines:
        base = encoders[0]
        architecture = getattr(base.model, "pretrained_cfg", {}).get("architecture", type(base.model).__name__)
        results.append(result(f"{BASELINE_SIDE}x{BASELINE_SIDE} pixels", base, None))
        results.append(result(f"{architecture}, random weights", base, base.with_random_weights(scoring.seed)))
    plain = list(values)  # baselines
    results += [result(name, encoder, encoder.model) for name, encoder in zip(models, encoders, strict=True)]
    for one in results[len(plain) :]:
        own = values[one["model"]]
        one["against"] = {base: {key: difference(own[key], of) for key, of in values[base].items()} for base in plain}
    found = {
        "place": os.fspath(data_dir), "classes": first.classes, "train_images": len(first.train.labels),
        "test_images": len(first.test.labels), "several_labels": first.several, "chance": first.chance,
    }  # fmt: skip
    settings = asdict(scoring) | {"k": k, "device": extraction.devices[0], "amp": extraction.amp}
    settings["validation_share"] = validation_share
    return {"data": found, "settings": settings, "results": results}


def _counted(batches: Iterable[Tensor], progress: Callable[[int], Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        progress(len(batch))
