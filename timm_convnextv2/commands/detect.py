"""`timm-convnextv2 detect`: trains a detector, evaluates it, and finds objects."""

from ..console import say
from ..files import check_free, write_json
from ..transfer.config import DetectConfig, DetectEvalConfig, DetectPredictConfig
from ..transfer.detection.coco import Coco, CocoImage, rle_codec
from ..transfer.detection.detector import made_of_detector
from ..transfer.detection.metrics import find_objects
from ..transfer.detection.task import DetectionTask, open_exported
from .dense import Dense, readable_images


def predict(config: DetectPredictConfig) -> None:
    """`detect predict`: the objects in all images of a folder, as a JSON file that `open_coco` reads."""
    output = check_free(config.output, overwrite=config.overwrite)
    detector, classes, backbone = open_exported(config)
    if not made_of_detector(detector)["boxes_only"]:
        rle_codec()
    images: list[CocoImage] = []
    category_ids, found = list(range(1, len(classes) + 1)), []
    for items in readable_images(config, backbone, config.batch_size):
        ids = range(len(images) + 1, len(images) + len(items) + 1)
        for i, (name, image) in zip(ids, items, strict=True):
            images.append(CocoImage(i, "", name, image.shape[-2], image.shape[-1], []))
        found += find_objects(detector, [image for _, image in items], ids, category_ids, config.compute.autocast)
    found = [result for result in found if result["score"] >= config.min_score]
    content = Coco(output, images, classes, category_ids).content()
    content["annotations"] = [
        dict(result, id=i, iscrowd=0, area=result["bbox"][2] * result["bbox"][3]) for i, result in enumerate(found, 1)
    ]
    write_json(output, content)
    say(f"{len(found)} objects in {len(images)} images: {output}")


COMMAND = Dense(
    "detect", "Detect objects: Mask R-CNN or Faster R-CNN on any backbone of timm, with annotations in COCO's format.",
    {"train": DetectConfig, "eval": DetectEvalConfig, "predict": DetectPredictConfig}, DetectionTask, predict,
)  # fmt: skip
main = COMMAND.main
