"""Several models on the same labelled images, beside what needs no model and what needs no training."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import model_pixels
from ..console import say
from ..data import Pixels
from ..data.samples.batches import preprocessing
from ..runs.device import check_device
from ..runs.progress import ImageProgress
from .extract import extract_features, image_batches, pixel_features
from .knn import NEIGHBOURS, TEMPERATURE, capped, knn_scores
from .labelled import Labelled, open_labelled
from .linear import Estimate, bootstrap, linear_probe, ridge
from .network import load_network, name_of_model, random_network
from .rank import rankme


def measure_features(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    probe: bool = True,
    seed: int = 0,
    draws: int = 1000,
    device: str | torch.device = "cpu",
) -> dict[str, Estimate]:
    """kNN, ridge, linear probe and rank of frozen features.

    Args:
        train: Features `[N, D]`.
        train_labels: int64 `[N]`, or 0 and 1 `[N, num_classes]` where an image has several labels.
        test: Features `[M, D]`.
        test_labels: Likewise.
        num_classes: Number of classes.
        k: Numbers of neighbours, capped at N.
        temperature: See `knn_scores`.
        probe: Train the linear probe too, which takes the longest.
        seed: Of all that is drawn.
        draws: Of the bootstrap.
        device: Where neighbours are looked for and the probe is trained.

    Returns:
        By name, in this order: `knn_10`, `knn_20`, ... (`k` as capped), `ridge`, `probe`, `rank`. Accuracy 0 to 1, or
        mean average precision where images have several labels; `rank` is that of the test features, see `rankme`.

    Raises:
        ValueError: Features with NaN or infinity, shapes that do not fit, or a single class.
    """
    near = knn_scores(
        train.to(device), train_labels, test.to(device), k, temperature, num_classes=num_classes
    )  # fmt: skip
    scores = {f"knn_{count}": share for count, share in near.items()}
    scores["ridge"] = ridge(train, train_labels, test, num_classes=num_classes, seed=seed)
    if probe:
        scores["probe"] = linear_probe(train, train_labels, test, num_classes=num_classes, seed=seed, device=device)
    found = {name: bootstrap(value, test_labels, draws=draws, seed=seed) for name, value in scores.items()}
    rank = rankme(test)
    return {**found, "rank": Estimate(rank, rank, rank)}


PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


PIXELS = 8


def evaluate_models(
    models: Sequence[str],
    data_dir: str | os.PathLike,
    *,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    probe: bool = True,
    baselines: bool = True,
    validation_share: float = 0.25,
    seed: int = 0,
    draws: int = 1000,
    img_size: int | None = None,
    nodata: float | None = None,
    batch_size: int = 64,
    workers: int = 0,
    devices: Sequence[str] = ("cpu",),
    amp: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Frozen features of each model, judged on the same images.

    Args:
        models: Of timm, `local-dir:FOLDER`, `hf-hub:USER/NAME`, or the folder of a run.
        data_dir: Labelled images, see `open_labelled`.
        k: Numbers of neighbours, capped at the number of training images.
        temperature: See `knn_scores`.
        probe: Train the linear probe too.
        baselines: Add images shrunk to 8 x 8 pixels, and the first model's architecture with random weights.
        validation_share: See `open_labelled`.
        seed: Of all that is drawn.
        draws: Of the bootstrap.
        img_size: Side of the square crops in pixels; each model's own if None.
        nodata: See `timm_convnextv2.data.load_image`; that of each model's own images if None.
        batch_size: Images at a time.
        workers: Processes that decode; 0: this one.
        devices: Batches go to these in turn.
        amp: Compute features in bfloat16.
        progress: Tell on stderr what is done, with images/s.

    Returns:
        What can be written as JSON: `data`, `settings` and `results`, a list with `model`, `measures` (by name,
        `value`, `low` and `high`, see `measure_features`), `images_per_second` and `preprocessing`.

    Raises:
        ValueError: A model, the images, a device or a number cannot be used; before features are computed, where it can
            be known.
    """
    if not models:
        raise ValueError("There are no models to evaluate.")
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size is at least 1 and workers at least 0, got {batch_size} and {workers}.")
    tell = partial(say, error=True) if progress else lambda line: None
    check_devices(devices)
    names = [name_of_model(name) for name in models]
    capped(k, 1)  # complains of numbers that are none

    @cache
    def labelled(in_chans: int, scale: Pixels) -> Labelled:
        return open_labelled(
            data_dir, in_chans=in_chans, validation_share=validation_share, seed=seed, pixels=scale
        )  # fmt: skip

    networks = [load_network(name, img_size, "cpu") for name in names]
    scales = [
        model_pixels(name, config["input_size"][0], nodata) for name, (_, config) in zip(names, networks, strict=True)
    ]
    data = [labelled(config["input_size"][0], scale) for (_, config), scale in zip(networks, scales, strict=True)]
    first = data[0]
    tell(describe(first, data_dir))
    ks = capped(k, len(first.train.labels))
    if max(k) > ks[-1]:
        tell(f"kNN: at most {ks[-1]} neighbours, as many as there are training images (asked for {max(k)})")
    measure = {"num_classes": len(first.classes), "k": ks, "temperature": temperature, "probe": probe}
    measure |= {"seed": seed, "draws": draws, "device": devices[0]}

    results: list[dict[str, Any]] = []

    def add(name: str, network: nn.Module | None, config: dict[str, Any], scale: Pixels) -> None:
        data, transform = labelled(config["input_size"][0], scale), preprocessing(config)
        total = len(data.train.labels) + len(data.test.labels)
        tell(f"{name}: features of {total} images")
        bar, start = ImageProgress(total, enabled=progress), time.perf_counter()

        def rows(source: Any) -> Tensor:
            batches = image_batches(source, transform, batch_size, workers)
            if network is None:
                return pixel_features(_counted(batches, bar.update), PIXELS)
            return extract_features(network, batches, devices=devices, amp=amp, progress=bar.update)

        try:
            train, test = rows(data.train.source), rows(data.test.source)
        finally:
            bar.close()
        rate = total / (time.perf_counter() - start)
        try:
            found = measure_features(train, data.train.labels, test, data.test.labels, **measure)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        results.append(
            {
                "model": name,
                "measures": {key: value._asdict() for key, value in found.items()},
                "features": train.shape[1],
                "images_per_second": round(rate, 1),
                "preprocessing": {**{key: config[key] for key in PREPROCESSING}, "pixels": scale.record()},
            }
        )

    network, config = networks[0]
    if baselines:
        add(f"{PIXELS}x{PIXELS} pixels", None, config, scales[0])
        architecture = getattr(network, "pretrained_cfg", {}).get("architecture", type(network).__name__)
        add(f"{architecture}, random weights", random_network(names[0], seed), config, scales[0])
    for name, (network, config), scale in zip(models, networks, scales, strict=True):
        add(name, network, config, scale)
    return {
        "data": {
            "place": os.fspath(data_dir),
            "classes": first.classes,
            "train_images": len(first.train.labels),
            "test_images": len(first.test.labels),
            "several_labels": first.several,
            "chance": first.chance,
        },
        "settings": {
            **{key: value for key, value in measure.items() if key != "num_classes"},
            "validation_share": validation_share,
            "amp": amp,
        },
        "results": results,
    }


def check_devices(devices: Sequence[str]) -> None:
    """Refuses devices that cannot be used.

    Raises:
        ValueError: One cannot, or there is none.
    """
    if not devices:
        raise ValueError("There is no device to compute on.")
    for device in devices:
        check_device(device)


def describe(data: Labelled, place: str | os.PathLike) -> str:
    """One line on labelled images."""
    kind = "labels, several an image" if data.several else "classes"
    return (
        f"{os.fspath(place)}: {len(data.train.labels)} images to train on and {len(data.test.labels)} to test on, "
        f"{len(data.classes)} {kind}; chance is {100 * data.chance:.1f} %"
    )


def _counted(batches: Iterable[Tensor], progress: Callable[[int], Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        progress(len(batch))
