"""What a finetuned classifier does with the validation images: results per class, surest mistakes and hits."""

import heapq
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from ..checkpoint.loading import load_model
from ..console import say
from ..data.display import display_of
from ..data.samples.batches import map_batches, preprocessing
from ..data.sources.files import ImageFiles
from ..report.classes import of_confusion, write_classes
from ..report.images import save_rows
from ..runs.progress import ImageProgress
from .plan import Plan

SHOWN = 6  # images of each kind
Seen = tuple[float, int, int, torch.Tensor]  # probability of the prediction, index of the image, prediction, image


def describe_classes(plan: Plan, model: Path, epoch: int) -> None:
    """Runs the exported model on the validation images; writes `classes.json` and `predictions/` to the run's folder.

    Images that cannot be decoded are left out and counted. Does nothing if train.py opened the data itself.
    """
    if len(plan.splits) < 2:
        return
    split, options = plan.splits[1], plan.options
    network: Any = load_model(f"local-dir:{model}").eval().to(options.device)
    config = resolve_model_data_config(network)
    source = ImageFiles([path for path, _ in split.samples], config["input_size"][0], plan.pixels)
    names = [*split.classes, *map(str, range(len(split.classes), network.num_classes))]
    size, sides = options.batch_size, ([], [])  # mistakes, hits
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    numbers = range(-(-len(source) // size))
    bar = ImageProgress(len(source))
    for batch in map_batches(source, preprocessing(config), size, numbers, min(options.workers, len(numbers) - 1)):
        whole = [item for item in batch.items or () if item.image is not None]
        images: Any = [item.image for item in whole]
        bar.update(batch.count)
        if not images:
            continue
        with torch.inference_mode():
            chances = network(torch.stack(images).to(options.device)).float().softmax(-1).cpu()
        for item, image, chance in zip(whole, images, chances, strict=True):
            label, found = split.samples[item.index][1], int(chance.argmax())
            counts[label, found] += 1
            side = sides[label == found]
            side[:] = heapq.nlargest(SHOWN, [*side, (float(chance[found]), item.index, found, image)])
    bar.close()
    if left := len(source) - int(counts.sum()):
        say(f"warning: {left} validation images cannot be decoded; the results per class lack them", error=True)
    of_class = [row[i].item() / total if (total := row.sum().item()) else None for i, row in enumerate(counts)]
    write_classes(plan.folder, of_confusion("accuracy", "images", counts, names, of_class))
    if any(sides):
        _draw(plan.folder / "predictions" / f"epoch-{epoch:04d}.png", sides, split.samples, names)


def _draw(path: Path, sides: tuple[list[Seen], list[Seen]], samples: list[tuple[str, int]], names: list[str]) -> None:
    """Surest mistakes above, surest hits below."""
    display = display_of([image for side in sides for *_, image in side])
    rows = []
    for side in filter(None, sides):
        row: list[Any] = []
        for chance, index, found, image in side:
            label = samples[index][1]
            wrong = "" if label == found else f"\ntaken for {names[found]}"
            row.append((display.rgb(image), f"{names[label]}{wrong}, {chance:.0%}"))
        rows.append(row + [("", "")] * (SHOWN - len(row)))
    kinds = [kind for kind, side in zip(("surest mistakes", "surest hits"), sides, strict=True) if side]
    save_rows(path, rows, (1.7 * SHOWN, 0.4 + 2 * len(rows)), f"{', then '.join(kinds)}; {display}")
