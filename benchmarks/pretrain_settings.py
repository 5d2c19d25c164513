"""What small images need in pretraining: each setting alone against the same base, on a set of `benchmarks.images`.

    python -m benchmarks.pretrain_settings --data CLIPART-64 --output RUNS

Pretrains a small ConvNeXt V2 on the training images and measures kNN and ridge on frozen features, from three quarters
of the labelled training images to the rest: the validation images stay unseen. Writes
`benchmarks/results/pretrain_settings.csv`, one row per run. `--output` keeps the runs, and they are not repeated.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import call, conditions, write_csv
from timm_convnextv2 import open_encoder
from timm_convnextv2.features import measure_features, open_labelled
from timm_convnextv2.features.config import Scoring
from timm_convnextv2.features.extract import EPS, extract_many, image_batches, statistics_of_maps
from timm_convnextv2.files import read_rows

BASE = {
    "--model": "atto",
    "--model-kwargs": "depths=[1,1,3,1] dims=[24,48,96,192]",
    "--patch-size": "1",
    "--img-size": "32",
    "--scale": "0.6 1",
    "--batch-size": "64",
    "--lr": "1.5e-3",
    "--workers": "0",
    "--device": "cpu",
}
SETTINGS: dict[str, dict[str, str]] = {
    "base": {},
    "lr 4e-3": {"--lr": "4e-3"},
    "lr 3e-4": {"--lr": "3e-4"},
    "scale 0.2 to 1": {"--scale": "0.2 1"},
    "scale 0.35 to 1": {"--scale": "0.35 1"},
    "mask ratio 0.4": {"--mask-ratio": "0.4"},
    "mask ratio 0.75": {"--mask-ratio": "0.75"},
    "decoder of 128 channels": {"--decoder-dim": "128"},
    "decoder of two blocks": {"--decoder-depth": "2"},
    "targets not normalised": {"--no-norm-pix-loss": ""},
    "moving average": {"--model-ema": ""},
    "standardize channel": {"--standardize": "channel"},
    "standardize image": {"--standardize": "image"},
    "half the batch, twice the updates": {"--batch-size": "32"},
    "48 px": {"--img-size": "48"},
    "64 px": {"--img-size": "64"},
    "64 px, patches of 2": {"--img-size": "64", "--patch-size": "2"},
    "atto": {"--model-kwargs": "depths=[2,2,6,2] dims=[40,80,160,320]"},
}


SHORTCUTS = ("random", "pixels", "histogram", "border")


def words(settings: dict[str, str]) -> list[str]:
    """The options of a command line."""
    return [word for name, value in settings.items() for word in (name, *value.split())]


def measured(run: Path, epochs: int) -> dict[str, float] | None:
    """What a run of so many epochs has measured at its end, and its baselines; None before that."""
    rows = read_rows(run / "summary.csv")[0]
    if len(rows) < epochs:
        return None
    found = {name: float(str(rows[-1][name])) for name in ("train_loss", "eval_knn", "eval_ridge", "eval_rank")}
    found["minutes"] = round(sum(float(str(row["train_seconds"])) for row in rows) / 60, 1)
    baselines = json.loads((run / "probe.json").read_text())["baselines"]
    return found | {f"{start}_{name}": baselines[start][name] for start in SHORTCUTS for name in ("knn", "ridge")}


def mean_of_stage_3(network: Any, images: Tensor) -> Tensor:
    row = network.forward_intermediates(images, intermediates_only=True)[2].float().mean((2, 3))
    return F.layer_norm(row, row.shape[1:], eps=EPS)


READ = {"features of stage 3": mean_of_stage_3, "features of all stages": statistics_of_maps}


def read_otherwise(run: Path, images: Path, seed: int, rows_of: Callable[[Any, Tensor], Tensor]) -> dict[str, float]:
    """kNN and ridge as the probe of a run has them, on other rows of features; of random weights, too."""
    encoder, found = open_encoder(run, device="cpu"), {}
    labelled = open_labelled(str(images), in_chans=encoder.in_chans, seed=seed)
    models = [encoder.model, encoder.with_random_weights(seed)]
    train, test = (
        extract_many(models, image_batches(part.source, encoder.transform), rows_of=rows_of)
        for part in (labelled.train, labelled.test)
    )
    for start, *rows in zip(("eval", "random"), train, test, strict=True):
        values = measure_features(
            rows[0], labelled.train.labels, rows[1], labelled.test.labels, num_classes=len(labelled.classes),
            scoring=Scoring(k=(20,), probe=False),
        )  # fmt: skip
        found |= {f"{start}_knn": values["knn_20"].value, f"{start}_ridge": values["ridge"].value}
    return {name: round(100 * value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a set of benchmarks.images")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="keep the runs there")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    about = conditions(torch.device("cpu"), args.threads)
    about["base"] = " ".join(words(BASE))
    args.output.mkdir(parents=True, exist_ok=True)
    images = args.data / "train"
    rows: list[dict] = []
    for name in args.settings:
        for seed in args.seeds:
            run = args.output / f"{name.replace(' ', '-').replace(',', '')}-seed-{seed}"
            fixed = ["--data-dir", images, "--probe-dir", images, "--probe-interval", args.epochs]
            fixed += ["--epochs", args.epochs, "--seed", seed, "--recon-interval", args.epochs]
            place = ["--output", args.output, "--experiment", run.name, "--resume", "auto"]
            if measured(run, args.epochs) is None:
                call("pretrain.py", [*words(BASE | SETTINGS[name]), *fixed, *place], run.with_suffix(".log"))
            rows.append(dict(setting=name, seed=seed) | (measured(run, args.epochs) or {}))
            print(rows[-1], flush=True)
            if name == "base":
                for read, rows_of in READ.items():
                    of_read = read_otherwise(run, images, seed, rows_of)
                    rows.append(dict(setting=f"base, {read}", seed=seed) | of_read)
            path = write_csv("pretrain_settings", rows, about)
    print(path)


if __name__ == "__main__":
    main()
