"""Segmentation as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runs.world import World
from ..backbone import Backbone, create_backbone
from ..config import Averaging, Compute, SegmentConfig, SegmentData, Sliding
from ..loop import Schedule
from ..task import Task
from .masks import MaskedImages, TrainSamples, TrainTransform, open_split, read_classes
from .metrics import Inference, evaluate_segmenter, save_segmentations, table
from .segmenter import build_segmenter, export_segmenter


class SegmentationTask(Task):
    """UPerNet on images with masks."""

    name, command = "segmentation", "segment"
    fixed = ("channels", "auxiliary_channels")

    def __init__(self, config: SegmentConfig) -> None:
        options, crops, self._config = config.model, config.crops, config
        self._inference = inference_of(config.sliding, config.compute)
        self.classes = class_names(config.data)
        torch.manual_seed(config.learning.seed)
        self.backbone = create_backbone(
            config.start.model, pretrained=not options.from_scratch, in_chans=options.in_chans,
            drop_path_rate=options.drop_path, **options.model_kwargs,
        ).read_with(config.compute.nodata)  # fmt: skip
        self.model = build_segmenter(
            self.backbone, len(self.classes), frozen=options.frozen, channels=options.channels,
            auxiliary_channels=options.auxiliary_channels, ignore_index=config.data.ignore_index, classes=self.classes,
        )  # fmt: skip
        if torch.distributed.is_initialized() and config.compute.device.startswith("cuda"):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.train, self.validation = (
            open_masks(config.data, split, self.classes, self.backbone) for split in ("train", "validation")
        )
        transform = TrainTransform(
            crops.img_size, self.backbone.mean, scale=crops.scale, short_side=config.sliding.short_side,
            hflip=crops.hflip, vflip=crops.vflip, colours=crops.colours, ignore_index=config.data.ignore_index,
        )  # fmt: skip
        self.samples = TrainSamples(self.train, transform, config.learning.seed)
        self.num_validation = len(self.validation)
        self.data = f"{len(self.train)} images of {len(self.classes)} classes"

    def collate(self, samples: list) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` and classes `[B, H, W]`."""
        images, targets = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(targets)

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
        return evaluate_segmenter(
            model, self.validation, self._inference, workers=self._config.compute.workers, world=world, keep=shown
        )

    def draw(self, path: Path, found: Any, metrics: dict[str, Any], shown: int) -> None:
        save_segmentations(path, self.validation, found, f"epoch {metrics['epoch']}, mIoU {metrics['miou']:.3f}")

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_segmenter(model, folder, **about)

    def table(self, metrics: dict[str, Any]) -> str:
        return table(metrics, self.classes)


def class_names(data: SegmentData) -> list[str]:
    """Names of the classes of a data set."""
    return read_classes(data.classes or Path(data.data_dir) / "classes.txt")


def open_masks(data: SegmentData, split: str, classes: list[str], backbone: Backbone) -> MaskedImages:
    """The images and masks of a split, without the checks that read them."""
    return MaskedImages(
        *open_split(data.data_dir, split), classes, in_chans=backbone.in_chans, pixels=backbone.pixels,
        ignore_index=data.ignore_index, reduce_zero_label=data.reduce_zero_label,
    )  # fmt: skip


def inference_of(options: Sliding, compute: Compute) -> Inference:
    """How a segmenter runs on whole images, from the options.

    Raises:
        ValueError: --stride is larger than --window.
    """
    window, stride = options.window, options.stride
    if stride is not None and stride > (window or 0):
        raise ValueError(f"--stride is {stride}, expected 1 to --window, which is {window or 'not given'}.")
    averaging = options if isinstance(options, Averaging) else Averaging()
    return Inference(options.short_side, window, stride, averaging.scales, averaging.flip, compute.autocast)
