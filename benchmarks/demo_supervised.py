"""What labels can teach about the demo images: the encoder of the first command, trained with labels on fresh images.

    python -m benchmarks.demo_supervised

Measures how well the classes can be told apart. Writes `benchmarks/results/demo_supervised.csv`.
"""

import argparse
import time
from typing import Any

import timm
import torch
from timm.scheduler import CosineLRScheduler

import timm_convnextv2  # noqa: F401  registers the models
from benchmarks.measure import conditions, write_csv
from timm_convnextv2.data import DemoSource, Pixels
from timm_convnextv2.pretraining.resolve import DEMO_NETWORK

STORED, SIZE = 64, 56  # px; the centre of an image is taken, as in evaluation


def batch(source: DemoSource, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float `[B, 3, 56, 56]` and their classes."""
    edge = (STORED - SIZE) // 2
    images = torch.stack([source.read(i) for i in numbers])[..., edge : edge + SIZE, edge : edge + SIZE]
    return images, torch.tensor([source.label(i) for i in numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pixels = Pixels(standardize="channel")
    shape: Any = DEMO_NETWORK["model_kwargs"]
    rows = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        classes = DemoSource.classes
        model = timm.create_model("convnextv2_atto", num_classes=len(classes), patch_size=1, **shape)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
        schedule = CosineLRScheduler(optimizer, args.updates, warmup_t=args.updates // 10, t_in_epochs=False)
        train = DemoSource(args.updates * args.batch_size, STORED, seed=100 + seed, pixels=pixels)
        start = time.perf_counter()
        for update in range(args.updates):
            schedule.step_update(update)
            images, labels = batch(train, range(update * args.batch_size, (update + 1) * args.batch_size))
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        images, labels = batch(DemoSource(args.test, STORED, seed=99, pixels=pixels), range(args.test))
        with torch.inference_mode():
            top1 = 100 * (model(images).argmax(1) == labels).float().mean().item()
        minutes = round((time.perf_counter() - start) / 60, 1)
        rows.append(dict(seed=seed, updates=args.updates, top1=round(top1, 2), minutes=minutes))
        print(rows[-1], flush=True)
    about = conditions(torch.device("cpu"), args.threads)
    about["sets"] = f"fresh demo images in every update, and {args.test} others to test, each channel standardised"
    print(write_csv("demo_supervised", rows, about))


if __name__ == "__main__":
    main()
