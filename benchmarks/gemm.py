"""The token MLP's products on CPU by PyTorch's two libraries, MKL and oneDNN: what `ops.gemm` chooses between.

    python -m benchmarks.gemm

Each of the four that may go to either, both Linears and their input gradients, multiplies tokens by a matrix [C, 4C] or
[4C, C]. Prints MKL's time over oneDNN's, taken in turn, and writes it with its conditions to `benchmarks/results/`.
Where the ratio is above one and 'chosen' is MKL, `ops.gemm` has something to gain.
"""

import argparse
import statistics
from unittest import mock

import torch

from benchmarks.measure import conditions, ratio, time_in_turn, write_csv
from timm_convnextv2.ops import gemm
from timm_convnextv2.registry import VARIANTS

VISIBLE = 19  # patches of 32 px in an image of 224 px at mask ratio 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["atto:16", "tiny:8", "base:8"], metavar="SIZE:BATCH")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in args.cases:
        size, batch = case.split(":")
        for stage, channels in enumerate(VARIANTS[size]["dims"]):
            # images at a time as the token MLP takes them: about 1,200 tokens or the whole batch
            tokens = VISIBLE * (8 >> stage) ** 2
            tokens *= min(int(batch), max(1, 1216 // tokens))
            for name, inner, outer in (("[C, 4C]", channels, 4 * channels), ("[4C, C]", 4 * channels, channels)):
                x, w = torch.randn(tokens, inner), torch.randn(outer, inner)
                with mock.patch.object(gemm, "SMALLEST", 1):
                    steps = {}
                    for library, prefers in (("MKL", False), ("oneDNN", True)):

                        def step(prefers: bool = prefers, x=x, w=w) -> torch.Tensor:
                            with mock.patch.object(gemm, "_cpu_prefers_onednn", lambda: prefers):
                                return gemm.linear(x, w)

                        steps[library] = step
                    seconds = time_in_turn(steps, args.rounds)
                middle, low, high = ratio(seconds["MKL"], seconds["oneDNN"])
                rate = 2 * tokens * inner * outer / statistics.median(seconds["oneDNN"]) / 1e9
                rows.append(
                    {
                        "case": case, "stage": stage, "tokens": tokens, "weight": name, "C": channels,
                        "MKL / oneDNN": f"{middle:.2f}", "min": f"{low:.2f}", "max": f"{high:.2f}",
                        "oneDNN GFLOP/s": f"{rate:.0f}",
                        "chosen": "oneDNN" if gemm.onednn_is_faster(x, w) else "MKL",
                    }
                )  # fmt: skip
                print(*rows[-1].values(), flush=True)
    print(write_csv("gemm_cpu_float32", rows, conditions(torch.device("cpu"), args.threads)))


if __name__ == "__main__":
    main()
