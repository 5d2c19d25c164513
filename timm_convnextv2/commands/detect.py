"""`timm-convnextv2 detect`: trains a detector, measures it, and finds objects."""

import argparse
import json
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
from ..data import FolderSource
from ..files import whole_file
from ..recipes import Recipe, list_recipes
from ..runs.folder import TransferFolder
from ..runs.logs import check_logs, open_logs
from ..runs.world import World
from ..transfer.backbone import Backbone, create_backbone
from ..transfer.detection.coco import (
    Coco,
    CocoImage,
    DetectionSamples,
    check_classes,
    check_sizes,
    collate,
    large_scale_jitter,
    open_coco,
    rle_codec,
)
from ..transfer.detection.detector import backbone_of, build_detector, classes_of, export_detector, open_detector
from ..transfer.detection.metrics import average_precision, evaluate_detector, find_objects, save_found
from ..transfer.detection.soft_nms import METHODS, use_soft_nms
from ..transfer.groups import parameter_groups
from ..transfer.loop import Run, Schedule, Training, create_loader
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

RECIPES = Path(__file__).parents[1] / "transfer" / "recipes" / "detect"


# fmt: off
def build_parser() -> CommandParser:
    """The three sub-commands."""
    parser = CommandParser(
        prog=f"{PROGRAM} detect",
        description="Detect objects: Mask R-CNN or Faster R-CNN on any backbone of timm, with COCO's annotations.",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="train|eval|predict")
    train = commands.add_parser("train", help="train a detector on annotated images")
    evaluate = commands.add_parser("eval", help="measure a detector on annotated images")
    predict = commands.add_parser("predict", help="find objects in a folder of images")
    _add_train(train)
    for other in (evaluate, predict):
        other.add_argument("--model", required=True, metavar="FOLDER", help="what detect train exported: RUN/model")
    _add_data(evaluate, ("val",))
    add = predict.add_argument
    add("--images", required=True, metavar="DIR", help="images anywhere below it")
    add("--min-score", type=float, default=0.05, metavar="X", help="leave out what is less certain (default: 0.05)")
    evaluate.add_argument("--output", metavar="DIR", help="folder to write metrics.json and predictions.json to")
    predict.add_argument("--output", required=True, metavar="FILE", help="JSON to write, in COCO's format")
    for other in (evaluate, predict):
        add_reading(other)
        other.add_argument("--soft-nms", choices=METHODS, help="lower the scores of boxes that overlap better ones, as "
                           "the paper does, in place of removing them (default: remove)")
        other.add_argument("-b", "--batch-size", type=int, default=2, metavar="N", help="images at a time (default: 2)")
        other.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _add_data(parser: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="root of the data set; the paths below are relative to it")
    if "train" in splits:
        add("--train", default="train.json", metavar="FILE", help="annotations in COCO's format (default: train.json)")
        add("--train-images", default="train/images", metavar="DIR", help="their images (default: train/images)")
    if "val" in splits:
        add("--val", default="validation.json", metavar="FILE", help="to measure on (default: validation.json)")
        add("--val-images", default="validation/images", metavar="DIR", help="(default: validation/images)")
    add("--drop-wrong", action="store_true", help="leave wrong annotations out, with their count, in place of refusing")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--recipe", metavar="NAME", help="settings by name, or a .yaml file; the options here win")
    add("--list-recipes", action="store_true", help="name the recipes, and end")
    _add_data(parser, ("train", "val"))
    add_reading(parser)
    model = parser.add_argument_group("model").add_argument
    model("--boxes-only", action="store_true", help="Faster R-CNN: boxes, no masks")
    model("--from-scratch", action="store_true", help="random weights in the backbone, to compare")
    model("--frozen", action="store_true", help="train the pyramid and the heads only")
    model("--in-chans", type=int, metavar="N", help="channels of the images (default: the model's)")
    model("--drop-path", type=float, metavar="X", help="share of residual paths left out in training")
    model("--out-channels", type=int, default=256, metavar="N", help="of the pyramid (default: 256)")
    model("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of timm.create_model's")
    model("--detector-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V",
          help="more of torchvision's MaskRCNN, such as box_detections_per_img=300")
    images = parser.add_argument_group("images").add_argument
    images("--img-size", type=int, default=1024, metavar="N", help="side of the crops in training (default: 1024)")
    images("--scale", type=float, nargs=2, default=[0.1, 2.0], metavar="X",
           help="the image's size before the crop, in crops (default: 0.1 2.0)")
    images("--test-size", type=int, nargs=2, metavar=("SHORT", "LONG"),
           help="sides in evaluation: SHORT, but LONG at most (default: --img-size for both)")
    images("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip (default: 0.5)")
    images("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip (default: 0)")
    group = parser.add_argument_group("training")
    add_learning(group, "pyramid and heads")
    training = group.add_argument
    training("--epochs", type=int, default=36, metavar="N", help="(default: 36)")
    training("-b", "--batch-size", type=int, default=4, metavar="N", help="images per process and step (default: 4)")
    training("--sched", default="step", choices=["step", "cosine", "poly"], help="(default: step)")
    training("--decay-epochs", type=float, nargs="+", default=[27, 33], metavar="N",
             help="epochs after which 'step' divides the rate by 10 (default: 27 33)")
    training("--warmup-updates", type=int, default=1000, metavar="N", help="of linear warmup (default: 1000)")
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
    return args, recipe


