"""Classes that a segmenter finds in images, their measures, and figures of them beside the truth."""

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from ...data.display import display_of
from ...report.images import save_rows
from ...runs.world import World
from ..backbone import as_float
from ..config import Averaging
from ..figures import save_image
from ..loop import shared_loader
from .heads import resize
from .masks import MaskedImages
from .segmenter import Segmenter

Model = Callable[[Tensor], Tensor]
WHOLE = Averaging()  # whole images


class Confusion:
    """Counts of pixels, int64 `[true class, predicted class]` on the CPU, without targets of `ignore_index`."""

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, targets: Tensor) -> None:
        counted = targets != self.ignore_index
        pairs = targets[counted].long() * self.num_classes + predicted[counted].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.num_classes**2).view_as(self.counts)

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


def slide(model: Model, images: Tensor, window: int, stride: int | None = None) -> Tensor:
    """Logits `[B, K, H, W]` as the mean over windows of `window` pixels that cover the images `[B, C, H, W]`.

    The last window of a row and of a column ends at the image's edge; a smaller image is one window. `stride` is two
    thirds of the window if None, as in the official code.
    """
    stride = max(1, window * 2 // 3) if stride is None else stride
    height, width = images.shape[-2:]
    rows, columns = ([*range(0, max(0, n - window), stride), max(0, n - window)] for n in (height, width))
    total, counts = None, images.new_zeros(height, width)
    for top in rows:
        for left in columns:
            area = (..., slice(top, top + window), slice(left, left + window))
            logits = model(images[area])
            total = logits.new_zeros(*logits.shape[:2], height, width) if total is None else total
            total[area] += logits
            counts[area] += 1
    assert total is not None
    return total / counts


def predict(model: Model, images: Tensor, how: Averaging = WHOLE, size: tuple[int, int] | None = None) -> Tensor:
    """Class probabilities `[B, K, height, width]` of images `[B, C, H, W]` as the mean over scales and flips.

    The model makes logits `[B, K, h, w]` in eval mode. Scales are factors of the images' size; the paper's multi-scale
    test has 0.75 to 1.25. `size` is the height and width of the result, by default the images'.
    """
    height, width = images.shape[-2:]
    size, total = size or (height, width), images.new_zeros(())
    for scale in how.scales:
        shape = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = images if shape == (height, width) else resize(images, shape)
        for mirrored in (False, True) if how.flip else (False,):
            x = scaled.flip(-1) if mirrored else scaled
            logits = model(x) if how.window is None else slide(model, x, how.window, how.stride)
            logits = logits.flip(-1) if mirrored else logits
            logits = logits if logits.shape[-2:] == size else resize(logits, size)
            total = total + logits.softmax(1)  # a sum, as the parts do not all fit in memory
    return total / (len(how.scales) * (2 if how.flip else 1))


@torch.no_grad()
def find_classes(
    model: Segmenter, image: Tensor, how: Averaging = WHOLE, amp_dtype: torch.dtype | None = None
) -> Tensor:
    """The class of each pixel, int64 `[H, W]` on the CPU, for an image `[C, H, W]` from `data.load_image`."""
    device, (height, width), x = model.mean.device, image.shape[-2:], as_float(image)[None]
    if how.short_side is not None:
        factor = how.short_side / min(height, width)
        x = V.resize(x, [max(1, round(height * factor)), max(1, round(width * factor))])
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        return predict(model, x.to(device), how, (height, width))[0].argmax(0).cpu()


def evaluate_segmenter(
    model: Segmenter, data: MaskedImages, how: Averaging = WHOLE, *, amp_dtype: torch.dtype | None = None,
    workers: int = 0, world: World | None = None, keep: int = 0
) -> tuple[Confusion, dict[int, Tensor]]:  # fmt: skip
    """Counts of a segmenter in eval mode, and the classes `[H, W]` found in some images, by image index.

    The processes of `world` share the images, and each of them calls this. `keep` is the number of images, spread over
    the data, whose classes are returned.
    """
    kept = {i * len(data) // keep for i in range(min(keep, len(data)))} if keep else set()
    part, loader = shared_loader(data, world, workers, batch_size=None)
    confusion, found = Confusion(len(data.classes), data.ignore_index), {}
    for i, (image, target) in zip(part, loader, strict=True):
        classes = find_classes(model, image, how, amp_dtype)
        confusion.add(classes, target)
        if i in kept:
            found[i] = classes
    if world is not None:
        confusion.counts = torch.stack(world.gather([confusion.counts])).sum(0)
        found = {i: classes for others in world.gather([found]) for i, classes in others.items()}
    return confusion, found


def table(measures: dict[str, Any], classes: Sequence[str]) -> str:
    """IoU of each class, their mean, and accuracies."""
    width = max(14, *(len(name) for name in classes))
    means = {"mIoU": "miou", "accuracy": "accuracy", "mean accuracy": "mean_accuracy"}
    rows = [*zip(classes, measures["iou"], strict=True), *((name, measures[key]) for name, key in means.items())]
    lines = [f"{name:{width}}" + (f"{'-':>7}" if value is None else f"{value:7.3f}") for name, value in rows]
    lines.insert(len(classes), "-" * (width + 7))
    return "\n".join([f"{'IoU of':{width}}", *lines, "from 0 to 1; - if a class is neither in the masks nor found"])


def save_mask(classes: Tensor, path: str | Path, num_classes: int) -> None:
    """Writes classes `[H, W]` as an index PNG with a palette; as a 16-bit PNG for more than 256 classes."""
    image = Image.fromarray(classes.numpy().astype(np.uint8 if num_classes <= 256 else np.uint16))
    if num_classes <= 256:
        image.putpalette(palette(num_classes).flatten().tolist())
    save_image(path, image)


def palette(num_classes: int) -> np.ndarray:
    """Distinct colours, uint8 `[num_classes, 3]`; class 0 is black."""
    colours = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85 - 0.35 * (i % 2), 0.95) for i in range(1, num_classes)]
    return np.round(255 * np.array([(0, 0, 0), *colours])).astype(np.uint8)


def overlay(image: Tensor, classes: Tensor, num_classes: int) -> np.ndarray:
    """An image `[C, H, W]` with the colours of its classes `[H, W]` over it, uint8 `[H, W, 3]`."""
    shown = display_of([image]).rgb(image).numpy()
    return np.round(255 * shown / 2 + palette(num_classes)[classes.numpy()] / 2).astype(np.uint8)


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
        images = display_of([image]).rgb(image).numpy(), truth, colours[found[i].numpy()]
        rows.append([*zip(images, ("", "", "") if rows else ("image", "mask", "found"), strict=True)])
        seen |= {*target[~ignored].unique().tolist(), *found[i].unique().tolist()}
    legend = [Patch(color=tuple(colours[c] / 255), label=data.classes[c]) for c in sorted(seen)[:24]]
    save_rows(path, rows, (7.5, 0.8 + 2.2 * len(rows)), title, legend)
