"""The recipe of random weights, `scratch-small`: its learning rate, and each setting that differs from `small-data`.

    python -m benchmarks.scratch_sweep --timm-train path/to/timm/train.py --data PHOTOGRAPHS-32

PHOTOGRAPHS-32 is a folder of `python -m benchmarks.images`. A small ConvNeXt V2 is finetuned from random weights on
four fifths of a stratified part of the training images, and measured on the rest: the validation images stay unseen.
Every row of `benchmarks/results/scratch_sweep.csv` is one finetuning; `--output` keeps them, and they are not repeated.
"""

import argparse
import csv
import os
import shutil
from pathlib import Path

import torch

from benchmarks.measure import conditions, write_csv
from timm_convnextv2.data.labelled import rows_of_folder
from timm_convnextv2.features.compare import Candidate, Cell, call, part_folders, words_of_cell

MODEL = ("--from-scratch", "--model-kwargs", "depths=[1,1,2,1]", "dims=[16,32,64,128]", "patch_size=1")
RATE = 8e-3
SETTINGS: dict[str, tuple[float, tuple[str, ...]]] = {
    "scratch-small": (RATE, ()),
    "a tenth of the learning rate": (RATE / 10, ()),
    "0.3 times the learning rate": (0.3 * RATE, ()),
    "3 times the learning rate": (3 * RATE, ()),
    "layer decay 0.9": (RATE, ("--layer-decay", "0.9")),
    "head_init_scale 0.001": (RATE, ("--head-init-scale", "0.001")),
    "mixup 0.8 and cutmix 1": (RATE, ("--mixup", "0.8", "--cutmix", "1.0")),
    "all three, a tenth of the learning rate": (
        RATE / 10,
        ("--layer-decay", "0.9", "--head-init-scale", "0.001", "--mixup", "0.8", "--cutmix", "1.0"),
    ),
}


def tops(summary: Path) -> list[float]:
    """Accuracy in % on the held-out images after each epoch, from train.py's summary."""
    with open(summary, newline="") as file:
        return [float(row["eval_top1"]) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of benchmarks.images")
    parser.add_argument("--images", type=int, default=1520, help="training images, a fifth of them to measure on")
    parser.add_argument("--epochs", type=int, default=12, help="a tenth of them warmup")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's train.py, as of finetuning")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="keep the runs there")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.timm_train:
        os.environ["TIMM_TRAIN"] = str(Path(args.timm_train).resolve())
    rows = rows_of_folder(args.data / "train", [])
    parts = part_folders(rows, [args.images], args.data / "validation", args.output / "data")
    part = parts[args.images]
    about = conditions(torch.device("cpu"), args.threads)
    about["sets"] = f"{args.images} of {len(rows)} training images of {args.data.name}, a fifth held out"
    more = ["--img-size", "32", "--workers", "0", "--device", "cpu"]
    found = []
    for seed in args.seeds:
        for number, (name, (rate, options)) in enumerate(SETTINGS.items()):
            candidate = Candidate(name, "convnextv2_atto", (*MODEL, *options), "scratch-small", (rate,), 64)
            folder = args.output / f"{number}-seed-{seed}"
            cell = Cell(candidate, args.images, args.epochs, seed, rate, part.tune, part.digest, folder)
            summary = folder / "summary.csv"
            if not summary.exists() or len(tops(summary)) < args.epochs:
                shutil.rmtree(folder, ignore_errors=True)
                place = ["--output", str(args.output), "--experiment", folder.name]
                call("finetune", [*words_of_cell(cell, more), *place], folder.with_suffix(".log"))
            accuracy = tops(summary)[-1]
            found.append(dict(setting=name, lr_base=f"{rate:g}", seed=seed, epochs=args.epochs, held_out_top1=accuracy))
            print(found[-1], flush=True)
            path = write_csv("scratch_sweep", found, about)
    print(path)


if __name__ == "__main__":
    main()
