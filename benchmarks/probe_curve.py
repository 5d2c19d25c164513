"""Do frozen features get better while a run trains? kNN and ridge over its epochs, beside random weights and pixels.

    python -m benchmarks.probe_curve

Pretrains the small model of `finetune_gain` on embedded images with `--probe-dir`, once per seed. Writes the columns of
each run with their conditions to `benchmarks/results/probe_curve.csv` and a figure to `docs/`.
"""

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.finetune_gain import MODEL, call
from benchmarks.measure import conditions, write_csv
from timm_convnextv2.data.demo import write_folder

ROOT = Path(__file__).parents[1]
LABELLED = dict(size=40, train=1600, validation=800)
MEASURES = ("knn", "ridge")


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over epochs, a line a seed; baselines are dashed, and at epoch 0 stand the random weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
        for seed in sorted({row["seed"] for row in rows}):
            own = [row for row in rows if row["seed"] == seed and row["start"] == "pretrained"]
            base = {row["start"]: row[name] for row in rows if row["seed"] == seed and row["start"] != "pretrained"}
            first = [(0, base["random"])]
            axes.plot(*zip(*first + [(r["epoch"], r[name]) for r in own], strict=True), color="C0", marker=".")
            axes.axhline(base["random"], color="C1", linestyle="--", linewidth=1)
            axes.axhline(base["pixels"], color="grey", linestyle=":", linewidth=1.5)
        axes.set(
            xlabel="epoch of pretraining", title={"knn": "20 nearest neighbours", "ridge": "ridge regression"}[name]
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test accuracy, %")
    lines = [("C0", "-", "encoder"), ("C1", "--", "random weights"), ("grey", ":", "8 x 8 pixels")]
    for colour, style, label in lines:
        figure.axes[1].plot([], [], color=colour, linestyle=style, label=label)
    figure.axes[1].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=8192, help="images without labels")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        output.mkdir(parents=True, exist_ok=True)
        data = output / "labelled"
        if not data.exists():
            write_folder(data, **LABELLED, seed=1)
        rows: list[dict] = []
        for seed in args.seeds:
            run = output / f"pretrain-{seed}"
            words = ["--dataset", "embedded", "--train-num-samples", args.images, "--epochs", args.epochs, *MODEL]
            words += ["--decoder-dim", 128, "--batch-size", 32, "--lr", 2e-3, "--scale", 0.5, 1, "--workers", 1]
            words += ["--probe-dir", data, "--probe-interval", max(1, args.epochs // 8), "--seed", seed]
            words += ["--output", output, "--experiment", run.name, "--resume", "auto"]
            print(f"seed {seed}: {call('pretrain.py', words, output / f'{run.name}.log'):.0f} s", flush=True)
            baselines = json.loads((run / "probe.json").read_text())["baselines"]
            rows += [
                dict(seed=seed, start=start, epoch=0, **{name: found[name] for name in MEASURES})
                for start, found in baselines.items()
            ]
            with open(run / "summary.csv") as f:
                measured = [row for row in csv.DictReader(f) if row["eval_knn"]]
            rows += [
                dict(seed=seed, start="pretrained", epoch=int(row["epoch"]) + 1)
                | {name: float(row[f"eval_{name}"]) for name in MEASURES}
                for row in measured
            ]
            print(*rows, sep="\n", flush=True)
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = (
            f"{args.images} embedded images of 40 px; {LABELLED['train']} and {LABELLED['validation']} judged"
        )
        print(write_csv("probe_curve", rows, about))
        plot(rows, ROOT / "docs" / "probe_curve.png")


if __name__ == "__main__":
    main()
