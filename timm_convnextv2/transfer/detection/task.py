"""Detection as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN

from ...console import check_same_classes
from ...files import write_json
from ...runs.device import check_device
from ...runs.world import World
from ..backbone import Backbone
from ..config import DetectConfig, DetectEvalConfig, DetectUse
from ..loop import Samples
from ..task import Task, new_backbone
from .coco import (
    CATEGORIES_DIFFER,
    Coco,
    DetectionImages,
    check_sizes,
    collate,
    large_scale_jitter,
    open_coco,
    rle_codec,
)
from .detector import backbone_of, build_detector, export_detector, made_of_detector, open_with_classes
from .metrics import Result, evaluate_detector, save_found, table
from .soft_nms import use_soft_nms


class DetectionTask(Task):
    """Mask R-CNN or Faster R-CNN on annotated images."""

    name, command = "detection", "detect"
    main_metric = ("box AP", "box_ap")
    fixed = ("boxes_only", "out_channels")
    collate = staticmethod(collate)
    model: Any

    def __init__(self, config: DetectConfig | DetectEvalConfig) -> None:
        rle_codec()
        self._how: Any = dict(workers=config.compute.workers, amp_dtype=config.compute.autocast)
        if isinstance(config, DetectEvalConfig):
            self.model, self.classes, self.backbone = open_exported(config)
            self._how["batch_size"] = config.batch_size
            masks = not made_of_detector(self.model)["boxes_only"]
            coco = self._open(config, "val", masks)
            where = (f"'{coco.file}'", f"the model '{config.model}'")
            check_same_classes(coco.classes, self.classes, where, remedy=CATEGORIES_DIFFER)
            self.validation = self._images(coco, masks)
        else:
            self._create(config)

    def _create(self, config: DetectConfig) -> None:
        options, crops, learning, masks = config.backbone, config.crops, config.learning, not config.backbone.boxes_only
        coco, validation = (self._open(config, split, masks) for split in ("train", "val"))
        if not coco.annotations:
            raise ValueError(f"'{coco.file}' has no annotations: there is nothing to learn.")
        files = (f"'{validation.file}'", f"'{coco.file}'")
        check_same_classes(validation.classes, coco.classes, files, remedy=CATEGORIES_DIFFER)
        self.backbone, self._how["batch_size"] = new_backbone(config), learning.batch_size
        train, self.validation = self._images(coco, masks), self._images(validation, masks)
        short, long = options.test_size or (crops.img_size, crops.img_size)
        self.model = build_detector(
            self.backbone, len(coco.classes), boxes_only=options.boxes_only, frozen=options.frozen,
            out_channels=options.out_channels, min_size=short, max_size=long,
            _skip_resize=True,  # in training large_scale_jitter has resized already
            **options.detector_kwargs,
        )  # fmt: skip
        jitter = large_scale_jitter(crops.img_size, crops.scale, hflip=crops.hflip, vflip=crops.vflip)
        self.samples, self.classes = Samples(train, jitter, learning.seed), coco.classes
        self.data = f"{len(coco.images)} images with {len(coco.annotations)} objects of {len(coco.classes)} classes"

    def _open(self, config: Any, split: str, masks: bool) -> Coco:
        data, root = config.data, Path(config.data.data_dir)
        images = root / getattr(data, f"{split}_images")
        return open_coco(root / getattr(data, split), images, masks=masks, drop_wrong=data.drop_wrong)

    def _images(self, coco: Coco, masks: bool) -> DetectionImages:
        return DetectionImages(coco, masks=masks, in_chans=self.backbone.in_chans, pixels=self.backbone.pixels)

    def check(self) -> list[str]:
        parts = [self.validation.coco, *([self.samples.data.coco] if self.samples else ())]
        for coco in parts:
            check_sizes(coco, self.backbone.in_chans, self.backbone.pixels)
        left_out = sum(coco.left_out for coco in parts)
        return [f"note: {left_out} wrong annotations are left out."] if left_out else []

    def evaluate(self, model: Any, world: World | None = None, shown: int = 0) -> tuple[dict[str, float], list[Result]]:
        return evaluate_detector(model, self.validation, world=world, **self._how)

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        images = self.validation.coco.images
        save_found(path, self.validation, found, [i.id for i in images if i.annotations][:shown] or [images[0].id])

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_detector(model, folder, classes=self.classes, **about)

    def table(self, metrics: dict[str, Any]) -> str:
        return table(metrics)

    def write_found(self, path: Path, found: Any) -> None:
        write_json(path, found)


def open_exported(config: DetectUse) -> tuple[FasterRCNN, list[str], Backbone]:
    """The detector of `eval` and `predict`, its classes, and how it reads images."""
    device = check_device(config.compute.device)
    detector, classes = open_with_classes(config.model)
    if config.soft_nms:
        use_soft_nms(detector, config.soft_nms)
    return detector.to(device), classes, backbone_of(detector).read_with(config.compute.nodata)
