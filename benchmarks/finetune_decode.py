"""Samples of finetuning from 8-bit JPEG: this package's decoder against timm's reader.

    python -m benchmarks.finetune_decode

Both contenders read the same photograph-like JPEGs (see `benchmarks.decode`), in folders of classes, with timm's
training transform and the same random draws; the samples are checked to be equal. The time is that of a whole sample:
read, decode, crop, resize, flip, colour jitter. Prints ratios of times taken in turn within this run, and writes them
with their conditions to `benchmarks/results/`.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import timm.utils
import torch
from timm.data import create_dataset, create_transform

from benchmarks.decode import KINDS, write_photographs
from benchmarks.measure import conditions, ratio, time_in_turn, write_csv
from timm_convnextv2.finetune import images


def compare(size: int, img_size: int, count: int, rounds: int) -> dict[str, str]:
    """Times of both contenders on squares of `size` pixels, as a row of the table."""
    with tempfile.TemporaryDirectory() as name:
        for label in "ab":
            folder = Path(name) / label
            folder.mkdir()
            write_photographs(folder, size, count)
        options: Any = dict(root=name, split="train", search_split=False)
        ours = images.create_dataset("", name, "train", reading=images.Reading())
        timms: Any = create_dataset("", **options)
        transform = create_transform((3, img_size, img_size), is_training=True, use_prefetcher=True)
        timms.transform, ours.transform = transform, images.ByKind(transform)

        def read(data: Any) -> list[torch.Tensor]:
            timm.utils.random_seed(0)
            return [data[i][0] for i in range(len(data))]

        assert all(torch.equal(a, b) for a, b in zip(read(ours), read(timms), strict=True)), "they must agree"
        seconds = time_in_turn({"timm": lambda: read(timms), "ours": lambda: read(ours)}, rounds, warmup=1)
    middle, low, high = ratio(seconds["timm"], seconds["ours"])
    per_sample = {
        f"{which}_ms": f"{1e3 * statistics.median(times) / len(ours):.2f}" for which, times in seconds.items()
    }
    return {
        "case": f"{size} px", "ratio": f"{middle:.2f}", "min": f"{low:.2f}", "max": f"{high:.2f}", **per_sample
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 500, 1000], metavar="PIXELS")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--count", type=int, default=3, help="pictures per size and class, each in four kinds of JPEG")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker
    rows = []
    for size in args.sizes:
        rows.append(compare(size, args.img_size, args.count, args.rounds))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = {
        **conditions(torch.device("cpu"), 1),
        "inputs": f"{args.img_size} px from JPEGs of {2 * args.count} pictures x {len(KINDS)} kinds, {args.rounds} "
        "rounds in turn; ratio = timm's reader / ours, time per sample; the samples are equal",
    }
    print(write_csv("finetune_decode", rows, about))


if __name__ == "__main__":
    main()
