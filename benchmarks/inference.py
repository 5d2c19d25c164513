"""Dense inference of every variant: ours against stock timm, batches of 1 and 32.

    python -m benchmarks.inference                                          # two CPU cores, float32
    python -m benchmarks.inference --device cuda --dtype bfloat16 --compile

Prints ratios of times taken in turn within this run (on CPU each candidate has its own process), and writes them with
their conditions to `benchmarks/results/`.
"""

import argparse
import statistics

import torch

from benchmarks.measure import Candidates, add_machine_options, conditions, device_kind, ratio, write_csv
from benchmarks.pretrain_step import IMG_SIZE, dense_step
from timm_convnextv2.ops import backend
from timm_convnextv2.registry import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="SIZE")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--max-seconds", type=float, default=20, help="leave out what takes longer a step")
    parser.add_argument("--compile", action="store_true", help="compare both compiled")
    add_machine_options(parser, 5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for size in args.sizes:
        for batch in args.batches:
            end = " compiled" if args.compile else ""
            make = {w: (dense_step, (w + end, size, batch, False, args.device, args.dtype)) for w in ("ours", "stock")}
            with Candidates(make, device, args.threads, warmup=1) as candidates:
                first = candidates.first["ours"]
                # a short step is timed more often: its times scatter more
                rounds = 0 if first > args.max_seconds else args.rounds * (5 if first < 0.3 else 1)
                seconds = candidates.time(rounds)
            if not rounds:
                print(f"{size:6} batch {batch:3}: left out, {first:.0f} s a step", flush=True)
                continue
            middle, low, high = ratio(seconds["stock"], seconds["ours"])
            medians = {f"median_{w}_s": f"{statistics.median(times):.4f}" for w, times in seconds.items()}
            found = {"stock / ours": f"{middle:.2f}", "min": f"{low:.2f}", "max": f"{high:.2f}", "goal": ">= 1.1"}
            rows.append({"size": size, "batch": batch, **found, **medians})
            print(
                f"{size:6} batch {batch:3}: stock / ours {middle:.2f}  ({low:.2f} to {high:.2f})  goal >= 1.1",
                flush=True,
            )
    about = conditions(device, args.threads) | {"backend": backend(device)}
    about["inputs"] = f"{IMG_SIZE} px, {args.dtype}, {args.rounds} rounds in turn"
    print(write_csv(f"inference_{device_kind(device)}_{args.dtype}", rows, about))


if __name__ == "__main__":
    main()
