"""The paper's figure 4 on a desk: how alike the channels of each block are, after FCMAE on V1 and V2 and after labels.

    python -m benchmarks.collapse_curve --timm-train path/to/timm/train.py --data GLYPHS

GLYPHS is a folder of `python -m benchmarks.glyphs`. For each seed, a ConvNeXt of 12 blocks is trained with the same
number of updates on the same images: with FCMAE and GRN (V2), with FCMAE and without GRN (V1, layer scale), and with
labels (V2, timm's train.py). Then `evaluate.collapse` looks at validation images. Writes the distances with their
conditions to `benchmarks/results/collapse_curve.csv` and a figure to `docs/`.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from benchmarks.measure import call, conditions, write_csv
from benchmarks.plots import draw_seeds
from timm_convnextv2.checkpoint import load_model
from timm_convnextv2.data import FolderSource
from timm_convnextv2.data.samples.batches import preprocessing
from timm_convnextv2.features import collapse, image_batches

ROOT = Path(__file__).parents[1]
SHAPE = ["depths=(2,2,6,2)", "dims=(16,32,64,128)"]
FCMAE_V2, FCMAE_V1, LABELS = "FCMAE, V2", "FCMAE, V1 (no GRN)", "labels, V2"
BATCH = 32


def pretrain(images: Path, output: Path, name: str, epochs: int, seed: int, shape: list[str]) -> Path:
    """Pretrains an encoder, or finds it finished."""
    words = ["--data-dir", images, "--epochs", epochs, "--model-kwargs", *shape, "--patch-size", 1, "--img-size", 32]
    words += ["--decoder-dim", 128, "--batch-size", BATCH, "--lr", 2e-3, "--scale", 0.5, 1, "--hflip", 0]
    words += ["--workers", 0, "--seed", seed, "--checkpoint-interval", epochs, "--recon-interval", epochs]
    words += ["--output", output, "--experiment", name, "--resume", "auto"]
    seconds = call("pretrain.py", words, output / f"{name}.log")
    print(f"{name}: {seconds:.0f} s", flush=True)
    return output / name / "encoder"


def supervise(data: Path, output: Path, name: str, encoder: Path, epochs: int, seed: int) -> Path:
    """Trains the same network with labels from random weights, or finds it finished."""
    if not (output / name / "model/config.json").exists():
        words = ["--recipe", "smoke", "--model", f"local-dir:{encoder}", "--from-scratch", "--data-dir", data]
        words += ["--hflip", 0, "--epochs", epochs - 1, "--val-interval", epochs, "--seed", seed]
        seconds = call("finetune.py", [*words, "--output", output, "--experiment", name], output / f"{name}.log")
        print(f"{name}: {seconds:.0f} s", flush=True)
    return output / name / "model"


def measure(folder: Path, images: Path, count: int) -> list[dict]:
    """Depth, distance and dead channels of each block of a model, on images that no training saw."""
    model = load_model(f"local-dir:{folder}", num_classes=0).eval()
    source = FolderSource(images)
    step = max(1, len(source) // count)
    chosen: Any = torch.utils.data.Subset(source, range(0, len(source), step)[:count])
    chosen.name = lambda i: source.name(chosen.indices[i])
    transform = preprocessing(resolve_model_data_config(model))
    batches = torch.cat(list(image_batches(chosen, transform)))
    return [
        dict(block=b.block, depth=round(b.depth, 4), distance=b.distance, dead=b.dead) for b in collapse(model, batches)
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Distance over depth: each seed thin, the median thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for colour, name in zip(("tab:blue", "tab:red", "tab:green"), (FCMAE_V2, FCMAE_V1, LABELS), strict=True):
        seeds = sorted({r["seed"] for r in rows})
        curves = [[r for r in rows if (r["training"], r["seed"]) == (name, seed)] for seed in seeds]
        distances = [[r["distance"] for r in curve] for curve in curves]
        draw_seeds(axes, [r["depth"] for r in curves[0]], distances, colour, name)
    axes.axhline(0.5, color="grey", linestyle=":", label="independent channels")
    axes.set(xlabel="depth of the block", ylabel="mean cosine distance of channels", ylim=(0, 0.55))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of benchmarks.glyphs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=600, help="of each training")
    parser.add_argument("--images", type=int, default=200, help="to measure on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's train.py, as of finetuning")
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.timm_train:
        os.environ["TIMM_TRAIN"] = str(Path(args.timm_train).resolve())
    data = (args.data / "labelled").resolve()
    count = sum(1 for _ in (data / "train").rglob("*.png"))
    epochs = max(2, args.updates * BATCH // count)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        output.mkdir(parents=True, exist_ok=True)
        rows: list[dict] = []
        for seed in args.seeds:
            v2 = pretrain(data / "train", output, f"v2-{seed}", epochs, seed, SHAPE)
            v1 = pretrain(
                data / "train", output, f"v1-{seed}", epochs, seed, [*SHAPE, "use_grn=False", "ls_init_value=1e-6"]
            )
            labels = supervise(data, output, f"labels-{seed}", v2, epochs, seed)
            for name, folder in {FCMAE_V2: v2, FCMAE_V1: v1, LABELS: labels}.items():
                found = measure(folder, data / "validation", args.images)
                rows += [dict(training=name, seed=seed, **row) for row in found]
                middle = statistics.mean(row["distance"] for row in found)
                print(f"seed {seed}: {name:20} mean distance {middle:.3f}", flush=True)
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = f"{count} glyphs of fonts, 32 px, {epochs} epochs; measured on {args.images} of other families"
        print(write_csv("collapse_curve", rows, about))
        plot(rows, ROOT / "docs" / "collapse_curve.png")


if __name__ == "__main__":
    main()
