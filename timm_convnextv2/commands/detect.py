"""`timm-convnextv2 detect`: trains a detector, evaluates it, and finds objects."""

from pathlib import Path

from ..console import count
from ..data import FolderSource
from ..data.config import ImagePaths
from ..data.paths.find import check_places
from ..files import check_free, write_json
from ..transfer.config import DetectPredictConfig
from ..transfer.detection.coco import Coco, CocoImage, DetectionImages, rle_codec, to_unit
from ..transfer.detection.metrics import draw_objects, find_objects
from ..transfer.detection.task import DetectionTask
from ..transfer.figures import save_image
from ..transfer.predict import ReadableImages, open_for_objects
from .dense import Dense


def predict(config: DetectPredictConfig) -> int:
    """`detect predict`: the objects in all images of a folder, as a JSON file that `open_coco` reads."""
    check_places(ImagePaths.of(config.data_dir))
    output, draw = check_free(config.output, overwrite=config.overwrite), config.draw
    opened = open_for_objects(config.model, config.compute.device, config.compute.nodata, config.soft_nms)
    detector, backbone = opened.model, opened.model.backbone.body
    rle_codec()  # for its error message
    coco = Coco(output, [], opened.classes, list(range(1, len(opened.classes) + 1)))
    data = DetectionImages(coco, masks=not detector.made_of["boxes_only"])
    source = ReadableImages(FolderSource(config.data_dir, backbone.in_chans, backbone.pixels), config.max_bad_images)
    for items in source.batches(to_unit, config.batch_size, config.compute.workers):
        ids = range(len(coco.images) + 1, len(coco.images) + len(items) + 1)
        loaded = [image for _, image in items]
        found = find_objects(detector, loaded, ids, coco.category_ids, config.compute.autocast)
        for i, (name, image) in zip(ids, items, strict=True):
            own = [result for result in found if result["image_id"] == i and result["score"] >= config.min_score]
            coco.images.append(CocoImage(i, "", name, image.shape[-2], image.shape[-1], own))
            if draw:
                save_image(Path(draw) / f"{name}.png", draw_objects(data, coco.images[-1], image))
    content = coco.content()
    content["annotations"] = [
        dict(result, id=i, iscrowd=0, area=result["bbox"][2] * result["bbox"][3])
        for i, result in enumerate(content["annotations"], 1)
    ]
    write_json(output, content)
    return source.end(f"{count(len(content['annotations']), 'object')} in {count(len(coco.images), 'image')}: {output}")


COMMAND = Dense("detect", DetectionTask, predict)
main = COMMAND.main