# a run that resumes must have the same: the order of the images, the weights and the schedule depend on them
FIXED = (
    "model",
    "model_kwargs",
    "boxes_only",
    "in_chans",
    "out_channels",
    "classes",
    "num_images",
    "world_size",
    "batch_size",
)


FIXED += ("grad_accum_steps", "seed", "epochs", "opt", "model_ema", "frozen", "layer_decay", "layer_decay_type")


FIXED += ("pixels",)


def main(argv: list[str] | None = None) -> int:
    """The command; a mistake in options or data is one message and exit status 2."""
    try:
        args, recipe = parse(argv)
    except ValueError as e:
        return refused("detect", e)
    if args.action == "train":
        if args.list_recipes:
            say(list_recipes(RECIPES))
            return 0
        command = shlex.join([*invocation("detect"), *(sys.argv[1:] if argv is None else argv)])
        return train_command("detect train", args.device, lambda world: set_up(args, recipe, world, command))
    try:
        (evaluate_command if args.action == "eval" else predict_command)(args)
    except (ValueError, OSError, RuntimeError) as e:
        return refused(f"detect {args.action}", e)
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
    check_logs(args.log_wandb, args.log_tensorboard)
    rle_codec()
    masks, root = not args.boxes_only, Path(args.data_dir)
    opened: dict[str, Any] = dict(masks=masks, drop_wrong=args.drop_wrong)
    coco = open_coco(root / args.train, root / args.train_images, **opened)
    validation = open_coco(root / args.val, root / args.val_images, **opened)
    if not coco.annotations:
        raise ValueError(f"'{coco.file}' has no annotations: there is nothing to learn.")
    check_classes(validation, coco.classes, f"'{coco.file}'")
    torch.manual_seed(args.seed)
    backbone = create_backbone(
        args.model, pretrained=not args.from_scratch, in_chans=args.in_chans, drop_path_rate=args.drop_path,
        **args.model_kwargs,
    ).read_with(args.nodata)  # fmt: skip
    for part in (coco, validation):
        check_sizes(part, backbone.in_chans, backbone.pixels)
    short, long = args.test_size or (args.img_size, args.img_size)
    detector = build_detector(
        backbone, len(coco.classes), boxes_only=args.boxes_only, frozen=args.frozen, out_channels=args.out_channels,
        min_size=short, max_size=long, _skip_resize=True,  # in training: large_scale_jitter has done it
        **args.detector_kwargs,
    )  # fmt: skip
    samples = DetectionSamples(
        coco,
        large_scale_jitter(args.img_size, tuple(args.scale), hflip=args.hflip, vflip=args.vflip),
        masks=masks, in_chans=backbone.in_chans, pixels=backbone.pixels, seed=args.seed,
    )  # fmt: skip
    loader = create_loader(samples, collate, world, batch_size=args.batch_size, workers=args.workers, seed=args.seed)
    per_epoch = len(loader) // args.grad_accum_steps
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
    training = Training(
        detector,
        parameter_groups(
            detector, backbone, weight_decay=args.weight_decay, layer_decay=args.layer_decay,
            layer_decay_type=args.layer_decay_type,
        ),
        Schedule(
            args.lr, args.epochs * per_epoch, args.sched, warmup=args.warmup_updates,
            steps=tuple(epoch / args.epochs for epoch in args.decay_epochs),
        ),
        world, seed=args.seed, grad_accum_steps=args.grad_accum_steps, clip_grad=args.clip_grad, amp_dtype=amp_dtype,
        ema_decay=args.model_ema_decay if args.model_ema else None, opt=args.opt,
    )  # fmt: skip
    name = args.experiment or experiment_name("detect", args.model, world)
    if args.resume and not args.experiment:
        raise ValueError("--resume auto needs --experiment, the folder of the run to continue.")
    folder = TransferFolder(Path(args.output) / name, resume=args.resume == "auto", overwrite=args.overwrite)
    settings = {
        "task": "detection", **json.loads(json.dumps(vars(args))), "experiment": name, "classes": coco.classes,
        "num_images": len(coco.images), "num_validation": len(validation.images), "world_size": world.size,
        "in_chans": backbone.in_chans, "pixels": backbone.pixels.record() or None,
        "total_updates": training.schedule.updates,
    }  # fmt: skip
    folder.check_same(settings, FIXED)
    world.agree({"the number of images": len(coco.images), "the classes": coco.classes})
    world.say(about(args, coco, validation, detector, training, world, recipe))
    if args.dry_run:
        return None
    evaluate = partial(
        evaluate_epoch, coco=validation, folder=folder, world=world, masks=masks, shown=args.shown_images,
        how=dict(
            device=world.device, in_chans=backbone.in_chans, pixels=backbone.pixels, batch_size=args.batch_size,
            workers=args.workers, amp_dtype=amp_dtype,
        ),
        about=dict(dataset=data_name(args.data_dir), info=how_made(settings)),
    )  # fmt: skip
    run = Run(
        training, loader, folder, settings, evaluate, eval_interval=args.eval_interval, log_interval=args.log_interval
    )
    if folder.checkpoint is not None:
        run.load(folder.checkpoint)
    if world.primary:
        folder.claim(settings, command=command, epoch=training.update_number // max(1, per_epoch))
        run.logs = open_logs(folder.path, settings, args.log_wandb, args.wandb_project, args.log_tensorboard)
    world.wait()
    return run


def about(
    args: argparse.Namespace, coco: Coco, validation: Coco, detector: Any, training: Training, world: World,
    recipe: Recipe | None,
) -> str:  # fmt: skip
    """What the run is, and what of it is unlike its recipe."""
    batch = args.batch_size * args.grad_accum_steps * world.size
    lines = [
        f"{args.model}: {sum(p.numel() for p in detector.parameters()) / 1e6:.1f}M parameters; "
        f"{len(coco.images)} images with {len(coco.annotations)} objects of {len(coco.classes)} classes, "
        f"{len(validation.images)} to validate; {training.schedule.updates} updates of {batch} images, "
        f"lr {args.lr:.2e}, on {world.size} x {world.device.type}"
    ]
    if recipe is not None and recipe.global_batch not in (None, batch):
        lines.append(
            f"note: the recipe {recipe.name} is for {recipe.global_batch} images an update, and this run has {batch}: "
            "choose --grad-accum-steps so, or another --lr."
        )
    if prepared := str(backbone_of(detector).pixels):
        lines.append(f"stored values are prepared as those that the model was trained on: {prepared}")
    left_out = coco.left_out + validation.left_out
    if left_out:
        lines.append(f"note: {left_out} wrong annotations are left out.")
    if training.schedule.warmup > training.schedule.updates // 2:
        lines.append(
            f"note: the warmup, {training.schedule.warmup} updates, is more than half of the run; lower "
            "--warmup-updates."
        )
    return "\n".join(lines)


def evaluate_epoch(
    epoch: int, model: nn.Module, last: bool, *, coco: Coco, folder: TransferFolder, world: World, masks: bool,
    shown: int, how: dict[str, Any], about: dict[str, Any],
) -> dict[str, float]:  # fmt: skip
    """Measures the detector, draws what it finds and exports it; at the end, writes what it found."""
    metrics, results = evaluate_detector(model, coco, masks=masks, world=world if world.distributed else None, **how)
    if world.primary:
        if shown:
            ids = [image.id for image in coco.images if image.annotations][:shown] or [coco.images[0].id]
            save_found(
                folder.path / "predictions" / f"epoch-{epoch:04d}.png", coco, results, image_ids=ids, masks=masks,
                in_chans=how["in_chans"], pixels=how["pixels"],
            )  # fmt: skip
        export_detector(model, folder.path / "model", classes=coco.classes, metrics=metrics, **about)  # pyright: ignore
        if last:
            write_json(folder.path / "predictions" / "validation.json", results)
            say(table(metrics))
    return metrics


def table(metrics: dict[str, float]) -> str:
    """The numbers of COCO in percent, boxes and masks in columns."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    names = [key.removeprefix("box_") for key in metrics if key.startswith("box_")]
    rows = [f"{'':10}" + "".join(f"{kind:>8}" for kind in kinds)]
    for name in names:
        values = (metrics[f"{kind}_{name}"] for kind in kinds)
        rows.append(f"{name:10}" + "".join(f"{100 * v:8.1f}" if v >= 0 else f"{'-':>8}" for v in values))
    return "\n".join([*rows, "in %, by faster-coco-eval; - where no object has that size"])


def evaluate_command(args: argparse.Namespace) -> None:
    """`detect eval`."""
    output = None if args.output is None else Path(args.output)
    if output is not None and output.exists() and not args.overwrite and any(output.iterdir()):
        raise ValueError(f"The folder '{output}' is not empty. Pass --overwrite, or another --output.")
    classes, detector = classes_of(args.model), open_detector(args.model)
    backbone = backbone_of(detector).read_with(args.nodata)
    if args.soft_nms:
        use_soft_nms(detector, args.soft_nms)
    masks, root = not detector.made_of["boxes_only"], Path(args.data_dir)  # pyright: ignore
    coco = open_coco(
        root / args.val, root / args.val_images, masks=masks, drop_wrong=args.drop_wrong, in_chans=backbone.in_chans,
        pixels=backbone.pixels,
    )  # fmt: skip
    check_classes(coco, classes, f"the model '{args.model}'")
    rle_codec()
    results = find_objects(detector.to(args.device), coco, **reading(args, backbone))
    metrics = average_precision(coco, results, masks=masks)
    say(table(metrics))
    if output is not None:
        write_json(output / "metrics.json", metrics)
        write_json(output / "predictions.json", results)


def predict_command(args: argparse.Namespace) -> None:
    """`detect predict`: the objects in all images below a folder, as a JSON that `open_coco` reads."""
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(f"'{output}' exists. Pass --overwrite, or another --output.")
    classes, detector = classes_of(args.model), open_detector(args.model)
    backbone = backbone_of(detector).read_with(args.nodata)
    if args.soft_nms:
        use_soft_nms(detector, args.soft_nms)
    source = FolderSource(args.images, backbone.in_chans, backbone.pixels)
    paths = [source.path(i) for i in range(len(source))]
    names = [Path(path).relative_to(args.images).as_posix() for path in paths]
    images = [CocoImage(i, path, name, 0, 0, []) for i, (path, name) in enumerate(zip(paths, names, strict=True), 1)]
    coco = Coco(output, images, classes, list(range(1, len(classes) + 1)))
    sizes: dict[int, tuple[int, int]] = {}
    if not detector.made_of["boxes_only"]:  # pyright: ignore
        rle_codec()
    results = find_objects(detector.to(args.device), coco, sizes=sizes, **reading(args, backbone))
    results = [result for result in results if result["score"] >= args.min_score]
    sized = [image._replace(height=sizes[image.id][0], width=sizes[image.id][1]) for image in images]
    content = coco._replace(images=sized).content()
    content["annotations"] = [
        dict(result, id=i, iscrowd=0, area=result["bbox"][2] * result["bbox"][3]) for i, result in enumerate(results, 1)
    ]
    write_json(output, content)
    say(f"{len(results)} objects in {len(images)} images: {output}")


def reading(args: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """How images are read and models run, of eval and predict."""
    return dict(
        device=torch.device(args.device), in_chans=backbone.in_chans, pixels=backbone.pixels,
        batch_size=args.batch_size, workers=args.workers,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
    )  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
