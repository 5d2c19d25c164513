"""Segmentation as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runs.world import World
from ..backbone import Backbone
from ..config import Averaging, Compute, SegmentConfig, SegmentData, Sliding
from ..loop import Schedule
from ..task import Task, new_backbone
from .masks import MaskedImages, TrainSamples, TrainTransform, collate, open_split, read_classes
from .metrics import Inference, evaluate_segmenter, save_segmentations, table
from .segmenter import build_segmenter, export_segmenter


class SegmentationTask(Task):
    """UPerNet on images with masks."""

    name, command = "segmentation", "segment"
    fixed = ("channels", "auxiliary_channels")
    main_metric = ("mIoU", "miou")
    collate = staticmethod(collate)

    def __init__(self, config: SegmentConfig) -> None:
        options, crops, self._config = config.model, config.crops, config
        self._inference = inference_of(config.sliding, config.compute)
        self.classes = class_names(config.data)
        self.backbone = new_backbone(config)
        self.model = build_segmenter(
            self.backbone, len(self.classes), frozen=options.frozen, channels=options.channels,
            auxiliary_channels=options.auxiliary_channels, ignore_index=config.data.ignore_index, classes=self.classes,
        )  # fmt: skip
        if torch.distributed.is_initialized() and config.compute.device.startswith("cuda"):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.train = open_masks(config.data, "train", self.classes, self.backbone)
        self.validation = open_masks(config.data, "validation", self.classes, self.backbone)
        transform = TrainTransform(
            crops.img_size, self.backbone.mean, scale=crops.scale, short_side=config.sliding.short_side,
            hflip=crops.hflip, vflip=crops.vflip, colours=crops.colours, ignore_index=config.data.ignore_index,
        )  # fmt: skip
        self.samples = TrainSamples(self.train, transform, config.learning.seed)
        self.num_validation = len(self.validation)
        self.data = f"{len(self.train)} images of {len(self.classes)} classes"

    def schedule(self) -> Schedule:
        learning = self._config.learning
        return Schedule(learning.sched, learning.warmup_share, opt=learning.opt)

    def check(self) -> list[str]:
        notes = []
        for part, name in ((self.train, "train"), (self.validation, "validation")):
            absent = [cls for cls, pixels in zip(self.classes, part.check(), strict=True) if not pixels]
            if absent:
                notes.append(f"note: {len(absent)} classes have no pixel in {name}: {', '.join(absent[:5])}.")
            if part.unused:
                notes.append(f"note: {len(part.unused)} masks in {name} have no image and are not used.")
        return notes

    def evaluate(self, model: Any, world: World, shown: int) -> tuple[dict[str, Any], dict[int, Tensor]]:
        workers = self._config.compute.workers
        return evaluate_segmenter(model, self.validation, self._inference, workers=workers, world=world, keep=shown)

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        save_segmentations(path, self.validation, found, title)

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_segmenter(model, folder, **about)

    def finish(self, folder: Path, found: Any, metrics: dict[str, Any]) -> str:
        return table(metrics, self.classes)


def class_names(data: SegmentData) -> list[str]:
    return read_classes(data.classes or Path(data.data_dir) / "classes.txt")


def open_masks(data: SegmentData, split: str, classes: list[str], backbone: Backbone) -> MaskedImages:
    """The images and masks of a split, without the checks that read them."""
    return MaskedImages(
        *open_split(data.data_dir, split), classes, in_chans=backbone.in_chans, pixels=backbone.pixels,
        ignore_index=data.ignore_index, reduce_zero_label=data.reduce_zero_label,
    )  # fmt: skip


def inference_of(options: Sliding, compute: Compute) -> Inference:
    """How a segmenter runs on whole images, from the options."""
    more = (options.scales, options.flip) if isinstance(options, Averaging) else ((1.0,), False)
    return Inference(options.short_side, options.window, options.stride, *more, compute.autocast)
