"""What pretraining is worth in detection and segmentation: the same training from the encoder and from random weights.

    python -m benchmarks.transfer

Pretrains once on demo images without labels, then trains `detect train --boxes-only` and `segment train` on other demo
images with boxes and masks, from that encoder and with `--from-scratch`. Each start takes the best of three learning
rates on a set of its own, then trains once per seed, on images drawn by the seed; everything else is equal. Writes box
AP and mIoU over the updates with their conditions to `benchmarks/results/transfer.csv`, and a figure to `docs/`. A run
that was stopped continues with the same `--output`.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import conditions, run_logged, write_csv
from benchmarks.plots import draw_seeds
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.features.verdict import mean_interval
from timm_convnextv2.files import read_rows

ROOT = Path(__file__).parents[1]
# the model and settings of the first command: what one CPU core trains in minutes
MODEL = ["--model-kwargs", "depths=[1,1,3,1]", "dims=[24,48,96,192]", "--patch-size", "1", "--decoder-dim", "128"]
PRETRAIN = ["--lr", "8e-3", "--scale", "0.7", "1", "--standardize", "channel", "--batch-size", "32"]
BATCH = 8
STARTS = {"FCMAE": [], "random weights": ["--from-scratch"]}
TUNE = 1000  # seed of the images that choose the learning rate
# name of the task: its command, its column of summary.csv, the learning rates, what of it is small for a CPU
TASKS = {
    "box AP": (
        "detect", "eval_box_ap", (1e-3, 3e-3, 1e-2),
        ["--boxes-only", "--out-channels", "32", "--detector-kwargs", "rpn_post_nms_top_n_train=50",
         "rpn_post_nms_top_n_test=50", "box_batch_size_per_image=32", "box_detections_per_img=10"],
    ),
    "mIoU": ("segment", "eval_miou", (1e-3, 3e-3, 1e-2), ["--channels", "32", "--auxiliary-channels", "16"]),
}  # fmt: skip


def call(words: list, log: Path) -> None:
    """Runs a command of the package."""
    seconds = run_logged([sys.executable, "-m", "timm_convnextv2", *map(str, words)], log)
    print(f"{log.stem}: {seconds:.0f} s", flush=True)


def train(task: str, start: str, seed: int, lr: float, args: argparse.Namespace) -> list[dict]:
    """Trains, or finds it done; the rows of the curve."""
    command, column, _, small = TASKS[task]
    output, data = args.output, args.output / f"data-{seed}"
    name = f"{command}-{seed}-{start.split()[0].lower()}-{lr:g}"
    if not data.exists():
        sizes = dict(size=args.size, train=args.labelled, validation=args.validation)
        write_folder(data, **sizes, seed=seed, coco=True, masks=True)
    updates = args.labelled // BATCH  # of an epoch
    epochs = max(1, getattr(args, f"{command}_updates") // updates)
    every = max(1, epochs // args.points)
    summary = output / name / "summary.csv"
    if len(read_rows(summary)[0]) < epochs:
        words = [command, "train", "--model", output / "pretrain", "--data-dir", data, "--recipe", "small-data"]
        words += ["--img-size", args.size, "--scale", 0.8, 1.2, "--batch-size", BATCH, "--epochs", epochs, "--no-amp"]
        words += ["--warmup-updates", 20, "--seed", seed, "--eval-interval", every, "--device", "cpu", "--lr", lr]
        words += ["--workers", 0, "--shown-images", 2, "--output", output, "--experiment", name, "--resume", "auto"]
        call([*words, *small, *STARTS[start]], output / f"{name}.log")
    rows = [row for row in read_rows(summary)[0] if row[column] != ""]
    found = [((int(str(row["epoch"])) + 1) * updates, 100 * float(str(row[column]))) for row in rows]
    return [dict(task=task, start=start, seed=seed, lr=lr, update=u, percent=round(value, 2)) for u, value in found]


def plot(rows: list[dict], path: Path) -> None:
    """Both measures over the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), dpi=120, layout="constrained")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for start, colour in zip(STARTS, ("tab:blue", "tab:orange"), strict=True):
            seeds = sorted({row["seed"] for row in rows})
            curves = [[r for r in rows if (r["task"], r["start"], r["seed"]) == (task, start, seed)] for seed in seeds]
            values = [[r["percent"] for r in curve] for curve in curves]
            draw_seeds(axes, [r["update"] for r in curves[0]], values, colour, f"{start}, median of {len(seeds)}")
        axes.set(xlabel=f"updates of {BATCH} images", ylabel=f"{task} on validation images, %")
        axes.set_ylim(0, 1.2 * max(row["percent"] for row in rows if row["task"] == task))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("The same training from an FCMAE encoder and from random weights", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--size", type=int, default=64, help="of all images, in pixels")
    parser.add_argument("--images", type=int, default=2048, help="images without labels")
    parser.add_argument("--epochs", type=int, default=12, help="of pretraining")
    parser.add_argument("--labelled", type=int, default=320, help="images with boxes and masks")
    parser.add_argument("--validation", type=int, default=80)
    parser.add_argument("--detect-updates", type=int, default=160, help="of each detector")
    parser.add_argument("--segment-updates", type=int, default=480, help="of each segmenter")
    parser.add_argument("--points", type=int, default=4, help="evaluations of each of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        output = args.output = Path(args.output or temporary).resolve()
        output.mkdir(parents=True, exist_ok=True)
        words = ["pretrain", "--dataset", "demo", "--num-images", args.images, "--epochs", args.epochs]
        words += [*MODEL, *PRETRAIN, "--img-size", args.size, "--workers", 0, "--device", "cpu"]
        words += ["--recon-interval", args.epochs, "--output", output, "--experiment", "pretrain"]
        if len(read_rows(output / "pretrain" / "summary.csv")[0]) < args.epochs:
            call([*words, "--resume", "auto"], output / "pretrain.log")
        rows: list[dict] = []
        for task in args.tasks:
            for start in STARTS:
                tried = [train(task, start, TUNE, lr, args) for lr in TASKS[task][2]]
                lr = max((curve[-1] for curve in tried), key=lambda row: row["percent"])["lr"]
                print(task, start, *[f"lr {c[-1]['lr']:g}: {c[-1]['percent']:.1f}" for c in tried], flush=True)
                rows += [row for curve in tried for row in curve]
                rows += [row for seed in args.seeds for row in train(task, start, seed, lr, args)]
        print(f"\nin % after the last update of {BATCH} images")
        measured = [row for row in rows if row["seed"] != TUNE]
        for task in args.tasks:
            ends: dict[str, list[float]] = {}
            for start in STARTS:
                curves = {r["seed"]: r for r in measured if (r["task"], r["start"]) == (task, start)}
                last = [row["percent"] for row in curves.values()]
                values = "  ".join(f"{v:5.1f}" for v in last)
                print(f"{task:8} {start:16} {values}   median {statistics.median(last):.1f}")
                ends[start] = last
            gain = mean_interval([x - y for x, y in zip(*ends.values(), strict=True)])
            print(f"{task:8} difference {gain[0]:+.1f}, 95 % interval {gain[1]:.1f} to {gain[2]:.1f}")
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = (
            f"one encoder, pretrained for {args.epochs} epochs on {args.images} images of {args.size} px; "
            f"{args.labelled} with labels and {args.validation} to validate, drawn by each seed, "
            f"and by seed {TUNE} to choose the learning rate of each start"
        )
        print(write_csv("transfer", rows, about))
        plot(measured, ROOT / "docs" / "transfer_gain.png")


if __name__ == "__main__":
    main()
