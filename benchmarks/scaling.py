"""How the FCMAE step grows: time and peak memory over mask ratio, image size and batch, ours and dense-with-masks.

    python -m benchmarks.scaling                                            # two CPU cores, float32, about 15 minutes
    python -m benchmarks.scaling --device cuda --dtype bfloat16 --batch 64

Writes the figures with their conditions to `benchmarks/results/`, and an image to `docs/`.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
import torch

from benchmarks.measure import Candidates, add_machine_options, conditions, device_kind, write_csv
from benchmarks.pretrain_step import fcmae_step
from timm_convnextv2.ops import backend

LABELS = {"ours": "ours", "reference": "dense with masks"}


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Time above, memory below; a column for each thing that is varied."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["varied"] for row in rows))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(4 * len(kinds), 6), layout="constrained", squeeze=False)
    for column, kind in enumerate(kinds):
        for field, unit, ax in (("seconds", "s", axes[0][column]), ("bytes", "GiB", axes[1][column])):
            for which, label in LABELS.items():
                mine = [row for row in rows if row["varied"] == kind and row["which"] == which]
                values = [float(row[field]) / (2**30 if unit == "GiB" else 1) for row in mine]
                ax.plot([row["value"] for row in mine], values, marker="o", label=label)
            ax.set(xlabel=kind, ylim=(0, None))
            ax.grid(alpha=0.3)
        axes[0][column].set_ylabel("step, s")
        axes[1][column].set_ylabel("peak memory, GiB")
    axes[0][0].legend()
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="atto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[64, 128, 224, 320, 448, 576, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    add_machine_options(parser, 5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    usual = {"mask ratio": 0.6, "image size, px": 224, "batch": args.batch}
    for varied, values in zip(usual, (args.ratios, args.img_sizes, args.batches), strict=True):
        for value in values:
            ratio, img_size, batch = {**usual, varied: value}.values()
            settings = (args.size, batch, ratio, args.device, args.dtype, img_size)
            make = {which: (fcmae_step, (which, *settings)) for which in LABELS}
            with Candidates(make, device, args.threads) as candidates:
                seconds, peak = candidates.time(args.rounds), candidates.peak
            for which in LABELS:
                rows.append(
                    {
                        "varied": varied, "value": value, "which": which,
                        "seconds": f"{statistics.median(seconds[which]):.4f}", "min_s": f"{min(seconds[which]):.4f}",
                        "max_s": f"{max(seconds[which]):.4f}",
                        "bytes": peak[which],
                    }
                )  # fmt: skip
            ours, theirs = rows[-2:]
            print(
                f"{varied} {value:5}: step {ours['seconds']} s, dense with masks {theirs['seconds']} s; "
                f"peak {ours['bytes'] / 2**20:.0f} and {theirs['bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
    kind = device_kind(device)
    about = conditions(device, args.threads) | {"backend": backend(device)}
    about["inputs"] = f"{args.size}, {args.dtype}, batch {args.batch}, 224 px, mask ratio 0.6 where not varied"
    print(write_csv(f"scaling_{kind}_{args.dtype}", rows, about))
    title = f"FCMAE step of {args.size}: {args.dtype}, {about['hardware']}"
    plot(rows, Path(__file__).parents[1] / "docs" / f"scaling_{kind}.png", title)


if __name__ == "__main__":
    main()
