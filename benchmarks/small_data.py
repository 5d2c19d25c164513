"""When does pretraining pay? Number of images without labels x number with labels, against random weights.

    python -m benchmarks.small_data --timm-train path/to/timm/train.py --data GLYPHS

GLYPHS is a folder of `python -m benchmarks.glyphs`: real fonts, whose validation families no training saw. For each
number of unlabelled images a small ConvNeXt V2 is pretrained with the same number of updates; then, for each number of
labelled images and each seed, the recipe `smoke` finetunes it, and random weights, with the same number of updates.
Writes accuracies with their conditions to `benchmarks/results/small_data.csv` and a heat map of the gain to `docs/`.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.finetune_gain import call
from benchmarks.measure import conditions, write_csv
from timm_convnextv2.features.compare import SCRATCH, Candidate, compare

ROOT = Path(__file__).parents[1]
# a small ConvNeXt V2 on small images: what two CPU cores train in minutes
MODEL = ["--model-kwargs", "depths=(1,1,2,1)", "dims=(16,32,64,128)", "--patch-size", "1", "--img-size", "32"]
BATCH = 32


def some(source: Path, target: Path, count: int) -> Path:
    """A folder of links to the first `count` images of a folder, or as many of each of its classes."""
    classes = sorted(p for p in source.iterdir() if p.is_dir())
    for folder in classes or [source]:
        place = target / folder.name if classes else target
        place.mkdir(parents=True)
        for path in sorted(folder.glob("*.png"))[: count // max(1, len(classes))]:
            (place / path.name).symlink_to(path.resolve())
    return target


def pretrain(images: Path, output: Path, updates: int) -> str:
    """Pretrains with so many updates; returns the name of the encoder."""
    epochs = max(1, updates * BATCH // len(list(images.iterdir())))
    words = ["--data-dir", images, "--epochs", epochs, *MODEL, "--decoder-dim", 128, "--batch-size", BATCH]
    words += ["--lr", 2e-3, "--scale", 0.5, 1, "--hflip", 0, "--workers", 0, "--checkpoint-interval", epochs]
    words += ["--recon-interval", epochs, "--output", output.parent, "--experiment", output.name, "--resume", "auto"]
    seconds = call("pretrain.py", words, output.parent / f"{output.name}.log")
    print(f"{output.name}: {epochs} epochs in {seconds:.0f} s", flush=True)
    return f"local-dir:{output.resolve()}/encoder"


def plot(rows: list[dict], path: Path) -> None:
    """The gain of each cell, in points, with both accuracies: the median of the seeds."""
    from matplotlib.figure import Figure

    def middle(unlabelled: int, labelled: int) -> float:
        own = [r["top1"] for r in rows if (r["unlabelled"], r["labelled"]) == (unlabelled, labelled)]
        return statistics.median(own)

    few, many = (sorted({r[name] for r in rows}) for name in ("labelled", "unlabelled"))
    many = [n for n in many if n]
    gains = [[middle(u, n) - middle(0, n) for n in few] for u in many]
    figure = Figure(figsize=(6.4, 1.6 + 0.9 * len(many)), dpi=120, layout="constrained")
    axes = figure.subplots()
    largest = max(1.0, *(abs(g) for row in gains for g in row))
    shown = axes.imshow(gains, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for i, u in enumerate(many):
        for j, n in enumerate(few):
            text = f"{gains[i][j]:+.1f}\n{middle(u, n):.1f} against {middle(0, n):.1f} %"
            dark = abs(gains[i][j]) > 0.6 * largest
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(few)), [str(n) for n in few])
    axes.set_yticks(range(len(many)), [str(n) for n in many])
    axes.set(xlabel="labelled images", ylabel="unlabelled images", title="Gain of pretraining in points of accuracy")
    figure.colorbar(shown, ax=axes)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of benchmarks.glyphs")
    parser.add_argument("--unlabelled", type=int, nargs="+", default=[500, 8000])
    parser.add_argument("--labelled", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-updates", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=200, help="of each finetuning")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's train.py, as of finetuning")
    parser.add_argument("--output", metavar="DIR", help="keep the runs there, and continue them")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.timm_train:
        os.environ["TIMM_TRAIN"] = str(Path(args.timm_train).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary).resolve()
        rows: list[dict] = []
        starts = {}
        for count in args.unlabelled:
            images = output / f"unlabelled-{count}"
            if not images.exists():
                some(args.data / "unlabelled", images, count)
            starts[count] = pretrain(images, output / f"pretrain-{count}", args.pretrain_updates)
        candidates = [Candidate(SCRATCH, starts[args.unlabelled[0]], ("--from-scratch",))]
        candidates += [Candidate(str(count), model) for count, model in starts.items()]
        for labels in args.labelled:
            data = output / f"labelled-{labels}"
            if not data.exists():
                some(args.data / "labelled/train", data / "train", labels)
                (data / "validation").symlink_to((args.data / "labelled/validation").resolve())
            epochs = max(2, args.updates * BATCH // labels)
            warmup = max(1, epochs // 10)
            options = ["--recipe", "smoke", "--data-dir", str(data), "--hflip", "0", "--val-interval", str(epochs)]
            options += ["--epochs", str(epochs - warmup), "--warmup-epochs", str(warmup)]
            runs = output / f"finetune-{labels}"
            runs.mkdir(exist_ok=True)
            for curve in compare(candidates, options, args.seeds, runs, epochs=epochs, resume=True):
                unlabelled = 0 if curve.name == SCRATCH else int(curve.name)
                row = dict(unlabelled=unlabelled, labelled=labels, seed=curve.seed, top1=curve.accuracy[-1])
                rows.append(row)
                print(f"{row}  {curve.seconds:.0f} s", flush=True)
        about = conditions(torch.device("cpu"), args.threads)
        about["sets"] = f"glyphs of fonts, 32 px, 10 classes, {args.updates} updates of {BATCH} in each finetuning"
        print(write_csv("small_data", rows, about))
        plot(rows, ROOT / "docs" / "small_data.png")


if __name__ == "__main__":
    main()
