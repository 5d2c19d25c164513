"""Classes that a segmenter finds in images, their measures, and figures of them beside the truth."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional as V

from ...files import whole_file
from ...report.images import save_rows
from ...runs.world import World, leave_signals_to_parent
from ..figures import as_rgb
from .masks import MaskedImages, as_float
from .segmenter import Segmenter
from .sliding import predict


class Confusion:
    """Counts of pixels, int64 `[true class, predicted class]` on the CPU, without targets of `ignore_index`."""

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, targets: Tensor) -> None:
        counted = targets != self.ignore_index
        pairs = targets[counted].long() * self.num_classes + predicted[counted].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.num_classes**2).view_as(self.counts)

    def join(self, others: Sequence[Tensor]) -> "Confusion":
        self.counts = torch.stack(list(others)).sum(0)
        return self

    def measures(self) -> dict[str, Any]:
        """`miou` over classes in the targets or predictions, pixel `accuracy`, `mean_accuracy` over classes in targets.

        `iou` has one number per class, None if it is in neither.
        """
        counts = self.counts.double()
        if not counts.sum():
            raise ValueError("No pixel has a class: all targets are the ignore index, so nothing can be measured.")
        hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = true + found - hits
        iou = hits / union
        return {
            "miou": float(iou[union > 0].mean()),
            "accuracy": float(hits.sum() / counts.sum()),
            "mean_accuracy": float((hits / true)[true > 0].mean()),
            "iou": [float(x) if n else None for x, n in zip(iou, union, strict=True)],
        }


class Inference(NamedTuple):
    """How a segmenter is run on whole images; see `sliding.predict`."""

    short_side: int | None = None  # pixels that the shorter side is resized to; None keeps the image's size
    window: int | None = None
    stride: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    amp_dtype: torch.dtype | None = None  # type of mixed precision, None for float32


WHOLE = Inference()


@torch.no_grad()
def find_classes(model: Segmenter, image: Tensor, inference: Inference = WHOLE) -> Tensor:
    """The class of each pixel, int64 `[H, W]` on the CPU, for an image `[C, H, W]` from `data.load_image`."""
    device = model.mean.device
    height, width = image.shape[-2:]
    x = as_float(image)[None].to(device)
    if inference.short_side is not None:
        factor = inference.short_side / min(height, width)
        x = V.resize(x, [max(1, round(height * factor)), max(1, round(width * factor))])
    with torch.autocast(device.type, inference.amp_dtype, enabled=inference.amp_dtype is not None):
        found = predict(
            model, x, scales=inference.scales, flip=inference.flip, window=inference.window, stride=inference.stride,
            size=(height, width),
        )  # fmt: skip
    return found[0].argmax(0).cpu()


def evaluate_segmenter(
    model: Segmenter, data: MaskedImages, inference: Inference = WHOLE, *, workers: int = 0, world: World | None = None,
    keep: int = 0
) -> tuple[dict[str, Any], dict[int, Tensor]]:  # fmt: skip
    """`Confusion.measures` of a segmenter in eval mode, and the classes `[H, W]` found in some images, by image index.

    The processes of `world` share the images, and each of them calls this. `keep` is the number of images, spread over
    the data, whose classes are returned.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    kept = {i * len(data) // keep for i in range(min(keep, len(data)))} if keep else set()
    part = list(range(rank, len(data), size))
    loader = DataLoader(
        Subset(data, part), batch_size=None, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=leave_signals_to_parent,
    )  # fmt: skip
    confusion = Confusion(len(data.classes), data.ignore_index)
    found: dict[int, Tensor] = {}
    for i, (image, target) in zip(part, loader, strict=True):
        classes = find_classes(model, image, inference)
        confusion.add(classes, target)
        if i in kept:
            found[i] = classes
    if world is not None:
        confusion.join(world.gather([confusion.counts]))
        found = {i: classes for others in world.gather([found]) for i, classes in others.items()}
    return confusion.measures(), found


def table(measures: dict[str, Any], classes: Sequence[str]) -> str:
    """IoU of each class, their mean, and accuracies, in percent."""
    width = max(14, *(len(name) for name in classes))
    means = {"mIoU": "miou", "accuracy": "accuracy", "mean accuracy": "mean_accuracy"}
    rows = [*zip(classes, measures["iou"], strict=True), *((name, measures[key]) for name, key in means.items())]
    lines = [f"{name:{width}}" + (f"{'-':>7}" if value is None else f"{100 * value:7.1f}") for name, value in rows]
    lines.insert(len(classes), "-" * (width + 7))
    return "\n".join([f"{'IoU of':{width}}", *lines, "in %; - if a class is neither in the masks nor found"])


def save_mask(classes: Tensor, path: str | Path, num_classes: int) -> None:
    """Writes classes `[H, W]` as an index PNG with a palette; as a 16-bit PNG for more than 256 classes."""
    if num_classes > 256:
        image = Image.fromarray(classes.numpy().astype(np.uint16))
    else:
        image = Image.fromarray(classes.numpy().astype(np.uint8))
        image.putpalette(palette(num_classes).flatten().tolist())
    with whole_file(path) as part:
        image.save(part, format="png")


def palette(num_classes: int) -> np.ndarray:
    """Distinct colours, uint8 `[num_classes, 3]`; class 0 is black."""
    colours = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85 - 0.35 * (i % 2), 0.95) for i in range(1, num_classes)]
    return np.round(255 * np.array([(0, 0, 0), *colours])).astype(np.uint8)


def save_segmentations(path: str | Path, data: MaskedImages, found: dict[int, Tensor], title: str = "") -> None:
    """Draws images, their masks and the classes found, by image index, as a PNG; grey pixels have no class."""
    from matplotlib.patches import Patch

    colours = palette(len(data.classes))
    rows, seen = [], set()
    for i in sorted(found):
        image, target = data[i]
        ignored = target == data.ignore_index
        truth = colours[target.masked_fill(ignored, 0).numpy()]
        truth[ignored.numpy()] = 128
        images = as_rgb(as_float(image), stretch=True).numpy(), truth, colours[found[i].numpy()]
        rows.append([*zip(images, ("", "", "") if rows else ("image", "mask", "found"), strict=True)])
        seen |= set(target[~ignored].unique().tolist()) | set(found[i].unique().tolist())
    legend = [Patch(color=tuple(colours[c] / 255), label=data.classes[c]) for c in sorted(seen)[:24]]
    save_rows(path, rows, (7.5, 0.8 + 2.2 * len(rows)), title, legend)
