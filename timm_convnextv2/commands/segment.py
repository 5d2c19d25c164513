"""`timm-convnextv2 segment`: trains a segmenter, evaluates it, and writes masks."""

import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..console import check_same_classes, say
from ..data.formats.files import printable
from ..data.sources.files import ImageFiles
from ..files import claim_folder, whole_file, write_json
from ..runs.device import check_device
from ..transfer.config import SegmentConfig, SegmentEvalConfig, SegmentPredictConfig
from ..transfer.segmentation.masks import paths_by_stem
from ..transfer.segmentation.metrics import evaluate_segmenter, find_classes, save_mask, table
from ..transfer.segmentation.segmenter import open_segmenter
from ..transfer.segmentation.task import SegmentationTask, class_names, inference_of, open_masks
from .dense import Dense


def evaluate(config: SegmentEvalConfig) -> None:
    name, compute, inference = config.exported.model, config.compute, inference_of(config.averaging, config.compute)
    model, classes = open_segmenter(name, check_device(compute.device)), class_names(config.data)
    remedy = "Pass the --classes that the model was trained with, or train a model on these."
    check_same_classes(classes, model.classes, ("the data", f"the model '{name}'"), remedy=remedy)
    data = open_masks(config.data, config.split, classes, model.backbone.read_with(compute.nodata))
    data.check()
    output = config.output and claim_folder(config.output, overwrite=config.exported.overwrite)
    measures, _ = evaluate_segmenter(model, data, inference, workers=compute.workers)
    say(table(measures, classes))
    if output:
        content = {**measures, "iou": dict(zip(classes, measures["iou"], strict=True))}
        write_json(output / "metrics.json", content, indent=2)


def predict(config: SegmentPredictConfig) -> None:
    """`segment predict`: an index PNG for each image of a folder, under its relative path with the extension .png."""
    compute, inference = config.compute, inference_of(config.averaging, config.compute)
    model = open_segmenter(config.exported.model, check_device(compute.device))
    paths = paths_by_stem(config.images)
    if Path(config.output).resolve() == Path(config.images).resolve():
        raise ValueError("--output is the folder of the images, which the masks would replace. Choose another folder.")
    output = claim_folder(config.output, overwrite=config.exported.overwrite)
    backbone = model.backbone.read_with(compute.nodata)
    source = ImageFiles(list(paths.values()), backbone.in_chans, backbone.pixels)
    loader = DataLoader(source, batch_size=None, num_workers=compute.workers, generator=torch.Generator())
    for stem, image in zip(paths, loader, strict=True):
        path = output / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(find_classes(model, image, inference), path, len(model.classes))
    with whole_file(output / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in model.classes), encoding="utf-8")
    say(f"{len(paths)} masks with the indices of {len(model.classes)} classes: {printable(os.fspath(output))}")


COMMAND = Dense(
    "segment",
    "Classify every pixel: UPerNet on any backbone of timm, with one mask per image.",
    SegmentationTask,
    {
        "train": (SegmentConfig, "train a segmenter on images with masks", None),
        "eval": (SegmentEvalConfig, "evaluate a segmenter on images with masks", evaluate),
        "predict": (SegmentPredictConfig, "write masks for a folder of images", predict),
    },
)
main = COMMAND.main
