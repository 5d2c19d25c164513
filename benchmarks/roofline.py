"""What a GPU can make of the pretraining step: a prediction from bytes and FLOPs, written down before any measurement.

    python -m benchmarks.roofline

A kernel takes what its arithmetic takes or what its bytes take, whichever is more (`benchmarks.step_model` has the
kernels). 'limit' divides by the published peaks; 'expected' by the shares of them in `REACHED`, which are assumptions,
and no launch takes less than `LAUNCH`. Writes `benchmarks/results/roofline.json`; no GPU is needed.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch

import timm_convnextv2  # noqa: F401  (registers the models)
from benchmarks.measure import RESULTS, conditions
from benchmarks.step_model import Kernel, fcmae_kernels, masked_dense_step, total


class GPU(NamedTuple):
    """Published peaks: FLOP/s of matrix products in bfloat16 (without sparsity) and of float32, bytes/s of memory."""

    tensor: float
    vector: float
    memory: float


GPUS = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM: 1979 TFLOPS bfloat16 with sparsity, half without; 67 TFLOPS; 3.35 TB/s
    "H100 SXM": GPU(989.5e12, 67e12, 3.35e12),
    # NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM: 312 TFLOPS bfloat16; 19.5 TFLOPS; 2039 GB/s
    "A100 SXM 80 GB": GPU(312e12, 19.5e12, 2.039e12),
}
PEAK = GPU(1, 1, 1)
REACHED = GPU(0.7, 0.5, 0.8)  # shares of the peaks: good library GEMMs, conversions beside each product, streaming
LAUNCH = 2e-6  # seconds: about the shortest kernel, where the host is never late
CASES = {"atto": 1024, "tiny": 256, "base": 128, "large": 64}


def seconds(kernels: Iterable[Kernel], gpu: GPU, reached: GPU = PEAK, launch: float = 0) -> dict[str, float]:
    """Time by part."""
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        arithmetic = kernel.flops / (getattr(gpu, kernel.unit) * getattr(reached, kernel.unit))
        moving = kernel.bytes / (gpu.memory * reached.memory)
        found[kernel.part] += max(arithmetic, moving, kernel.launches * launch)
    return dict(found)


def is_model(kernel: Kernel) -> bool:
    """Whether its FLOPs are the model's: a matrix product or a depthwise convolution."""
    return kernel.unit == "tensor" or kernel.name.startswith("depthwise")


def forward_flops(kernels: Iterable[Kernel]) -> float:
    """Matrix products and depthwise convolutions of the forward: what a model's utilisation counts, three times."""
    return sum(k.flops for k in kernels if is_model(k) and not k.name.endswith("gradient"))


def predict(size: str, batch: int, gpu: GPU) -> dict[str, Any]:
    """Everything about a size on a GPU; times in ms."""
    model: Any = timm.create_model(f"fcmae_convnextv2_{size}", device="meta")
    ours, every = fcmae_kernels(model, batch), model.grid(*model.img_size)[0] * model.grid(*model.img_size)[1]
    compiled = fcmae_kernels(model, batch, visible=every, optimizer=False)
    eager = masked_dense_step(model, batch)

    def without_optimizer(kernels: list[Kernel]) -> list[Kernel]:
        return [k for k in kernels if k.part != "AdamW"]

    def expected(kernels: list[Kernel]) -> dict[str, float]:
        return seconds(kernels, gpu, REACHED, LAUNCH)

    parts = expected(ours)
    step = sum(v for k, v in parts.items() if k != "AdamW")
    limit = sum(seconds(without_optimizer(ours), gpu).values())
    products = [k for k in ours if is_model(k)]
    least = 3 * forward_flops(ours) / gpu.tensor
    flops, moved = total(without_optimizer(ours))
    ms = {part: round(1e3 * v, 3) for part, v in sorted(parts.items(), key=lambda item: -item[1])}
    return {
        "batch": batch,
        "TFLOPs": round(flops / 1e12, 3),
        "GB moved": round(moved / 1e9, 2),
        "limit, ms": round(1e3 * limit, 2),
        "expected, ms": round(1e3 * step, 2),
        "images/s": round(batch / (step + parts["AdamW"])),
        "dense with masks / ours": round(sum(expected(eager).values()) / step, 2),
        "dense with masks compiled / ours": round(sum(expected(compiled).values()) / step, 2),
        "share of visible model FLOPs": round(least / step, 3),
        "only GEMMs and depthwise: share of visible model FLOPs": round(least / sum(expected(products).values()), 3),
        "parts, ms": ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[f"{k}:{v}" for k, v in CASES.items()], metavar="SIZE:BATCH")
    args = parser.parse_args()
    about = conditions(torch.device("cpu"), torch.get_num_threads())
    about |= {"hardware": "none: predicted, not measured", "inputs": "224 px, mask ratio 0.6, bfloat16, backend triton"}
    result: dict[str, Any] = {
        **about,
        "peaks": {name: gpu._asdict() for name, gpu in GPUS.items()},
        "reached (assumed)": REACHED._asdict(),
        "shortest kernel (assumed), s": LAUNCH,
        "predicted": {},
    }
    for name, gpu in GPUS.items():
        for case in args.cases:
            size, batch = case.split(":")
            row = result["predicted"][f"{name}, {size}"] = predict(size, int(batch), gpu)
            print(name, size, *(f"{key}: {value};" for key, value in row.items()), flush=True)
    path = RESULTS / "roofline.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
