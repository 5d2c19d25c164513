"""The recipes of small labelled sets: the learning rate, and each other setting alone.

    python -m benchmarks.recipe_sweep --timm-train path/to/timm/train.py --data PHOTOGRAPHS-32 --output SWEEP
    python -m benchmarks.recipe_sweep --timm-train path/to/timm/train.py --data CLIPART-32 --output SWEEP --encoder RUN

The data are a folder of `python -m benchmarks.images`. Without --encoder, a small ConvNeXt V2 is finetuned from random
weights with `scratch-small`; with it, from a pretraining run with `small-data`. It trains on four fifths of a
stratified part of the training images and is measured on the rest: the validation images stay unseen. Every row of
`benchmarks/results/recipe_sweep_*.csv` is one finetuning; `--output` keeps them, and they are not repeated.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

from benchmarks.measure import conditions, write_csv
from timm_convnextv2.data.labelled import rows_of_folder
from timm_convnextv2.features.compare import Candidate, Cell, accuracies, call, part_folders, words_of_cell
from timm_convnextv2.finetune.config import RECIPES
from timm_convnextv2.recipes import load_recipe

RANDOM = ("--from-scratch", "--model-kwargs", "depths=[1,1,3,1]", "dims=[24,48,96,192]", "patch_size=1")
AUGMENTATIONS = {
    "RandAugment": "--aa rand-m9-mstd0.5-inc1",
    "mixup 0.8 and cutmix 1": "--mixup 0.8 --cutmix 1",
    "random erasing 0.25": "--reprob 0.25",
    "crops from 0.08": "--scale 0.08 1",
}
AUGMENTATIONS["all four, as in the paper"] = " ".join(AUGMENTATIONS.values())
# name: learning rate, options; the first is the recipe, whose name it has
SCRATCH: dict[str, tuple[float, str]] = {
    "scratch-small": (4e-3, ""),
    "0.1 times the learning rate": (4e-4, ""),
    "0.3 times the learning rate": (1.2e-3, ""),
    "3 times the learning rate": (1.2e-2, ""),
    "layer decay 0.9": (4e-3, "--layer-decay 0.9"),
    "head_init_scale 0.001": (4e-3, "--head-init-scale 0.001"),
} | {name: (4e-3, words) for name, words in AUGMENTATIONS.items()}
PRETRAINED: dict[str, tuple[float, str]] = (
    {
        "small-data": (1.6e-3, ""),
        "0.25 times the learning rate": (4e-4, ""),
        "4 times the learning rate": (6.4e-3, ""),
    }
    | {name: (1.6e-3, words) for name, words in AUGMENTATIONS.items()}
    | {
        "crops from 0.35": (1.6e-3, "--scale 0.35 1"),
        "head_init_scale 1": (1.6e-3, "--head-init-scale 1"),
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of benchmarks.images")
    parser.add_argument("--encoder", metavar="RUN", help="a pretraining run to start from (default: random weights)")
    parser.add_argument("--settings", nargs="+", choices=[*SCRATCH, *PRETRAINED], metavar="NAME")
    parser.add_argument("--images", type=int, default=3814, help="training images, a fifth of them to measure on")
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
    part = part_folders(rows, [args.images], [], args.output / "data")[args.images]
    about = conditions(torch.device("cpu"), args.threads)
    about["sets"] = f"{args.images} of {len(rows)} training images of {args.data.name}, a fifth held out"
    more = ["--img-size", "32", "--workers", "0", "--device", "cpu"]
    settings = PRETRAINED if args.encoder else SCRATCH
    recipe = next(iter(settings))
    result = f"recipe_sweep_{recipe}_{args.data.name}".replace("-", "_")
    values = load_recipe(recipe, RECIPES).values
    model, start = "convnextv2_atto", RANDOM
    if args.encoder:
        model, start = f"local-dir:{(Path(args.encoder) / 'encoder').resolve()}", ()
    found = []
    for seed in args.seeds:
        for name in args.settings or settings:
            rate, options = settings[name]
            candidate = Candidate(name, model, (*start, *options.split()), recipe, (rate,), values)
            folder = args.output / f"{recipe}-{list(settings).index(name)}-seed-{seed}"
            cell = Cell(candidate, args.images, args.epochs, seed, rate, part.tune, part.digest, folder, tunes=True)
            if not (folder / "summary.csv").exists() or args.epochs not in accuracies(folder):
                shutil.rmtree(folder, ignore_errors=True)
                place = ["--data-dir", str(part.tune), "--output", str(args.output), "--experiment", folder.name]
                call("finetune", [*words_of_cell(cell, more), *place], folder.with_suffix(".log"))
            accuracy = accuracies(folder)[args.epochs]
            found.append(dict(setting=name, lr_base=f"{rate:g}", seed=seed, epochs=args.epochs, held_out_top1=accuracy))
            print(found[-1], flush=True)
            path = write_csv(result, found, about)
    print(path)


if __name__ == "__main__":
    main()
