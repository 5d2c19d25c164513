"""What the first command learns: kNN and ridge on frozen features over its epochs, beside its baselines.

    python -m benchmarks.probe_curve

Runs `timm-convnextv2 pretrain` without options but a seed, once per seed. Writes the columns of each run with their
conditions to `benchmarks/results/probe_curve.csv` and a figure to `docs/`.
"""

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import call, conditions, write_csv

ROOT = Path(__file__).parents[1]
MEASURES = ("knn", "ridge")


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over epochs, a line per seed, which begins with its random weights; baselines are their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    baselines = list(dict.fromkeys(row["start"] for row in rows if row["start"] not in ("pretrained", "random")))
    for axes, name in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
        for seed in sorted({row["seed"] for row in rows}):
            own = [row for row in rows if row["seed"] == seed and row["start"] in ("random", "pretrained")]
            axes.plot([r["epoch"] for r in own], [r[name] for r in own], color="C0", marker=".")
        for base, (colour, style) in zip(["random", *baselines], LINES, strict=False):
            values = [row[name] for row in rows if row["start"] == base]
            axes.axhline(sum(values) / len(values), color=colour, linestyle=style, linewidth=1.5)
        title = {"knn": "20 nearest neighbours", "ridge": "ridge regression"}[name]
        axes.set(xlabel="epoch of pretraining", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(0, 1.05 * max(row[name] for row in rows for name in MEASURES))
    figure.axes[0].set(ylabel="test accuracy, %")
    figure.axes[0].plot([], [], color="C0", marker=".", label="encoder, one line per seed")
    for base, (colour, style) in zip(["random", *baselines], LINES, strict=False):
        figure.axes[0].plot([], [], color=colour, linestyle=style, label=f"{base}{' weights' * (base == 'random')}")
    figure.axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path)


LINES = (("C1", "--"), ("grey", ":"), ("C2", "-."), ("C3", (0, (1, 1))))  # of baselines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        output.mkdir(parents=True, exist_ok=True)
        rows: list[dict] = []
        for seed in args.seeds:
            run = output / f"seed-{seed}"
            words = [
                "--seed",
                seed,
                "--output",
                output,
                "--experiment",
                run.name,
                "--resume",
                "auto",
                "--device",
                "cpu",
            ]
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
        about["sets"] = "those of the command; 512 labelled images to train on and 400 to test on"
        print(write_csv("probe_curve", rows, about))
        plot(rows, ROOT / "docs" / "probe_curve.png")


if __name__ == "__main__":
    main()
