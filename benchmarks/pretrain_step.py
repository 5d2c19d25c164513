"""Training steps (forward, loss, backward): FCMAE against dense-with-masks and supervised; dense against stock timm.

    python -m benchmarks.pretrain_step                                                  # two CPU cores, float32
    python -m benchmarks.pretrain_step --device cuda --dtype bfloat16 --cases tiny:256 base:128 --compile --profile

'Our' step runs the first of `--backends`; the others are compared with it. Prints ratios of times taken in turn within
this run (on CPU each candidate has its own process), and writes them with their conditions to `benchmarks/results/`.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models import convnext
from torch.utils.flop_counter import FlopCounterMode

import timm_convnextv2  # noqa: F401  (registers the models)
from benchmarks.measure import Candidates, add_machine_options, conditions, device_kind, ratio, write_csv
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.ops import use_backend
from timm_convnextv2.ops.dispatch import BACKENDS

IMG_SIZE = 224
DEFAULT_BACKENDS = {"cpu": ["fused"], "cuda": ["triton", "fused", "eager"]}
GEMMS = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")} | {
    "mkldnn::_linear_pointwise"
}

# a goal of every size, or of those named
GOALS = {
    "cpu": {
        "dense-with-masks reference / our step": {"atto": ">= 2.4", "tiny": ">= 3.3"},
        "supervised stock encoder / our step": {"tiny": ">= 3.0"},
        "our step at mask ratio 0.9 / at 0.6": {"tiny": "<= 0.5"},
        "dense training, stock timm / ours": ">= 1.35",
        "GEMM calls, share of our step": {"tiny": ">= 0.65"},
        "peak memory of the step, ours / reference (bytes)": "<= 0.4",
        "saved by dense training, ours / stock (bytes)": "<= 0.45",
    },
    "cuda": {
        "dense-with-masks reference / our step": {"tiny": ">= 4", "base": ">= 4"},
        "dense-with-masks reference compiled / our step": {"tiny": ">= 2.2", "base": ">= 2.2"},
        "visible FLOPs at the GPU's peak / our step": {"base": ">= 0.45", "large": ">= 0.45"},
        "dense training, stock timm / ours": {"tiny": ">= 1.8", "base": ">= 1.8"},
        "dense training, both compiled": {"tiny": ">= 1.2", "base": ">= 1.2"},
        "peak memory of dense training, ours / stock (bytes)": "<= 0.55",
    },
}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """GRN weights off zero, where they would hide work."""
    for name, p in model.named_parameters():
        if "grn" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def fcmae_step(
    which: str, size: str, batch: int, mask_ratio: float, device: str, dtype: str, img_size: int = IMG_SIZE,
    backend: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """A step of 'ours' or of the 'reference', ' compiled' or not; the same weights, images and masks for all.

    `backend` is of our operations, None for the default.
    """
    torch.manual_seed(0)
    model: Any = filled(timm.create_model(f"fcmae_convnextv2_{size}", mask_ratio=mask_ratio)).to(device)
    images = torch.randn(batch, 3, img_size, img_size, device=device)
    mask = random_mask(batch, model.grid(img_size, img_size), mask_ratio).to(device)
    layout = model.visible(images, mask)
    name, _, compiled = which.partition(" ")

    def forward() -> torch.Tensor:
        if name == "reference":
            return reference_forward(model, images, mask).loss
        return model(images, layout, return_pred=False).loss

    run = torch.compile(forward) if compiled else forward

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with (
            use_backend(backend) if backend else nullcontext(),
            torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"),
        ):
            loss = run()
        loss.backward()

    step.forward = forward
    return step


def dense_step(
    which: str, size: str, batch: int, train: bool, device: str, dtype: str, backend: str | None = None
) -> Callable[[], None]:
    """A step of the dense encoder without classifier: 'stock' timm's class or 'ours', ' compiled' or not."""
    torch.manual_seed(0)
    name, _, compiled = which.partition(" ")
    create = (
        getattr(convnext, f"convnextv2_{size}")
        if name == "stock"
        else timm.models.model_entrypoint(f"convnextv2_{size}")
    )
    model = filled(create(num_classes=0)).to(device).train(train)
    images = torch.randn(batch, 3, IMG_SIZE, IMG_SIZE, device=device)
    if torch.device(device).type == "cuda":
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with (
            use_backend(backend) if backend else nullcontext(),
            torch.set_grad_enabled(train),
            torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"),
        ):
            out = run(images)
        if train:
            out.square().mean().backward()

    step.model = model
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["atto:16", "tiny:8"], metavar="SIZE:BATCH")
    add_machine_options(parser, 7)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: fused; on CUDA triton fused eager")
    parser.add_argument("--compile", action="store_true", help="also each candidate compiled")
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="of the GPU, for its utilisation (H100, bfloat16)"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of our step goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    backend, *others = args.backends or DEFAULT_BACKENDS[device.type]
    about = conditions(device, args.threads) | {"backend": backend}
    about["inputs"] = f"{IMG_SIZE} px, {args.dtype}, {args.rounds} rounds in turn"
    result = f"pretrain_step_{device_kind(device)}_{args.dtype}" + ("_compiled" if args.compile else "")

    def compare(case: str, measure: str, goal: str, a: list[float], b: list[float]) -> None:
        middle, low, high = ratio(a, b)
        rows.append(
            {
                "case": case, "measure": measure, "ratio": f"{middle:.2f}", "min": f"{low:.2f}", "max": f"{high:.2f}",
                "goal": goal, "median_a_s": f"{statistics.median(a):.4f}", "median_b_s": f"{statistics.median(b):.4f}",
            }
        )  # fmt: skip
        print(f"{case:9} {measure:52} {middle:5.2f}  ({low:.2f} to {high:.2f})  goal {goal}", flush=True)

    for case in args.cases:
        size, batch = case.split(":")
        where = (args.device, args.dtype)
        own = (*where, IMG_SIZE, backend)
        make = {
            "ours": (fcmae_step, ("ours", size, int(batch), 0.6, *own)),
            "reference": (fcmae_step, ("reference", size, int(batch), 0.6, *where)),
            "ours 0.9": (fcmae_step, ("ours", size, int(batch), 0.9, *own)),
            "stock train": (dense_step, ("stock", size, int(batch), True, *where)),
            "our train": (dense_step, ("ours", size, int(batch), True, *where, backend)),
        }
        if args.dtype == "float32":
            make["ours bfloat16"] = (fcmae_step, ("ours", size, int(batch), 0.6, args.device, "bfloat16", *own[2:]))
        for name in others:
            make[f"ours {name}"] = (fcmae_step, ("ours", size, int(batch), 0.6, *where, IMG_SIZE, name))
            make[f"our train {name}"] = (dense_step, ("ours", size, int(batch), True, *where, name))
        if args.compile:
            for name in ("ours", "reference", "stock train", "our train"):
                build, (which, *rest) = make[name]
                make[f"{name} compiled"] = (build, (f"{which} compiled", *rest))
        with Candidates(make, device, args.threads) as candidates:
            seconds, peak = candidates.time(args.rounds), candidates.peak
        goals = GOALS["cuda" if device.type == "cuda" else "cpu"]

        def pair(measure: str, a: list[float], b: list[float], case=case, size=size, goals=goals) -> None:
            goal = goals.get(measure, "-")
            compare(case, measure, goal if isinstance(goal, str) else goal.get(size, "-"), a, b)

        pair("dense-with-masks reference / our step", seconds["reference"], seconds["ours"])
        pair("supervised stock encoder / our step", seconds["stock train"], seconds["ours"])
        pair("our step at mask ratio 0.9 / at 0.6", seconds["ours 0.9"], seconds["ours"])
        pair("dense training, stock timm / ours", seconds["stock train"], seconds["our train"])
        for name in others:
            pair(f"our step, backend {name} / {backend}", seconds[f"ours {name}"], seconds["ours"])
            pair(f"dense training, backend {name} / {backend}", seconds[f"our train {name}"], seconds["our train"])
        if args.dtype == "float32":
            pair("our step in float32 / in bfloat16", seconds["ours"], seconds["ours bfloat16"])
        if args.compile:
            fastest = min(("ours", "ours compiled"), key=lambda name: statistics.median(seconds[name]))
            pair("dense-with-masks reference compiled / our step", seconds["reference compiled"], seconds[fastest])
            pair("dense training, stock timm compiled / ours", seconds["stock train compiled"], seconds["our train"])
            pair("dense training, both compiled", seconds["stock train compiled"], seconds["our train compiled"])
        build, arguments = make["ours"]
        step = build(*arguments)
        gemm = [gemm_seconds(step, device)] * args.rounds
        pair("GEMM calls, share of our step", gemm, seconds["ours"])
        if device.type == "cuda":
            least = [step_flops(step) / (args.peak_tflops * 1e12)] * args.rounds
            pair("visible FLOPs at the GPU's peak / our step", least, seconds["ours"])
        if args.profile:
            _profile(step, device)
        del step
        memory = {name: [float(number)] for name, number in peak.items()}
        pair("peak memory of the step, ours / reference (bytes)", memory["ours"], memory["reference"])
        pair("peak memory of dense training, ours / stock (bytes)", memory["our train"], memory["stock train"])
        ours, stock = ([float(saved_bytes(*make[name]))] for name in ("our train", "stock train"))
        pair("saved by dense training, ours / stock (bytes)", ours, stock)
        print(write_csv(result, rows, about), flush=True)


def gemm_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Time that a step spends in matrix products, median of three."""
    for _ in range(2):
        step()
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    field, found = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total", []
    for _ in range(3):
        with torch.profiler.profile(activities=activities) as profiler:
            step()
        found.append(sum(getattr(event, field) for event in profiler.key_averages() if event.key in GEMMS) / 1e6)
    return statistics.median(found)


def step_flops(step: Callable[[], None]) -> int:
    """Of the visible patches: the forward's, and twice as many in the backward."""
    # the fused operations count what they compute, the plain ones a map with zeros in it
    with use_backend("fused"), FlopCounterMode(display=False) as counter:
        step.forward()
    return 3 * counter.get_total_flops()


def saved_bytes(make: Callable[..., Callable[[], None]], arguments: tuple) -> int:
    """What a step keeps between forward and backward, beside parameters: bytes of distinct storages."""
    step, storages = make(*arguments), {}
    parameters = {p.untyped_storage().data_ptr() for p in step.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(storages.values())


def _profile(step: Callable[[], None], device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


if __name__ == "__main__":
    main()
