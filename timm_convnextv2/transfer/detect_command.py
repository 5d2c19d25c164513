"""`timm-convnextv2 detect`: trains a detector, measures it, and finds objects."""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..command import invocation, refused, say
from ..data import FolderSource
from ..files import whole_file
from ..finetune.recipe import Recipe, list_recipes
from ..pretrain.distributed import World
from ..report import check_logs, open_logs
from .backbone import Backbone, create_backbone
from .coco import (
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
from .command import data_name, experiment_name, how_made, train_command
from .detect_options import RECIPES, parse
from .detection import backbone_of, build_detector, classes_of, export_detector, open_detector
from .detection_metrics import average_precision, evaluate_detector, find_objects, save_found
from .folder import TransferFolder
from .groups import parameter_groups
from .loop import Run, Schedule, Training, create_loader
from .soft_nms import use_soft_nms

__all__ = ["main"]

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
    opened = dict(masks=masks, drop_wrong=args.drop_wrong)
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
        masks=masks, in_chans=backbone.in_chans, nodata=backbone.pixels, seed=args.seed,
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
            device=world.device, in_chans=backbone.in_chans, nodata=backbone.pixels, batch_size=args.batch_size,
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
                in_chans=how["in_chans"], nodata=how["nodata"],
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
        nodata=backbone.pixels,
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
        device=torch.device(args.device), in_chans=backbone.in_chans, nodata=backbone.pixels,
        batch_size=args.batch_size, workers=args.workers,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
    )  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
