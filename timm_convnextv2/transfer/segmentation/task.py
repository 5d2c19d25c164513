"""Segmentation as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ...console import check_same_classes, count
from ...report.classes import ClassResults, of_confusion
from ...runs.device import check_device
from ...runs.world import World
from ..config import SegmentConfig, SegmentEvalConfig
from ..figures import first
from ..loop import Samples, sampled
from ..task import Task, new_backbone
from ..yolo import find_yolo, read_yolo
from .masks import MaskCodes, MaskedImages, Pairs, TrainTransform, open_split, read_classes, read_colours
from .metrics import evaluate_segmenter, save_segmentations, table
from .segmenter import build_segmenter, export_segmenter, open_segmenter


class SegmentationTask(Task):
    """UPerNet on images with masks."""

    name, command = "segmentation", "segment"
    fixed = ("channels", "auxiliary_channels")
    main_metric = ("mIoU", "miou")
    collate = staticmethod(default_collate)
    model: Any

    def __init__(self, config: SegmentConfig | SegmentEvalConfig) -> None:
        self._data, self._how, self._compute = config.data, config.averaging, config.compute
        data, root, colours = config.data, Path(config.data.data_dir), ()
        file = Path(data.classes or root / "classes.txt")
        self._yolo = None if data.classes else find_yolo(file, root)
        if self._yolo:
            self.classes = ["background", *read_yolo(self._yolo, "val")[0]]
        else:
            self.classes = read_classes(file)
            if data.mask_colors:
                self.classes, colours = read_colours(self.classes)
        self._codes = MaskCodes(data.ignore_index, data.reduce_zero_label, data.mask_values, colours)
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
        # colours are distorted in 0..1, and standardising removes most of what is distorted
        colours = crops.colours and self.backbone.pixels.standardize is None
        transform = TrainTransform(
            crops.img_size, self.backbone.mean, scale=crops.scale, short_side=config.averaging.short_side,
            hflip=crops.hflip, vflip=crops.vflip, colours=colours, ignore_index=ignored,
        )  # fmt: skip
        self.samples = Samples(train, transform, config.learning.seed)
        self.data = f"{count(len(train), 'image')} of {count(len(self.classes), 'class')}"

    def _open(self, split: str) -> MaskedImages:
        """The images and masks of a split, without the checks that read them."""
        if self._yolo:
            labelled = read_yolo(self._yolo, {"validation": "val"}.get(split, split))[1]
            pairs = Pairs([image.path for image in labelled], labelled)
        else:
            pairs = open_split(self._data.data_dir, split, self._data.mask_suffix)
        reading: Any = dict(in_chans=self.backbone.in_chans, pixels=self.backbone.pixels)
        return MaskedImages(pairs, self.classes, codes=self._codes, **reading)

    def check(self) -> list[str]:
        notes = []
        parts = {"train": self.samples.data} if self.samples else {}
        for name, part in {**parts, "validation": self.validation}.items():
            counts = part.check()
            absent = [cls for cls, pixels in zip(self.classes, counts.classes, strict=True) if not pixels]
            what = f"{len(absent)} of {len(self.classes)} classes have no pixel in {name}: {first(absent, 5)}"
            if absent and name == "train" and not self._data.allow_absent:
                raise ValueError(f"{what}. Check the class file and the masks, or pass --allow-absent.")
            found = [what] if absent else []
            found += [f"left out {count(len(part.unused), 'mask')} without an image in {name}"] if part.unused else []
            if counts.ignored:
                found.append(f"{counts.ignored:.1%} of the pixels in {name} are ignored (no class)")
            notes += [f"note: {text}." for text in (*found, *(f"{name}: {note}" for note in counts.notes))]
        if self.samples:
            targets = [self.samples[key][1] for key in sampled(range(len(self.samples)))]
            if not any((target != self._data.ignore_index).any() for target in targets):
                raise ValueError(
                    f"No pixel of {len(targets)} training crops has a class. Check --img-size and --scale."
                )
        return notes

    def evaluate(
        self, model: Any, world: World | None = None, shown: int = 0
    ) -> tuple[dict[str, Any], dict[int, Tensor], ClassResults]:
        how: Any = dict(amp_dtype=self._compute.autocast, workers=self._compute.workers)
        confusion, found = evaluate_segmenter(model, self.validation, self._how, **how, world=world, keep=shown)
        metrics = confusion.measures()
        return metrics, found, of_confusion("IoU", "pixels", confusion.counts, self.classes, metrics["iou"])

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        save_segmentations(path, self.validation, found, title)

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_segmenter(model, folder, **about)

    def table(self, metrics: dict[str, Any]) -> str:
        return table(metrics, self.classes)
