"""`timm-convnextv2 detect`: trains a detector, evaluates it, and finds objects."""

from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN

from ..console import check_same_classes, say
from ..data import FolderSource
from ..files import check_free, claim_folder, write_json
from ..runs.device import check_device
from ..transfer.backbone import Backbone
from ..transfer.config import Compute, DetectConfig, DetectEvalConfig, DetectPredictConfig, Inference
from ..transfer.detection.coco import CATEGORIES_DIFFER, Coco, CocoImage, open_coco, rle_codec
from ..transfer.detection.detector import backbone_of, classes_of, made_of_detector, open_detector
from ..transfer.detection.metrics import evaluate_detector, find_objects, table
from ..transfer.detection.soft_nms import use_soft_nms
from ..transfer.detection.task import DetectionTask
from .dense import Dense


def evaluate(config: DetectEvalConfig) -> None:
    data, name = config.data, config.exported.model
    detector, backbone = _open(name, config.compute, config.inference)
    root, masks = Path(data.data_dir), not made_of_detector(detector)["boxes_only"]
    coco = open_coco(
        root / data.val, root / data.val_images, masks=masks, drop_wrong=data.drop_wrong, in_chans=backbone.in_chans,
        pixels=backbone.pixels,
    )  # fmt: skip
    where = (f"'{coco.file}'", f"the model '{name}'")
    check_same_classes(coco.classes, classes_of(name), where, remedy=CATEGORIES_DIFFER)
    rle_codec()
    output = config.output and claim_folder(config.output, overwrite=config.exported.overwrite)
    metrics, results = evaluate_detector(detector, coco, **_how(config.compute, config.inference))
    say(table(metrics))
    if output:
        write_json(output / "metrics.json", metrics)
        write_json(output / "predictions.json", results)


def predict(config: DetectPredictConfig) -> None:
    """`detect predict`: the objects in all images of a folder, as a JSON file that `open_coco` reads."""
    output = check_free(config.output, overwrite=config.exported.overwrite)
    classes = classes_of(config.exported.model)
    detector, backbone = _open(config.exported.model, config.compute, config.inference)
    if not made_of_detector(detector)["boxes_only"]:
        rle_codec()
    source = FolderSource(config.images, backbone.in_chans, backbone.pixels)
    paths = [source.path(i) for i in range(len(source))]
    names = [Path(path).relative_to(config.images).as_posix() for path in paths]
    # height and width are unknown before the images are decoded
    images = [CocoImage(i, path, name, 0, 0, []) for i, (path, name) in enumerate(zip(paths, names, strict=True), 1)]
    coco, found = Coco(output, images, classes, list(range(1, len(classes) + 1))), []
    decoded: list[CocoImage] = []
    for image, results in find_objects(detector, coco, **_how(config.compute, config.inference)):
        decoded.append(image)
        found += [result for result in results if result["score"] >= config.min_score]
    content = coco._replace(images=decoded).content()
    content["annotations"] = [
        dict(result, id=i, iscrowd=0, area=result["bbox"][2] * result["bbox"][3]) for i, result in enumerate(found, 1)
    ]
    write_json(output, content)
    say(f"{len(found)} objects in {len(images)} images: {output}")


def _open(name: str, compute: Compute, inference: Inference) -> tuple[FasterRCNN, Backbone]:
    device = check_device(compute.device)
    detector = open_detector(name).to(device)
    if inference.soft_nms:
        use_soft_nms(detector, inference.soft_nms)
    return detector, backbone_of(detector).read_with(compute.nodata)


def _how(compute: Compute, inference: Inference) -> dict[str, Any]:
    return dict(batch_size=inference.batch_size, workers=compute.workers, amp_dtype=compute.autocast)


COMMAND = Dense(
    "detect",
    "Detect objects: Mask R-CNN or Faster R-CNN on any backbone of timm, with annotations in COCO's format.",
    DetectionTask,
    {
        "train": (DetectConfig, "train a detector on annotated images", None),
        "eval": (DetectEvalConfig, "evaluate a detector on annotated images", evaluate),
        "predict": (DetectPredictConfig, "find objects in a folder of images", predict),
    },
)
main = COMMAND.main
