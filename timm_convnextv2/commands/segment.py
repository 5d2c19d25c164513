"""`timm-convnextv2 segment`: trains a segmenter, measures it, and writes masks."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ParseKwargs
from torch import nn

from ..console import PROGRAM, CommandParser, invocation, refused, say
from ..data.formats.decode import printable
from ..data.sources.folder import ImageFiles
from ..files import whole_file
from ..recipes import Recipe, list_recipes
from ..runs.folder import TransferFolder
from ..runs.logs import check_logs, open_logs
from ..runs.world import World
from ..transfer.backbone import Backbone
from ..transfer.groups import parameter_groups
from ..transfer.loop import Run, Schedule, Training, create_loader
from ..transfer.segmentation.masks import (
    MaskedImages,
    TrainSamples,
    TrainTransform,
    open_split,
    paths_by_stem,
    read_classes,
)
from ..transfer.segmentation.metrics import Inference, evaluate_segmenter, find_classes, save_mask, save_segmentations
from ..transfer.segmentation.segmenter import Segmenter, build_segmenter, export_segmenter, open_segmenter
from .dense import (
    add_learning,
    add_reading,
    add_run,
    check_counts,
    data_name,
    experiment_name,
    how_made,
    train_command,
    with_recipe,
)

RECIPES = Path(__file__).parents[1] / "transfer" / "recipes" / "segment"


# fmt: off
def build_parser() -> CommandParser:
    """The three sub-commands."""
    parser = CommandParser(
        prog=f"{PROGRAM} segment",
        description="Classify every pixel: UPerNet on any backbone of timm, with a mask for each image.",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
    train = commands.add_parser("train", help="train a segmenter on images with masks")
    evaluate = commands.add_parser("eval", help="measure a segmenter on images with masks")
    predict = commands.add_parser("predict", help="write masks for a folder of images")
    _add_train(train)
    for other in (evaluate, predict):
        other.add_argument("--model", required=True, metavar="FOLDER", help="what segment train exported: RUN/model")
    _add_data(evaluate)
    evaluate.add_argument("--split", default="validation", choices=["train", "validation", "test"],
                          help="what is measured (default: validation)")
    evaluate.add_argument("--output", metavar="DIR", help="folder to write metrics.json to")
    predict.add_argument("--images", required=True, metavar="DIR", help="images anywhere below it")
    predict.add_argument("--output", required=True, metavar="DIR", help="folder to write index PNGs to")
    for other in (evaluate, predict):
        add_reading(other)
        _add_test(other)
        other.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X",
                           help="factors of the image's size, whose probabilities are averaged (default: 1)")
        other.add_argument("--flip", action="store_true", help="average with the mirrored image")
        other.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR",
        help="with SPLIT/images and SPLIT/masks, or images/SPLIT and masks/SPLIT, for the splits train and validation")
    add("--classes", metavar="FILE", help="names of the classes, line 1 is index 0 (default: DATA_DIR/classes.txt)")
    add("--ignore-index", type=int, default=255, metavar="N", help="in masks: pixels that do not count (default: 255)")
    add("--reduce-zero-label", action="store_true",
        help="0 in a mask means no class, and the first class is 1, as in ADE20K")


def _add_test(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--short-side", type=int, metavar="N",
        help="resize images so that the shorter side has N pixels (default: the images' own size)")
    add("--window", type=int, metavar="N", help="test in sliding windows of N pixels (default: whole images)")
    add("--stride", type=int, metavar="N", help="pixels between windows (default: two thirds of --window)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--recipe", metavar="NAME", help="settings by name, or a .yaml file; the options here win")
    add("--list-recipes", action="store_true", help="name the recipes, and end")
    _add_data(parser)
    add_reading(parser)
    model = parser.add_argument_group("model").add_argument
    model("--from-scratch", action="store_true", help="random weights in the backbone, to compare")
    model("--frozen", action="store_true", help="train the heads only")
    model("--in-chans", type=int, metavar="N", help="channels of the images (default: the model's)")
    model("--drop-path", type=float, metavar="X", help="share of residual paths left out in training")
    model("--channels", type=int, default=512, metavar="N", help="of the head (default: 512)")
    model("--auxiliary-channels", type=int, default=256, metavar="N", help="of the auxiliary head; 0 for none")
    model("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of timm.create_model's")
    images = parser.add_argument_group("images").add_argument
    images("--img-size", type=int, default=512, metavar="N", help="side of the crops in training (default: 512)")
    images("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar="X",
           help="factor of the image's size before the crop (default: 0.5 2.0)")
    images("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip (default: 0.5)")
    images("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip (default: 0)")
    images("--colours", action=argparse.BooleanOptionalAction, default=True,
           help="distort the colours of images with three channels (default: yes)")
    _add_test(parser)
    group = parser.add_argument_group("training")
    add_learning(group, "the heads")
    training = group.add_argument
    training("--epochs", type=int, default=100, metavar="N", help="(default: 100)")
    training("--updates", type=int, metavar="N", help="length of the run in updates, in place of --epochs")
    training("-b", "--batch-size", type=int, default=8, metavar="N", help="images per process and step (default: 8)")
    training("--sched", default="poly", choices=["poly", "cosine"], help="poly: linear to 0 (default)")
    training("--warmup-updates", type=int, default=0, metavar="N", help="of linear warmup (default: 0)")
    training("--warmup-share", type=float, default=1e-6, metavar="X", help="of the rate, at its start (default: 1e-6)")
    add_run(parser)
# fmt: on


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe | None]:
    """The options; of `train` with those of the recipe below them.

    Raises:
        ValueError: An option or a recipe is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words, recipe = with_recipe(words, RECIPES, _add_train)
    args = build_parser().parse_args(words)
    check_counts(args)
    if args.action == "train" and args.batch_size < 2:
        raise ValueError(
            f"--batch-size is {args.batch_size}, expected at least 2: batch normalisation needs several images."
        )
    return args, recipe


