"""Detection as a task of `transfer.task`."""

from pathlib import Path
from typing import Any

from ...console import check_same_classes
from ...files import write_json
from ...runs.world import World
from ..config import DetectConfig
from ..loop import Schedule
from ..task import Task, new_backbone
from .coco import CATEGORIES_DIFFER, DetectionSamples, check_sizes, collate, large_scale_jitter, open_coco, rle_codec
from .detector import build_detector, export_detector
from .metrics import Result, evaluate_detector, save_found, table


class DetectionTask(Task):
    """Mask R-CNN or Faster R-CNN on annotated images."""

    name, command = "detection", "detect"
    main_metric = ("box AP", "box_ap")
    fixed = ("boxes_only", "out_channels")
    collate = staticmethod(collate)

    def __init__(self, config: DetectConfig) -> None:
        rle_codec()
        data, options, crops, self._config = config.data, config.model, config.crops, config
        masks, root = not options.boxes_only, Path(data.data_dir)
        opened: dict[str, Any] = dict(masks=masks, drop_wrong=data.drop_wrong)
        coco = open_coco(root / data.train, root / data.train_images, **opened)
        self.validation = open_coco(root / data.val, root / data.val_images, **opened)
        if not coco.annotations:
            raise ValueError(f"'{coco.file}' has no annotations: there is nothing to learn.")
        files = (f"'{self.validation.file}'", f"'{coco.file}'")
        check_same_classes(self.validation.classes, coco.classes, files, remedy=CATEGORIES_DIFFER)
        self.backbone = new_backbone(config)
        reading: dict[str, Any] = dict(in_chans=self.backbone.in_chans, pixels=self.backbone.pixels)
        for part in (coco, self.validation):
            check_sizes(part, **reading)
        short, long = crops.test_size or (crops.img_size, crops.img_size)
        self.model = build_detector(
            self.backbone, len(coco.classes), boxes_only=options.boxes_only, frozen=options.frozen,
            out_channels=options.out_channels, min_size=short, max_size=long,
            _skip_resize=True,  # in training large_scale_jitter has resized already
            **options.detector_kwargs,
        )  # fmt: skip
        jitter = large_scale_jitter(crops.img_size, crops.scale, hflip=crops.hflip, vflip=crops.vflip)
        self.samples = DetectionSamples(coco, jitter, masks=masks, seed=config.learning.seed, **reading)
        self._truth = DetectionSamples(self.validation, masks=masks, **reading)
        self.classes, self.num_validation = coco.classes, len(self.validation.images)
        self.data = f"{len(coco.images)} images with {len(coco.annotations)} objects of {len(coco.classes)} classes"
        self._left_out = coco.left_out + self.validation.left_out

    def schedule(self) -> Schedule:
        learning = self._config.learning
        steps = tuple(epoch / learning.epochs for epoch in learning.decay_epochs)
        return Schedule(learning.sched, steps=steps, opt=learning.opt)

    def check(self) -> list[str]:
        return [f"note: {self._left_out} wrong annotations are left out."] if self._left_out else []

    def evaluate(self, model: Any, world: World, shown: int) -> tuple[dict[str, float], list[Result]]:
        compute = self._config.compute
        return evaluate_detector(
            model, self.validation, batch_size=self._config.learning.batch_size, workers=compute.workers,
            amp_dtype=compute.autocast, world=world,
        )  # fmt: skip

    def draw(self, path: Path, found: Any, title: str, shown: int) -> None:
        images = self.validation.images
        ids = [image.id for image in images if image.annotations][:shown] or [images[0].id]
        save_found(path, self._truth, found, ids)

    def export(self, model: Any, folder: Path, **about: Any) -> None:
        export_detector(model, folder, classes=self.classes, **about)

    def finish(self, folder: Path, found: Any, metrics: dict[str, Any]) -> str:
        write_json(folder / "predictions" / "validation.json", found)
        return table(metrics)
