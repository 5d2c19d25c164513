"""`timm-convnextv2 segment`: trains a segmenter, evaluates it, and writes masks."""

import os
from pathlib import Path

from ..console import count
from ..data import FolderSource
from ..data.formats.files import printable
from ..files import claim_folder, whole_file
from ..transfer.backbone import as_float
from ..transfer.config import SegmentPredictConfig
from ..transfer.figures import save_image
from ..transfer.predict import ReadableImages, open_for_pixels
from ..transfer.segmentation.masks import paths_by_stem
from ..transfer.segmentation.metrics import find_classes, overlay, save_mask
from ..transfer.segmentation.task import SegmentationTask
from .dense import Dense


def predict(config: SegmentPredictConfig) -> int:
    """`segment predict`: an index PNG for each image of a folder, under its relative path with the extension .png."""
    model = open_for_pixels(config.model, config.compute.device, config.compute.nodata).model
    paths_by_stem(config.data_dir)  # refuses images whose masks would have one name
    if Path(config.output).resolve() == Path(config.data_dir).resolve():
        raise ValueError("--output is the folder of the images, which the masks would replace. Choose another folder.")
    output, written = claim_folder(config.output, overwrite=config.overwrite), 0
    images = FolderSource(config.data_dir, model.backbone.in_chans, model.backbone.pixels)
    source = ReadableImages(images, config.max_bad_images)
    for items in source.batches(as_float, 1, config.compute.workers):
        for name, image in items:
            found = find_classes(model, image, config.averaging, config.compute.autocast)
            save_mask(found, output / Path(name).with_suffix(".png"), len(model.classes))
            if config.draw:
                save_image(Path(config.draw) / f"{name}.png", overlay(image, found, len(model.classes)))
            written += 1
    with whole_file(output / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in model.classes), encoding="utf-8")
    return source.end(
        f"{count(written, 'mask')} with the indices of {len(model.classes)} classes: {printable(os.fspath(output))}"
    )


COMMAND = Dense("segment", SegmentationTask, predict)
main = COMMAND.main