# a run that resumes must have the same: the order of the images, the weights and the schedule depend on them
FIXED = ("model", "in_chans", "channels", "auxiliary_channels", "classes", "num_images", "world_size", "batch_size")


FIXED += ("grad_accum_steps", "seed", "total_updates", "opt", "model_ema", "frozen", "layer_decay", "layer_decay_type")


FIXED += ("pixels",)


def main(argv: list[str] | None = None) -> int:
    """The command; a mistake in options or data is one message and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"] and "--list-recipes" in words:
        say(list_recipes(RECIPES))
        return 0
    try:
        args, recipe = parse(words)
    except ValueError as e:
        return refused("segment", e)
    if args.action == "train":
        command = shlex.join([*invocation("segment"), *words])
        return train_command("segment train", args.device, lambda world: set_up(args, recipe, world, command))
    try:
        (evaluate_command if args.action == "eval" else predict_command)(args)
    except (ValueError, OSError) as e:
        return refused(f"segment {args.action}", e)
    return 0


def set_up(args: argparse.Namespace, recipe: Recipe | None, world: World, command: str) -> Run | None:
    """Opens and checks everything; only then is anything written.

    Returns:
        The run; None after --dry-run.

    Raises:
        ValueError: A mistake in options, data or folder.
    """
    if not args.model:
        raise ValueError("--model is needed: a model of timm, local-dir:FOLDER or hf-hub:USER/NAME.")
    if args.resume and not args.experiment:
        raise ValueError("--resume auto needs --experiment, the folder of the run to continue.")
    check_logs(args.log_wandb, args.log_tensorboard)
    name = args.experiment or experiment_name("segment", args.model, world)
    folder = TransferFolder(Path(args.output) / name, resume=args.resume == "auto", overwrite=args.overwrite)
    classes = read_classes(args.classes or Path(args.data_dir) / "classes.txt")
    torch.manual_seed(args.seed)
    model = build_segmenter(
        args.model, len(classes), args.in_chans, pretrained=not args.from_scratch, frozen=args.frozen,
        channels=args.channels, auxiliary_channels=args.auxiliary_channels, ignore_index=args.ignore_index,
        classes=classes, drop_path_rate=args.drop_path, **args.model_kwargs,
    )  # fmt: skip
    backbone = model.backbone.read_with(args.nodata)
    data, validation = (open_data(args, split, classes, backbone) for split in ("train", "validation"))
    samples = TrainSamples(data, transform_of(args, model), args.seed)
    loader = create_loader(samples, collate, world, batch_size=args.batch_size, workers=args.workers, seed=args.seed)
    training = create_training(args, model, len(loader) // args.grad_accum_steps, world)
    settings = {
        "task": "segmentation", **vars(args), "experiment": name, "classes": classes, "num_images": len(data),
        "num_validation": len(validation), "world_size": world.size, "in_chans": backbone.in_chans,
        "pixels": backbone.pixels.record() or None, "total_updates": training.schedule.updates,
    }  # fmt: skip
    folder.check_same(settings, FIXED)
    world.agree({"the number of images": len(data), "the classes": classes})
    counts = [part.check() for part in (data, validation)] if world.primary else []
    world.wait()
    if world.primary:
        world.say(about(args, data, validation, counts, training, world, recipe))
    if args.dry_run:
        return None
    evaluate = partial(
        evaluate_epoch, data=validation, folder=folder.path, world=world, testing=testing_of(args),
        workers=args.workers, shown=args.shown_images,
        about=dict(dataset=data_name(args.data_dir), info=how_made(settings)),
    )  # fmt: skip
    run = Run(
        training, loader, folder, settings, evaluate, eval_interval=args.eval_interval, log_interval=args.log_interval
    )
    if folder.checkpoint is not None:
        run.load(folder.checkpoint)
    if world.primary:
        folder.claim(settings, command=command, epoch=training.update_number // max(1, run.updates_per_epoch))
        run.logs = open_logs(folder.path, settings, args.log_wandb, args.wandb_project, args.log_tensorboard)
    world.wait()
    return run


def open_data(args: argparse.Namespace, split: str, classes: Sequence[str], backbone: Backbone) -> MaskedImages:
    """The images and masks of a split, not yet checked."""
    return MaskedImages(
        *open_split(args.data_dir, split), classes, in_chans=backbone.in_chans, pixels=backbone.pixels,
        ignore_index=args.ignore_index, reduce_zero_label=args.reduce_zero_label,
    )  # fmt: skip


def transform_of(args: argparse.Namespace, model: Segmenter) -> TrainTransform:
    """The transform of training, by the options."""
    return TrainTransform(
        args.img_size, model.backbone.mean, scale=tuple(args.scale), short_side=args.short_side, hflip=args.hflip,
        vflip=args.vflip, colours=args.colours, ignore_index=args.ignore_index,
    )  # fmt: skip


def create_training(args: argparse.Namespace, model: Segmenter, per_epoch: int, world: World) -> Training:
    """Optimizer and schedule, by the options."""
    if world.distributed and world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = parameter_groups(
        model, model.backbone, weight_decay=args.weight_decay, layer_decay=args.layer_decay,
        layer_decay_type=args.layer_decay_type,
    )  # fmt: skip
    schedule = Schedule(
        args.lr, args.updates or args.epochs * per_epoch, args.sched, warmup=args.warmup_updates,
        warmup_share=args.warmup_share,
    )  # fmt: skip
    return Training(
        model, groups, schedule, world, seed=args.seed, grad_accum_steps=args.grad_accum_steps,
        clip_grad=args.clip_grad, amp_dtype=amp_dtype(args), opt=args.opt,
        ema_decay=args.model_ema_decay if args.model_ema else None,
    )  # fmt: skip


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type of mixed precision, by the options."""
    return getattr(torch, args.amp_dtype) if args.amp else None


