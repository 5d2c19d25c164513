"""What `--channel-dropout` is worth on images that lack half of their channels, and what it costs on whole ones.

    python -m benchmarks.channel_dropout

Images are generated, eight bands of 32 x 32 pixels: stripes of five widths and two directions, which are the ten
classes, with a strength in each band that is the class's own, under noise. A small ConvNeXt V2 is pretrained on
unlabelled ones with and without channel dropout, with the same number of updates, once per seed. Then kNN (k = 20) on
frozen features: all bands; queries without half of the bands (each image lacks others) among images that have all; both
without the same half. Missing bands are zero after normalisation. Writes `benchmarks/results/channel_dropout.csv`.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import call, conditions, write_csv
from timm_convnextv2.checkpoint import load_model
from timm_convnextv2.features import extract_features, knn

# a small ConvNeXt V2 on small images: what two CPU cores train in minutes
MODEL = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(16,32,64,128)", "--patch-size", "1", "--img-size", "32"]
BATCH = 32
BANDS, SIZE, CLASSES = 8, 32, 10
RATES = (0.0, 0.3)


def scene(label: int, rng: np.random.Generator) -> np.ndarray:
    """An image of a class, uint8 `[8, 32, 32]`."""
    signature = np.random.default_rng(label).uniform(0.2, 1, BANDS)  # of the class
    width, angle = (2.5, 3.5, 5, 7, 10)[label % 5], np.pi / 2 * (label // 5) + rng.normal(0, 0.25)
    y, x = np.mgrid[:SIZE, :SIZE]
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / width + rng.uniform(0, 2 * np.pi))
    strength = 0.2 * signature * rng.uniform(0.6, 1.4, BANDS)
    image = 0.5 + strength[:, None, None] * stripes + rng.normal(0, 0.2, (BANDS, SIZE, SIZE))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def write_images(target: Path, count: int) -> Path:
    """A folder of `.npy` files without labels."""
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        np.save(target / f"{number:05d}.npy", scene(number % CLASSES, rng))
    return target


def labelled(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 `[N, 8, 32, 32]` in [0, 1], and their classes."""
    rng = np.random.default_rng(seed)
    images = np.stack([scene(number % CLASSES, rng) for number in range(count)])
    return torch.from_numpy(images).float() / 255, torch.arange(count) % CLASSES


def score(encoder: Path, train: tuple, test: tuple) -> dict[str, float]:
    """kNN accuracy in % with all bands, with queries that lack half of them, and with the same half missing in both."""
    model = load_model(f"local-dir:{encoder}", num_classes=0).eval()
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    (gallery, labels), (queries, truth) = (((x - mean) / std, y) for x, y in (train, test))
    generator = torch.Generator().manual_seed(0)
    each = torch.rand(len(queries), BANDS, generator=generator).argsort(dim=1) < BANDS // 2
    same = torch.rand(1, BANDS, generator=generator).argsort(dim=1) < BANDS // 2

    def accuracy(gallery: torch.Tensor, queries: torch.Tensor) -> float:
        rows = [extract_features(model, images.split(100)) for images in (gallery, queries)]
        found = knn(rows[0], labels, rows[1], k=20, num_classes=CLASSES)
        return round(100 * (found == truth).double().mean().item(), 2)

    def without(images: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        return images.masked_fill(gone[:, :, None, None], 0)

    return {
        "all": accuracy(gallery, queries),
        "queries_lack_half": accuracy(gallery, without(queries, each)),
        "both_lack_half": accuracy(without(gallery, same), without(queries, same)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2000, help="images without labels")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    train, test = labelled(1600, seed=1), labelled(1000, seed=2)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        images = output / "bands"
        if not images.exists():
            write_images(images, args.images)
        epochs = max(1, args.updates * BATCH // args.images)
        rows: list[dict] = []
        for seed in args.seeds:
            for rate in RATES:
                name = f"rate-{rate:g}-{seed}"
                words = ["--data-dir", images, "--in-chans", BANDS, "--epochs", epochs, *MODEL, "--decoder-dim", 128]
                words += ["--batch-size", BATCH, "--lr", 2e-3, "--scale", 0.5, 1, "--hflip", 0, "--workers", 0]
                words += ["--channel-dropout", rate, "--seed", seed, "--checkpoint-interval", epochs]
                words += ["--recon-interval", epochs, "--output", output, "--experiment", name, "--resume", "auto"]
                seconds = call("pretrain.py", words, output / f"{name}.log")
                rows.append(dict(channel_dropout=rate, seed=seed, **score(output / name / "encoder", train, test)))
                print(rows[-1], f"{seconds:.0f} s", flush=True)
        for rate in RATES:
            own = [row for row in rows if row["channel_dropout"] == rate]
            names = [name for name in own[0] if name not in ("channel_dropout", "seed")]
            middle = {name: statistics.median(row[name] for row in own) for name in names}
            print(f"channel dropout {rate:g}, medians: {middle}")
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = (
            f"{args.images} generated images of {BANDS} bands, {epochs} epochs, {BATCH} images an update; kNN in %"
        )
        print(write_csv("channel_dropout", rows, about))


if __name__ == "__main__":
    main()
