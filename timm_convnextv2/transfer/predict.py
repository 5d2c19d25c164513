"""Exported detectors and segmenters on images, for the commands `predict` and for Python."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import build, from_keywords
from ..console import count, say
from ..data import MissingPackageError, Source, check_readable
from ..data.samples.batches import map_batches
from ..data.sources.open import open_images
from ..runs.device import check_device
from .backbone import as_float
from .config import Averaging, Compute
from .detection.coco import to_unit
from .detection.detector import open_exported
from .detection.soft_nms import use_soft_nms
from .segmentation.metrics import find_classes
from .segmentation.segmenter import Segmenter, open_segmenter

COMPUTE = Compute()  # the defaults of functions
Images = str | os.PathLike | Sequence[str | os.PathLike]


class ReadableImages:
    """The images of a source; those that cannot be decoded are named, counted and left out, up to a fraction."""

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit, self.bad = source, limit, 0

    def batches(
        self, to_unit: Callable[[Tensor], Tensor], batch_size: int, workers: int
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Batches of images, made float in 0..1 by `to_unit`, each with its name: its path below its folder."""
        total = len(self.source)
        check_readable(self.source)  # before each of them is named
        for batch in map_batches(self.source, to_unit, batch_size, range(-(-total // batch_size)), workers):
            for item in batch.items or ():
                if isinstance(item.error, MissingPackageError):
                    raise item.error
                if item.error is not None:
                    self.bad += 1
                    say(f"skipped: {item.error}", error=True)
            if self.bad == total or self.bad > self.limit * total:
                raise ValueError(f"{self.bad} of {total} images cannot be decoded (--max-bad-images {self.limit:g}).")
            yield [(item.name, item.image) for item in batch.items or () if item.image is not None]

    def end(self, what: str) -> int:
        """Prints what was done; returns the exit status, 1 if images were left out."""
        say(what + (f"; {count(self.bad, 'image')} skipped" if self.bad else ""))
        return int(bool(self.bad))


class Objects(NamedTuple):
    """The objects in an image, the surest first."""

    name: str  # of the image
    boxes: Tensor  # float [N, 4] in pixels: left, top, right, bottom
    classes: list[str]
    scores: Tensor  # float [N], 0 to 1
    masks: Tensor | None  # bool [N, H, W]; None if the model was trained on boxes only


class Pixelwise(NamedTuple):
    """The class of each pixel of an image."""

    name: str  # of the image
    classes: Tensor  # int64 [H, W], indices of the model's classes


@dataclass(frozen=True)
class Detector:
    """An exported detector: torchvision's `model` in eval mode, and the names of its labels 1, 2, ..."""

    model: Any
    classes: list[str]

    def predict(
        self, images: Images, *, min_score: float = 0.3, batch_size: int = 2, workers: int = COMPUTE.workers,
        amp: bool = False, max_bad_images: float = 1.0,
    ) -> list[Objects]:  # fmt: skip
        """Finds objects in files, folders or patterns, as `detect predict` does; undecodable ones are left out."""
        body = self.model.backbone.body
        source = open_images(images, body.in_chans, body.pixels)
        device, found = next(self.model.parameters()).device, []
        readable = ReadableImages(source, max_bad_images)
        for items in readable.batches(to_unit, batch_size, min(workers, len(source) - 1)):
            if not items:
                continue
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                results = self.model([image.to(device) for _, image in items])
            for (name, _), result in zip(items, results, strict=True):
                sure = (result["scores"] >= min_score).cpu()
                of = {key: value.float().cpu()[sure] for key, value in result.items()}
                names = [self.classes[int(label) - 1] for label in of["labels"]]
                masks = of["masks"][:, 0] >= 0.5 if "masks" in of else None
                found.append(Objects(name, of["boxes"], names, of["scores"], masks))
        return found


@dataclass(frozen=True)
class PixelClassifier:
    """An exported segmenter: the `model` in eval mode, and the names of its classes 0, 1, ..."""

    model: Segmenter
    classes: list[str]

    def predict(
        self, images: Images, *, workers: int = COMPUTE.workers, amp: bool = False, max_bad_images: float = 1.0,
        **averaging: Any,
    ) -> list[Pixelwise]:  # fmt: skip
        """Classifies the pixels of files, folders or patterns, as `segment predict` does; undecodable are left out.

        `averaging` are options such as `window=512` and `flip=True`, see `Averaging`.
        """
        how = build(Averaging, from_keywords(Averaging, averaging))
        backbone, dtype = self.model.backbone, torch.bfloat16 if amp else None
        source = open_images(images, backbone.in_chans, backbone.pixels)
        readable = ReadableImages(source, max_bad_images).batches(as_float, 1, min(workers, len(source) - 1))
        return [
            Pixelwise(name, find_classes(self.model, image, how, dtype)) for items in readable for name, image in items
        ]


def open_for_objects(
    name: str | os.PathLike, device: str = COMPUTE.device, nodata: float | None = None, soft_nms: str | None = None
) -> Detector:
    """Opens a detector that `detect train` or `export_detector` wrote: RUN, RUN/model or `hf-hub:USER/NAME`."""
    model, classes = open_exported(os.fspath(name), device, nodata)
    if soft_nms:
        use_soft_nms(model, soft_nms)
    return Detector(model, classes)


def open_for_pixels(
    name: str | os.PathLike, device: str = COMPUTE.device, nodata: float | None = None
) -> PixelClassifier:
    """Opens a segmenter that `segment train` or `export_segmenter` wrote: RUN, RUN/model or `hf-hub:USER/NAME`."""
    model = open_segmenter(os.fspath(name), check_device(device))
    model.backbone.read_with(nodata)
    return PixelClassifier(model, model.classes)