def testing_of(args: argparse.Namespace) -> Inference:
    """How images are tested, by the options."""
    if args.stride is not None and not 1 <= args.stride <= (args.window or 0):
        raise ValueError(f"--stride is {args.stride}, expected 1 to --window, which is {args.window or 'not given'}.")
    scales = tuple(getattr(args, "scales", (1.0,)))
    return Inference(args.short_side, args.window, args.stride, scales, getattr(args, "flip", False), amp_dtype(args))


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, C, H, W]` and classes `[B, H, W]`."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets)


def about(
    args: argparse.Namespace, data: MaskedImages, validation: MaskedImages, counts: Sequence, training: Training,
    world: World, recipe: Recipe | None,
) -> str:  # fmt: skip
    """What the run is, and what may not be meant so."""
    batch = args.batch_size * args.grad_accum_steps * world.size
    parameters = sum(p.numel() for p in training.model.parameters()) / 1e6
    lines = [
        f"{args.model}: {parameters:.1f}M parameters; {len(data)} images of {len(data.classes)} classes, "
        f"{len(validation)} to validate; {training.schedule.updates} updates of {batch} images, lr {args.lr:.2e}, on "
        f"{world.size} x {world.device.type}"
    ]
    if recipe is not None and recipe.global_batch not in (None, batch):
        lines.append(
            f"note: the recipe {recipe.name} is for {recipe.global_batch} images an update, and this run has {batch}: "
            "choose --batch-size or --grad-accum-steps so, or another --lr."
        )
    if prepared := str(data.source.pixels):
        lines.append(f"stored values are prepared as those that the model was trained on: {prepared}")
    for part, name, pixels in zip((data, validation), ("train", "validation"), counts, strict=True):
        absent = [part.classes[i] for i in range(len(part.classes)) if not pixels[i]]
        if absent:
            lines.append(f"note: {len(absent)} classes have no pixel in {name}: {', '.join(absent[:5])}.")
        if part.unused:
            lines.append(f"note: {len(part.unused)} masks in {name} have no image and are not used.")
    if training.schedule.warmup > training.schedule.updates // 2:
        lines.append(
            f"note: the warmup, {training.schedule.warmup} updates, is more than half of the run; lower "
            "--warmup-updates."
        )
    return "\n".join(lines)


def evaluate_epoch(
    epoch: int, model: nn.Module, last: bool, *, data: MaskedImages, folder: Path, world: World, testing: Inference,
    workers: int, shown: int, about: dict[str, Any],
) -> dict[str, float]:  # fmt: skip
    """Measures the segmenter, draws what it finds, and exports it."""
    segmenter: Any = model
    share_buffers(segmenter, world)
    measures, found = evaluate_segmenter(
        segmenter, data, testing, workers=workers, world=world if world.distributed else None, keep=shown
    )
    if world.primary:
        title = f"epoch {epoch}, mIoU {measures['miou']:.3f}"
        if found:
            save_segmentations(folder / "predictions" / f"epoch-{epoch:04d}.png", data, found, title)
        export_segmenter(segmenter, folder / "model", metrics=measures, **about)
        if last:
            say(table(measures, data.classes))
    return {key: value for key, value in measures.items() if key != "iou"}


@torch.no_grad()
def share_buffers(model: nn.Module, world: World) -> None:
    """Gives all processes the batch statistics of the first, whose model is exported.

    After an update each process has those of its own images, where they are not synchronised (on CPU): DDP shares them
    at the next update only, and the processes would measure different models.
    """
    if world.distributed:
        first = world.share({name: value.cpu() for name, value in model.named_buffers()})
        for name, value in model.named_buffers():
            value.copy_(first[name])


def table(measures: dict[str, Any], classes: Sequence[str]) -> str:
    """IoU of each class and their mean, accuracies; in percent."""
    width = max(14, *(len(name) for name in classes))
    means = {"mIoU": "miou", "accuracy": "accuracy", "mean accuracy": "mean_accuracy"}
    rows = [*zip(classes, measures["iou"], strict=True), *((name, measures[key]) for name, key in means.items())]
    lines = [f"{name:{width}}" + (f"{'-':>7}" if value is None else f"{100 * value:7.1f}") for name, value in rows]
    lines.insert(len(classes), "-" * (width + 7))
    return "\n".join([f"{'IoU of':{width}}", *lines, "in %; - of a class that is neither in the masks nor found"])


def evaluate_command(args: argparse.Namespace) -> None:
    """`segment eval`."""
    output = None if args.output is None else claim(args.output, args.overwrite)
    testing = testing_of(args)
    model = open_segmenter(args.model, args.device)
    classes = read_classes(args.classes or Path(args.data_dir) / "classes.txt")
    check_classes(classes, model.classes, args.model)
    data = open_data(args, args.split, classes, model.backbone.read_with(args.nodata))
    data.check()
    measures, _ = evaluate_segmenter(model, data, testing, workers=args.workers)
    say(table(measures, classes))
    if output is not None:
        content = {**measures, "iou": dict(zip(classes, measures["iou"], strict=True))}
        with whole_file(output / "metrics.json") as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_classes(classes: Sequence[str], known: Sequence[str], model: str) -> None:
    """Raises a `ValueError` where the classes of the data are not those of the model, in their order."""
    if list(classes) == list(known):
        return
    differ = [(i, a, b) for i, (a, b) in enumerate(zip(classes, known, strict=False)) if a != b]
    first = "; ".join(f"index {i} is '{a}', in the model '{b}'" for i, a, b in differ[:3])
    raise ValueError(
        f"The class names of the data are not those of the model '{model}': {len(classes)} and {len(known)} classes, "
        f"{len(differ)} differ{': ' + first if first else ''}. Give the --classes that the model was trained with, "
        "or train one for these."
    )


def claim(output: str, overwrite: bool) -> Path:
    """Makes the folder to write to.

    Raises:
        ValueError: It is a file, or has something in it and is not to be overwritten.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file, expected a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"The folder '{folder}' is not empty. Pass --overwrite, or another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def predict_command(args: argparse.Namespace) -> None:
    """`segment predict`: an index PNG for each image below a folder, under its path with the ending .png."""
    testing = testing_of(args)
    model = open_segmenter(args.model, args.device)
    paths = paths_by_stem(args.images)
    output = claim(args.output, args.overwrite)
    if output.resolve() == Path(args.images).resolve():
        raise ValueError("--output is the folder of the images, where masks would replace them. Choose another.")
    backbone = model.backbone.read_with(args.nodata)
    source = ImageFiles(list(paths.values()), backbone.in_chans, backbone.pixels)
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=args.workers, generator=torch.Generator())
    for stem, image in zip(paths, loader, strict=True):
        path = output / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(find_classes(model, image, testing), path, model.num_classes)
    with whole_file(output / "classes.txt") as part:
        part.write_text("".join(f"{name}\n" for name in model.classes), encoding="utf-8")
    say(f"{len(paths)} masks with the indices of {model.num_classes} classes: {printable(os.fspath(output))}")
