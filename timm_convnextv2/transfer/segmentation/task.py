"""Segmentation as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...console import check_same_classes
from ...runs.device import check_device
from ...runs.world import World
from ..config import SegmentConfig, SegmentEvalConfig
from ..loop import Samples
from ..task import Task, new_backbone
from .masks import MaskedImages, TrainTransform, collate, open_split, read_classes
from .metrics import evaluate_segmenter, save_segmentations, table
from .segmenter import build_segmenter, export_segmenter, open_segmenter


class SegmentationTask(Task):
    """UPerNet on images with masks."""

    name, command = "segmentation", "segment"
    fixed = ("channels", "auxiliary_channels")
    main_metric = ("mIoU", "miou")
    collate = staticmethod(collate)
    model: Any

    def __init__(self, config: SegmentConfig | SegmentEvalConfig) -> None:
        self._data, self._how, self._compute = config.data, config.averaging, config.compute
        self.classes = read_classes(config.data.classes or Path(config.data.data_dir) / "classes.txt")
        if isinstance(config, SegmentEvalConfig):
            self.model = open_segmenter(config.model, check_device(config.compute.device))
            remedy = "Pass the --classes that the model was trained with, or train a model on these."
            where = ("the data", f"the model '{config.model}'")
            check_same_classes(self.classes, self.model.classes, where, remedy=remedy)
            self.backbone = self.model.backbone.read_with(config.compute.nodata)
            self.validation = self._open(config.split)
        else:
            self._create(config)

    def _create(self, config: SegmentConfig) -> None:
        options, crops, ignored = config.backbone, config.crops, config.data.ignore_index
        self.backbone = new_backbone(config)
        self.model = build_segmenter(
            self.backbone, len(self.classes), frozen=options.frozen, channels=options.channels,
            auxiliary_channels=options.auxiliary_channels, ignore_index=ignored, classes=self.classes,
        )  # fmt: skip
        if torch.distributed.is_initialized() and config.compute.device.startswith("cuda"):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        train, self.validation = self._open("train"), self._open("validation")
        transform = TrainTransform(
            crops.img_size, self.backbone.mean, scale=crops.scale, short_side=config.averaging.short_side,
            hflip=crops.hflip, vflip=crops.vflip, colours=crops.colours, ignore_index=ignored,
        )  # fmt: skip
        self.samples = Samples(train, transform, config.learning.seed)
        self.data = f"{len(train)} images of {len(self.classes)} classes"

    def _open(self, split: str) -> MaskedImages:
        """The images and masks of a split, without the checks that read them."""
        folders, data = open_split(self._data.data_dir, split), self._data
        return MaskedImages(
            *folders, self.classes, in_chans=self.backbone.in_chans, pixels=self.backbone.pixels,
            ignore_index=data.ignore_index, reduce_zero_label=data.reduce_zero_label,
        )  # fmt: skip

    def check(self) -> list[str]:
        notes = []
        for part, name in ((self.samples and self.samples.data, "train"), (self.validation, "validation")):
            if part is None:
                continue
            absent = [cls for cls, pixels in zip(self.classes, part.check(), strict=True) if not pixels]
            if absent:
                notes.append(f"note: {len(absent)} classes have no pixel in {name}: {', '.join(absent[:5])}.")
            if part.unused:
                notes.append(f"note: {len(part.unused)} masks in {name} have no image and are not used.")
        return notes

    def evaluate(
        self, model: Any, world: World | None = None, shown: int = 0
    ) -> tuple[dict[str, Any], dict[int, Tensor]]:
        how: Any = dict(amp_dtype=self._compute.autocast, workers=self._compute.workers)
        return evaluate_segmenter(model, self.validation, self._how, **how, world=world, keep=shown)

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        save_segmentations(path, self.validation, found, title)

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_segmenter(model, folder, **about)

    def table(self, metrics: dict[str, Any]) -> str:
        return table(metrics, self.classes)
