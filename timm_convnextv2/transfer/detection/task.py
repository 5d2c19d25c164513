"""Detection as a task of `transfer.task`."""

from collections import Counter
from pathlib import Path
from typing import Any

from ...console import check_same_classes, count
from ...files import write_json
from ...report.classes import ClassResult, ClassResults
from ...runs.world import World
from ..config import DetectConfig, DetectEvalConfig
from ..loop import Samples, sampled
from ..task import Task, new_backbone
from ..yolo import find_yolo
from .coco import Coco, DetectionImages, collate, large_scale_jitter, open_coco
from .detector import build_detector, export_detector, open_exported
from .metrics import MAX_OBJECTS, Result, evaluate_detector, save_found, table
from .soft_nms import use_soft_nms

_DIFFER = "All annotations need the categories that the model was trained on."


class DetectionTask(Task):
    """Mask R-CNN or Faster R-CNN on annotated images."""

    name, command = "detection", "detect"
    main_metric = ("box AP", "box_ap")
    fixed = ("boxes_only", "out_channels")
    collate = staticmethod(collate)
    model: Any

    def __init__(self, config: DetectConfig | DetectEvalConfig) -> None:
        self._how: Any = dict(workers=config.compute.workers, amp_dtype=config.compute.autocast)
        if isinstance(config, DetectEvalConfig):
            self.model, self.classes = open_exported(config.model, config.compute.device, config.compute.nodata)
            self.backbone, masks = self.model.backbone.body, not self.model.made_of["boxes_only"]
            coco = self._open(config, "val", masks)
            where = (f"'{coco.file}'", f"the model '{config.model}'")
            check_same_classes(coco.classes, self.classes, where, remedy=_DIFFER)
            heads, most = self.model.roi_heads, most_objects(config, coco)
            self._how |= dict(batch_size=config.batch_size, max_objects=most)
            if config.data.max_objects or heads.detections_per_img == MAX_OBJECTS:  # not chosen in training
                heads.detections_per_img = most
            if config.soft_nms:
                use_soft_nms(self.model, config.soft_nms)
            self.validation = self._images(coco, masks)
        else:
            self._create(config)

    def _create(self, config: DetectConfig) -> None:
        options, crops, learning, masks = config.backbone, config.crops, config.learning, not config.backbone.boxes_only
        coco, validation = (self._open(config, split, masks) for split in ("train", "val"))
        if not coco.annotations:
            raise ValueError(f"'{coco.file}' has no annotations: there is nothing to learn.")
        files = (f"'{validation.file}'", f"'{coco.file}'")
        check_same_classes(validation.classes, coco.classes, files, remedy=_DIFFER)
        most = most_objects(config, coco, validation)
        # metrics count as many as `eval` does, which has no training data
        self._how |= dict(batch_size=learning.batch_size, max_objects=most_objects(config, validation))
        self.backbone = new_backbone(config)
        train, self.validation = self._images(coco, masks), self._images(validation, masks)
        short, long = options.test_size or (crops.img_size, crops.img_size)
        more = {} if most == MAX_OBJECTS else {"box_detections_per_img": most}
        self.model = build_detector(
            self.backbone, len(coco.classes), boxes_only=options.boxes_only, frozen=options.frozen,
            out_channels=options.out_channels, min_size=short, max_size=long,
            _skip_resize=True,  # in training large_scale_jitter has resized already
            **more | options.detector_kwargs,
        )  # fmt: skip
        jitter = large_scale_jitter(crops.img_size, crops.scale, hflip=crops.hflip, vflip=crops.vflip)
        self.samples, self.classes = Samples(train, jitter, learning.seed), coco.classes
        objects = f"{count(len(coco.annotations), 'object')} of {count(len(coco.classes), 'class')}"
        self.data = f"{count(len(coco.images), 'image')} with {objects}"

    def _open(self, config: Any, split: str, masks: bool) -> Coco:
        data, root = config.data, Path(config.data.data_dir)
        file, images = root / getattr(data, split), root / getattr(data, f"{split}_images")
        more = dict(drop_wrong=data.drop_wrong, merge=data.merge_duplicates)
        return open_coco(find_yolo(file, root) or file, images, split=split, masks=masks, **more)

    def _images(self, coco: Coco, masks: bool) -> DetectionImages:
        return DetectionImages(coco, masks=masks, in_chans=self.backbone.in_chans, pixels=self.backbone.pixels)

    def check(self) -> list[str]:
        notes = []
        for name, images in (("train", self.samples and self.samples.data), ("validation", self.validation)):
            if images is not None:
                images.check()
                notes += [f"note: {name}: {note}." for note in images.coco.notes]
        if (most := max(self._how["max_objects"], self.model.roi_heads.detections_per_img)) > MAX_OBJECTS:
            notes.append(f"note: up to {most} objects per image are found and evaluated (COCO: --max-objects 100).")
        return notes + (self._count_targets() if self.samples else [])

    def _count_targets(self) -> list[str]:
        """Counts the objects that reach the loss, after the transform, on a sample of the training images."""
        objects = [sum(not a["iscrowd"] for a in image.annotations) for image in self.samples.data.coco.images]
        total = left = 0
        for key in sampled([i for i, n in enumerate(objects) if n]):
            total, left = total + objects[key[1]], left + len(self.samples[key][1]["boxes"])
        if not left:
            raise ValueError(
                f"None of {total} objects tried reaches the loss: they lie outside of the crops or are smaller than a "
                "pixel in them. Check the boxes, or raise --img-size or --scale."
            )
        lost = 1 - left / total
        what = f"note: {lost:.0%} of {total} objects tried do not reach the loss: they lie outside of the crop, or are"
        return [f"{what} smaller than a pixel in it (--scale, --img-size)."] if lost > 0.01 else []

    def evaluate(
        self, model: Any, world: World | None = None, shown: int = 0
    ) -> tuple[dict[str, Any], list[Result], ClassResults]:
        metrics, found = evaluate_detector(model, self.validation, world=world, **self._how)
        coco = self.validation.coco
        objects = Counter(a["category_id"] for a in coco.annotations if not a["iscrowd"])
        curves = metrics.pop("class_precision")
        rows = zip(coco.classes, (objects[i] for i in coco.category_ids), metrics["class_ap"], curves, strict=True)
        found_of = [ClassResult(name, count, ap, precision=curve) for name, count, ap, curve in rows]
        return metrics, found, ClassResults("box AP", "objects", found_of)

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        annotated = [i for i, image in enumerate(self.validation.coco.images) if image.annotations]
        save_found(path, self.validation, found, annotated[:shown] or [0])

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_detector(model, folder, classes=self.classes, **about)

    def table(self, metrics: dict[str, Any]) -> str:
        return table(metrics)

    def write_found(self, path: Path, found: Any) -> None:
        write_json(path, found)


def most_objects(config: DetectConfig | DetectEvalConfig, *parts: Coco) -> int:
    """The number of objects per image that are found and evaluated: the most in the data, unless the user says it."""
    return config.data.max_objects or max(MAX_OBJECTS, *(coco.most_objects for coco in parts))
