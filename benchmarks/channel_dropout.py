"""What `--channel-dropout` is worth on images that lack half of their channels, and what it costs on whole ones.

    python -m benchmarks.channel_dropout --data GLYPHS

GLYPHS is a folder of `python -m benchmarks.glyphs`. Each glyph becomes an image of eight bands, which see it with a
contrast of their own, some inverted, under noise of their own. A small ConvNeXt V2 is pretrained on unlabelled ones,
with and without channel dropout, with the same number of updates, once per seed. Then kNN (k = 20) on frozen features:
all bands; queries without half of the bands (each image lacks others) among images that have all; both without the
same half. Missing bands are zero after normalisation. Writes `benchmarks/results/channel_dropout.csv`.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.finetune_gain import call
from benchmarks.measure import conditions, write_csv
from benchmarks.small_data import BATCH, MODEL
from timm_convnextv2.checkpoint import load_model
from timm_convnextv2.evaluate import features, knn

BANDS = 8
RATES = (0.0, 0.3)


def bands_of(path: Path, number: int) -> np.ndarray:
    """The image of eight bands of a glyph, uint8 `[8, H, W]`; `number` seeds its noise."""
    rng = np.random.default_rng(number)
    glyph = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255 - 0.5
    contrast = np.array([1, -1, 0.7, -0.7, 0.5, -0.5, 0.3, -0.3], dtype=np.float32) * rng.uniform(0.6, 1.4, BANDS)
    x = 0.5 + contrast[:, None, None] * glyph + rng.normal(0, 0.12, (BANDS, *glyph.shape))
    return (x.clip(0, 1) * 255).astype(np.uint8)


def write_bands(source: Path, target: Path) -> Path:
    """A folder of `.npy` files of the images of a folder."""
    target.mkdir(parents=True)
    for number, path in enumerate(sorted(source.glob("*.png"))):
        np.save(target / f"{path.stem}.npy", bands_of(path, number))
    return target


def labelled(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 `[N, 8, H, W]` in [0, 1], and their classes."""
    images, labels = [], []
    for label, place in enumerate(sorted(folder.iterdir())):
        for number, path in enumerate(sorted(place.glob("*.png"))):
            images.append(bands_of(path, 10**6 * (label + 1) + number))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).float() / 255, torch.tensor(labels)


def judge(encoder: Path, train: tuple, test: tuple) -> dict[str, float]:
    """kNN accuracy in % with all bands, with queries that lack half of them, and with the same half missing in both."""
    model = load_model(f"local-dir:{encoder}", num_classes=0).eval()
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    (gallery, labels), (queries, truth) = (((x - mean) / std, y) for x, y in (train, test))
    generator = torch.Generator().manual_seed(0)
    each = torch.rand(len(queries), BANDS, generator=generator).argsort(dim=1) < BANDS // 2
    same = torch.rand(1, BANDS, generator=generator).argsort(dim=1) < BANDS // 2

    def accuracy(gallery: torch.Tensor, queries: torch.Tensor) -> float:
        rows = [features(model, images.split(100)) for images in (gallery, queries)]
        found = knn(rows[0], labels, rows[1], k=20, num_classes=10)
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
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of benchmarks.glyphs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    train, test = (labelled(args.data / "labelled" / split) for split in ("train", "validation"))
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        images = output / "bands"
        if not images.exists():
            write_bands(args.data / "unlabelled", images)
        epochs = max(1, args.updates * BATCH // sum(1 for _ in images.iterdir()))
        rows: list[dict] = []
        for seed in args.seeds:
            for rate in RATES:
                name = f"rate-{rate:g}-{seed}"
                words = ["--data-dir", images, "--in-chans", BANDS, "--epochs", epochs, *MODEL, "--decoder-dim", 128]
                words += ["--batch-size", BATCH, "--lr", 2e-3, "--scale", 0.5, 1, "--hflip", 0, "--workers", 0]
                words += ["--channel-dropout", rate, "--seed", seed, "--checkpoint-interval", epochs]
                words += ["--recon-interval", epochs, "--output", output, "--experiment", name, "--resume", "auto"]
                seconds = call("pretrain.py", words, output / f"{name}.log")
                rows.append(dict(channel_dropout=rate, seed=seed, **judge(output / name / "encoder", train, test)))
                print(rows[-1], f"{seconds:.0f} s", flush=True)
        for rate in RATES:
            own = [row for row in rows if row["channel_dropout"] == rate]
            names = [name for name in own[0] if name not in ("channel_dropout", "seed")]
            middle = {name: statistics.median(row[name] for row in own) for name in names}
            print(f"channel dropout {rate:g}, medians: {middle}")
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = (
            f"glyphs of fonts in {BANDS} bands, 32 px, {epochs} epochs of {BATCH} images an update; kNN in %"
        )
        print(write_csv("channel_dropout", rows, about))


if __name__ == "__main__":
    main()
