"""The official FCMAE on MinkowskiEngine against ours: the losses of one training, update by update.

    OFFICIAL_CONVNEXTV2=CHECKOUT python -m benchmarks.official_curve

CHECKOUT is a clone of https://github.com/facebookresearch/ConvNeXt-V2, and MinkowskiEngine must be built
(docs/performance.md). Both start from the same weights, see the same images and masks, and go their own ways with
AdamW. An update has one image: the official GRN sums over the batch, ours over an image. Writes the losses with their
conditions to `benchmarks/results/official_curve.csv`, what they add up to as JSON beside it, and a figure to `docs/`.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.measure import RESULTS, conditions, write_csv
from benchmarks.official_model import official_fcmae, official_loss, whole_grid
from timm_convnextv2 import FCMAE
from timm_convnextv2.data import DemoSource
from timm_convnextv2.models.masking import random_mask

ROOT = Path(__file__).parents[1]


def batches(model: FCMAE, updates: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An image of the demo set `[1, 3, H, W]` and its mask for each update."""
    source, size, drawn = DemoSource(updates, model.img_size[0]), model.img_size, []
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for i in range(updates):
        mask = random_mask(1, model.grid(*size), model.mask_ratio)
        while not whole_grid(mask):
            mask = random_mask(1, model.grid(*size), model.mask_ratio)
        drawn.append((((source[i] / 255 - mean) / std).unsqueeze(0).to(dtype), mask))
    return drawn


def train(
    model: nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], data: list, lr: float
) -> list[float]:
    """The loss before each update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for i, (images, mask) in enumerate(data):
        for group in optimizer.param_groups:
            warmup = min(1, (i + 1) / 20)
            group["lr"] = lr * warmup * 0.5 * (1 + math.cos(math.pi * i / len(data)))
        loss = loss_of(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if i % 50 == 0:
            print(f"update {i:4}: {losses[-1]:.4f}", flush=True)
    return losses


def plot(official: list[float], ours: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    top.plot(official, color="tab:orange", linewidth=3, label="official code on MinkowskiEngine")
    top.plot(ours, color="tab:blue", linewidth=1, label="timm_convnextv2")
    top.set(ylabel="loss of the update")
    top.legend()
    bottom.semilogy([max(abs(a - b) / a, 1e-9) for a, b in zip(official, ours, strict=True)], color="tab:grey")
    bottom.set(xlabel="update, of one image", ylabel="relative difference")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkout", default=os.environ.get("OFFICIAL_CONVNEXTV2"), help="of the official repository")
    parser.add_argument("--size", default="atto")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.checkout:
        parser.error("give --checkout or OFFICIAL_CONVNEXTV2: a clone of github.com/facebookresearch/ConvNeXt-V2")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model: Any = timm.create_model(f"fcmae_convnextv2_{args.size}", img_size=args.img_size).to(dtype)
    official = official_fcmae(Path(args.checkout), model).to(dtype)
    data = batches(model, args.updates, dtype)
    theirs = train(official, lambda x, mask: official_loss(official, x, mask), data, args.lr)
    print(f"official: {theirs[0]:.4f} to {theirs[-1]:.4f}", flush=True)
    ours = train(model, lambda x, mask: model(x, mask, return_pred=False).loss, data, args.lr)
    print(f"ours:     {ours[0]:.4f} to {ours[-1]:.4f}", flush=True)

    apart = [abs(a - b) / a for a, b in zip(theirs, ours, strict=True)]
    about = conditions(torch.device("cpu"), args.threads)
    about["inputs"] = f"{args.size}, {args.img_size} px, {args.updates} updates of one demo image, {args.dtype}"
    rows = [
        {"update": i, "official": f"{a:.8f}", "ours": f"{b:.8f}", "relative difference": f"{d:.2e}"}
        for i, (a, b, d) in enumerate(zip(theirs, ours, apart, strict=True))
    ]
    name = "official_curve" + ("" if args.dtype == "float32" else f"_{args.dtype}")
    print(write_csv(name, rows, about))
    last = slice(-20, None)
    summary = {
        **about,
        "official, mean of the last 20": sum(theirs[last]) / 20,
        "ours, mean of the last 20": sum(ours[last]) / 20,
        "relative difference, first update": apart[0],
        "relative difference, largest": max(apart),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(theirs, ours, ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
