"""The packed and the dense depthwise 7x7 convolution, forward and backward, against the time that their bytes take.

    python -m benchmarks.depthwise                                          # two CPU cores, float32
    python -m benchmarks.depthwise --device cuda --dtype bfloat16 --batch 256 --backends eager fused triton

Bytes moved: the forward reads its input and writes its output, the backward reads input and gradient and writes a
gradient. Memory's speed is that of copying a large tensor, in turn with the rest.
"""

import argparse
import statistics
from typing import Any

import timm
import torch

import timm_convnextv2  # noqa: F401  (registers the models)
from benchmarks.measure import Candidates, add_machine_options, conditions, device_kind, write_csv
from timm_convnextv2.models.masking import num_visible, random_mask
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.ops import use_backend

COPIED = 64 * 2**20  # numbers


def copy_step(device: str, dtype: str):
    """Copies `COPIED` numbers."""
    x = torch.zeros(COPIED, device=device, dtype=getattr(torch, dtype))
    y = torch.zeros_like(x)
    return lambda: y.copy_(x)


def mix_step(backend: str, size: str, stage: int, packed: bool, batch: int, device: str, dtype: str):
    """Forward and backward of a stage's depthwise convolution: visible patches at mask ratio 0.6, or whole images."""
    torch.manual_seed(0)
    model: Any = timm.create_model(f"convnextv2_{size}").to(device, getattr(torch, dtype))
    conv, p = model.stages[stage].blocks[0].conv_dw, 8 >> stage
    keep = num_visible((7, 7), 0.6)
    rows, columns = (keep * p, p) if packed else (7 * p, 7 * p)
    x = torch.randn(batch, conv.in_channels, rows, columns, device=device, dtype=getattr(torch, dtype))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    grad, mask = torch.randn_like(x), random_mask(batch, (7, 7), 0.6)
    layout = PackedLayout(mask, keep, device=torch.device(device))

    def step() -> None:
        x.grad = conv.weight.grad = conv.bias.grad = None
        with use_backend(backend):
            (layout.mix(x, conv) if packed else conv(x)).backward(grad)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backends", nargs="+", default=["eager", "fused"])
    add_machine_options(parser, 15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    itemsize = getattr(torch, args.dtype).itemsize
    maps: Any = timm.create_model(f"convnextv2_{args.size}", features_only=True)
    dims = maps.feature_info.channels()
    for packed in (True, False):
        for stage, channels in enumerate(dims):
            where = (args.size, stage, packed, args.batch, args.device, args.dtype)
            make: dict[str, Any] = {name: (mix_step, (name, *where)) for name in args.backends}
            make["copy"] = (copy_step, (args.device, args.dtype))
            with Candidates(make, device, args.threads, warmup=5) as candidates:
                seconds = {k: statistics.median(v) for k, v in candidates.time(args.rounds).items()}
            tokens = args.batch * (num_visible((7, 7), 0.6) if packed else 49) * (8 >> stage) ** 2
            floor = 5 * tokens * channels * itemsize / (2 * COPIED * itemsize / seconds["copy"])
            for name in args.backends:
                what = "packed" if packed else "dense"
                times = f"{seconds[name] / floor:.1f}"
                row = {"what": what, "stage": stage, "channels": channels, "backend": name, "time / floor": times}
                rows.append(
                    {**row, "goal": "<= 1.6" if device.type == "cuda" else "-", "ms": f"{1e3 * seconds[name]:.2f}"}
                )
                print(
                    f"{what:6} stage {stage} {name:9}: {1e3 * seconds[name]:7.2f} ms, {times} x its bytes", flush=True
                )
    about = {**conditions(device, args.threads), "inputs": f"{args.size}, 224 px, batch {args.batch}, {args.dtype}"}
    print(write_csv(f"depthwise_{device_kind(device)}_{args.dtype}", rows, about))


if __name__ == "__main__":
    main()
