"""The same training step (forward, loss, backward) by everybody: ours, the official code, masks in dense networks.

    python -m benchmarks.official --checkout CONVNEXT_V2                     # two CPU cores, float32
    python -m benchmarks.official --checkout CONVNEXT_V2 --device cuda --cases tiny:256

CONVNEXT_V2 is a clone of https://github.com/facebookresearch/ConvNeXt-V2; it and 'minkowski' need MinkowskiEngine
(docs/performance.md), and WarpConvNet needs CUDA (`benchmarks.warp_mixer`). All pretraining steps have the same
weights, images and masks, and find out in each step which patches are visible. A candidate that cannot run is named
with its reason. Times are taken in turn, each candidate in its own process on CPU, and written with their conditions
to `benchmarks/results/`.

SparK's way (a mask around every convolution, everything else dense) is 'dense with masks', `models.reference`, but for
LayerNorm, which SparK gathers and scatters, and for its decoder; it has no row of its own.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch

from benchmarks.measure import Candidates, add_machine_options, conditions, device_kind, ratio, write_csv
from benchmarks.official_model import SIZES, official_fcmae, official_loss
from benchmarks.pretrain_step import IMG_SIZE, dense_step, filled
from benchmarks.warp_mixer import warp_mix, why_not
from timm_convnextv2.models.masking import random_mask
from timm_convnextv2.models.packing import PackedLayout
from timm_convnextv2.models.reference import reference_forward
from timm_convnextv2.ops import backend, use_backend
from timm_convnextv2.ops.minkowski import engine

OURS, MINKOWSKI, OFFICIAL = "ours", "ours, backend minkowski", "official on MinkowskiEngine"
WARP = "ours, WarpConvNet as mixer"
MASKS, STOCK = "dense with masks", "supervised, stock timm"


def pretraining_step(
    which: str, size: str, batch: int, device: str, dtype: str, checkout: str | None = None
) -> Callable[[], None]:
    """A step of one candidate, by its name."""
    torch.manual_seed(0)
    model: Any = filled(timm.create_model(f"fcmae_convnextv2_{size}")).to(device)
    images = torch.randn(batch, 3, IMG_SIZE, IMG_SIZE, device=device)
    mask = random_mask(batch, model.grid(IMG_SIZE, IMG_SIZE), 0.6).to(device)
    trained, name = model, which.removesuffix(" compiled")
    if name == OFFICIAL:
        trained = official_fcmae(Path(str(checkout)), model).to(device)

    def forward() -> torch.Tensor:
        if name == OFFICIAL:
            return official_loss(trained, images, mask)
        if name == MASKS:
            return reference_forward(model, images, mask).loss
        if name == MINKOWSKI:
            with use_backend("minkowski"):
                return model(images, mask, return_pred=False).loss
        if name == WARP:
            with patch.object(PackedLayout, "mix", warp_mix):
                return model(images, mask, return_pred=False).loss
        return model(images, mask, return_pred=False).loss

    run = torch.compile(forward) if which.endswith(" compiled") else forward

    def step() -> None:
        trained.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = run()
        loss.backward()

    return step


def missing(size: str, batch: int, checkout: str | None, device: torch.device, dtype: str) -> dict[str, str]:
    """Which candidates cannot run here, and why."""
    reason = why_not(device, batch)
    reasons = {WARP: reason} if reason else {}
    try:
        built = engine()
    except RuntimeError as error:
        reasons |= dict.fromkeys((MINKOWSKI, OFFICIAL), str(error))
        return reasons
    if device.type == "cuda" and not built.is_cuda_available():
        reasons |= dict.fromkeys((MINKOWSKI, OFFICIAL), "MinkowskiEngine was built for the CPU alone")
    elif dtype != "float32":
        reasons[OFFICIAL] = "MinkowskiEngine's own convolutions compute in float32 and float64 only"
    elif not checkout:
        reasons[OFFICIAL] = "--checkout was not given"
    elif size not in SIZES:
        reasons[OFFICIAL] = f"the official code has no {size}"
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["atto:16", "tiny:8"], metavar="SIZE:BATCH")
    parser.add_argument("--checkout", metavar="DIR", help="a clone of facebookresearch/ConvNeXt-V2")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled candidates out")
    add_machine_options(parser, 7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    about = conditions(device, args.threads) | {"backend": backend(device)}
    about["inputs"] = f"{IMG_SIZE} px, {args.dtype}, {args.rounds} rounds in turn"
    for case in args.cases:
        size, batch = case.split(":")
        where = (size, int(batch), args.device, args.dtype)
        names = [OURS, MINKOWSKI, WARP, OFFICIAL, MASKS] + ([] if args.no_compile else [f"{MASKS} compiled"])
        make: dict[str, tuple] = {name: (pretraining_step, (name, *where, args.checkout)) for name in names}
        for end in ("",) if args.no_compile else ("", " compiled"):
            make[STOCK + end] = (dense_step, (f"stock{end}", size, int(batch), True, args.device, args.dtype))
        reasons = missing(size, int(batch), args.checkout, device, args.dtype)
        make = {name: built for name, built in make.items() if name not in reasons}
        with Candidates(make, device, args.threads) as candidates:
            seconds, peak, busy = candidates.time(args.rounds), candidates.peak, candidates.busy
        for name in make:
            middle, low, high = ratio(seconds[name], seconds[OURS])
            computed = f"{ratio(busy[name], busy[OURS])[0]:.2f}" if busy[name] else ""
            rows.append(
                {
                    "case": case, "candidate": name, "time / ours": f"{middle:.2f}", "min": f"{low:.2f}",
                    "max": f"{high:.2f}", "CPU time / ours": computed,
                    "median_s": f"{statistics.median(seconds[name]):.3f}", "peak MiB": f"{peak[name] / 2**20:.0f}",
                    "cannot run": "",
                }
            )  # fmt: skip
            print(f"{case:9} {name:30} {middle:.2f} ({low:.2f} to {high:.2f}), CPU time {computed}", flush=True)
        for name, why in reasons.items():
            rows.append(dict.fromkeys(rows[0], "") | {"case": case, "candidate": name, "cannot run": why})
            print(f"{case:9} {name:30} cannot run: {why}", flush=True)
        print(write_csv(f"official_{device_kind(device)}_{args.dtype}", rows, about), flush=True)


if __name__ == "__main__":
    main()
