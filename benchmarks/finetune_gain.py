"""What pretraining is worth: the same finetuning from the pretrained encoder and from random weights.

    python -m benchmarks.finetune_gain --timm-train path/to/timm/train.py

Pretrains once with `train_scripts/pretrain.py` on the demo images without labels. Then, for each seed,
`train_scripts/finetune.py` with the recipe `smoke`, which runs timm's own `train.py`, twice: from that encoder and with
`--from-scratch`. Labelled images, weights that are new, and crops are those of the seed; no image is in two sets.
About half an hour on two CPU cores. Prints both accuracies, and writes them with their conditions to
`benchmarks/results/` and a figure to `docs/`.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

from benchmarks.measure import conditions, run_logged, write_csv
from benchmarks.plots import draw_seeds
from timm_convnextv2.data.demo import DemoSource, write_folder

ROOT = Path(__file__).parents[1]
# a small ConvNeXt V2 on small images: what two CPU cores train in minutes
MODEL = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(24,48,96,192)", "--patch-size", "1", "--img-size", "40"]
CANDIDATES = {"pretrained": [], "from scratch": ["--from-scratch"]}


def call(script: str, words: list[str], log: Path) -> float:
    """Runs a script of `train_scripts/`; returns the seconds it took."""
    return run_logged([sys.executable, str(ROOT / "train_scripts" / script), *map(str, words)], log)


def accuracies(run: Path) -> list[float]:
    """Validation accuracy in % after each epoch, from train.py's summary.csv."""
    with open(run / "summary.csv") as f:
        return [float(row["eval_top1"]) for row in csv.DictReader(f)]


def plot(rows: list[dict], path: Path, chance: float) -> None:
    """Accuracy over epochs: each seed thin, their median thick."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, colour in zip(CANDIDATES, ("tab:blue", "tab:orange"), strict=True):
        seeds = sorted({row["seed"] for row in rows})
        curves = [[r["accuracy"] for r in rows if r["start"] == name and r["seed"] == seed] for seed in seeds]
        draw_seeds(axes, range(1, len(curves[0]) + 1), curves, colour, f"{name}, median of {len(seeds)}")
    axes.axhline(chance, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="epoch of finetuning", ylabel="validation accuracy, %", ylim=(0, None))
    axes.set_title("The same finetuning with and without pretraining")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=8192, help="images without labels")
    parser.add_argument("--epochs", type=int, default=16, help="of pretraining")
    parser.add_argument("--labels", type=int, default=1024, help="images with labels")
    parser.add_argument("--validation", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's train.py, as of finetuning")
    parser.add_argument("--output", metavar="DIR", help="keep the runs there (default: a temporary folder)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.timm_train:
        os.environ["TIMM_TRAIN"] = str(Path(args.timm_train).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        output.mkdir(parents=True, exist_ok=True)
        rows, last = [], {name: [] for name in CANDIDATES}
        words = ["--dataset", "demo", "--num-images", args.images, "--epochs", args.epochs, *MODEL]
        words += ["--decoder-dim", 128, "--batch-size", 32, "--lr", 2e-3, "--scale", 0.5, 1, "--workers", 1]
        words += ["--output", output, "--experiment", "pretrain", "--overwrite"]
        seconds = call("pretrain.py", words, output / "pretrain.log")
        print(f"pretrained in {seconds:.0f} s", flush=True)
        for seed in args.seeds:
            data = output / f"data-{seed}"
            if not data.exists():
                write_folder(data, size=40, train=args.labels, validation=args.validation, seed=seed)
            for name, more in CANDIDATES.items():
                run = f"finetune-{seed}-{name.replace(' ', '-')}"
                words = ["--recipe", "smoke", "--model", f"local-dir:{output}/pretrain/encoder", "--seed", seed]
                words += ["--data-dir", data, "--output", output, "--experiment", run, *more]
                seconds = call("finetune.py", words, output / f"{run}.log")
                curve = accuracies(output / run)
                last[name].append(curve[-1])
                rows += [dict(seed=seed, start=name, epoch=i + 1, accuracy=a) for i, a in enumerate(curve)]
                print(
                    f"seed {seed}: {name:12} {curve[-1]:5.1f} %  ({len(curve)} epochs in {seconds:.0f} s)", flush=True
                )
        chance = 100 / len(DemoSource.classes)
        print(f"\nvalidation accuracy in % after the last epoch, chance {chance:.1f}")
        for name, values in last.items():
            print(
                f"{name:12}  " + "  ".join(f"{v:5.1f}" for v in values) + f"   median {statistics.median(values):.1f}"
            )
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = (
            f"{args.images} images of 40 px without labels, {args.labels} with, {args.validation} to validate"
        )
        print(write_csv("finetune_gain", rows, about))
        plot(rows, ROOT / "docs" / "finetune_gain.png", chance)


if __name__ == "__main__":
    main()
