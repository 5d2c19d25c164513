"""The commands around pretraining beside what a user would write with timm and torchvision alone.

    python -m benchmarks.tasks [--tasks embed detect ...]

Each task times both sides in turn, in one run on the same images: JPEGs as of photographs, and random weights, which
cost the same as trained ones. A ratio above 1 means that the command is faster. Writes the ratios with their conditions
to `benchmarks/results/tasks.csv`.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import convnext
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import timm_convnextv2 as tcx
from benchmarks.decode import photograph
from benchmarks.measure import conditions, ratio, run_logged, time_in_turn, write_csv
from timm_convnextv2.checkpoint import export_encoder
from timm_convnextv2.finetune import images as finetune_images
from timm_convnextv2.transfer.backbone import Backbone, create_backbone
from timm_convnextv2.transfer.detection.detector import build_detector
from timm_convnextv2.transfer.segmentation.segmenter import Segmenter

Sides = dict[str, Callable[[], object]]  # "ours" and the other one
CLASSES = 8
DETECTION, SEGMENTATION = 320, 256  # pixels


def write_images(folder: Path, size: int, count: int) -> None:
    """Writes JPEGs of `size` pixels in class folders of `train` and `validation`, `count` in each of the two."""
    for split, first in (("train", 0), ("validation", count)):
        for i in range(count):
            home = folder / split / f"class{i % CLASSES}"
            home.mkdir(parents=True, exist_ok=True)
            photograph(size, first + i).save(home / f"{i}.jpg", quality=90)


class StockStages(nn.Module):
    """The four maps of timm's own ConvNeXt V2, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = convnext.convnextv2_atto(num_classes=0)
        self.channels = [info["num_chs"] for info in self.model.feature_info]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        maps = self.model.forward_intermediates(images, intermediates_only=True)
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


def embed(folder: Path) -> Sides:
    """`Encoder.embed`, and timm's data set, loader and model in a loop."""
    encoder = tcx.open_encoder(save_encoder(folder))
    stock = convnext.convnextv2_atto(num_classes=0).eval()
    images = str(folder / "train")

    def plain() -> list[Tensor]:
        return [rows for _, rows in timm_rows(images, stock, encoder.config)]

    return {"ours": lambda: encoder.embed(images, workers=0, progress=False), "other": plain}


def save_encoder(folder: Path) -> str:
    """Exports atto with random weights as a pretraining does."""
    model: Any = timm.create_model("fcmae_convnextv2_atto")
    export_encoder(model, folder / "encoder")
    return f"local-dir:{folder / 'encoder'}"


def timm_rows(images: str, model: nn.Module, config: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Labels and pooled features by timm's loader and one model."""
    shape = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    data: Any = create_dataset("", images, search_split=False)
    loader = create_loader(data, batch_size=32, use_prefetcher=False, num_workers=0, **shape)
    with torch.inference_mode():
        return [(labels, model(batch)) for batch, labels in loader]


def evaluate(folder: Path) -> Sides:
    """`evaluate` with all its baselines, and as many networks one after the other by timm's loader, with kNN."""
    encoder, config = save_encoder(folder), resolve_model_data_config(convnext.convnextv2_atto())

    def ours() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            tcx.evaluate(encoder, folder, probe=False, workers=0)

    def plain() -> list[float]:
        found = []
        for _ in range(4):  # the encoder, and random weights with three seeds
            model = convnext.convnextv2_atto(num_classes=0).eval()
            (train, rows), (test, queries) = (
                map(torch.cat, zip(*timm_rows(str(folder / split), model, config), strict=True))
                for split in ("train", "validation")
            )
            near = (nn.functional.normalize(queries) @ nn.functional.normalize(rows).T).topk(10).indices
            found.append(float((train[near].mode().values == test).float().mean()))
        return found

    return {"ours": ours, "other": plain}


def finetune_loader(folder: Path) -> Sides:
    """An epoch of training samples: what `finetune` feeds timm's `train.py` with, and timm's own data set."""
    ours = finetune_images.create_dataset("", str(folder / "train"), "train", reading=finetune_images.Reading())
    theirs: Any = create_dataset("", str(folder / "train"), search_split=False)
    options: Any = dict(batch_size=16, is_training=True, use_prefetcher=False, num_workers=1)
    loaders = {name: create_loader(data, (3, 224, 224), **options) for name, data in (("o", ours), ("t", theirs))}
    ours.transform = finetune_images.ByKind(ours.transform)
    return {"ours": lambda: [*loaders["o"]], "other": lambda: [*loaders["t"]]}


def step_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """Forward, loss and backward in train mode."""
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    return step


def detect(folder: Path) -> Sides:
    """A step of Mask R-CNN: `build_detector`, and torchvision's on a pyramid of stock timm's maps."""
    side, masks = DETECTION, torch.zeros(2, DETECTION, DETECTION, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 20, 120, 140], [100.0, 90, 260, 300]])
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
    photos = [torch.rand(3, side, side) for _ in range(2)]

    def loss(model: nn.Module) -> Tensor:
        return sum(model(photos, [dict(target) for _ in photos]).values())  # type: ignore[return-value]

    stages = StockStages()
    pyramid: Any = nn.Sequential(stages, FeaturePyramidNetwork(stages.channels, 256, extra_blocks=LastLevelMaxPool()))
    pyramid.out_channels = 256
    ours = build_detector(create_backbone("atto", pretrained=False), CLASSES, img_size=side)
    theirs = MaskRCNN(pyramid, CLASSES + 1, min_size=side, max_size=side)
    return {"ours": step_of(ours, loss), "other": step_of(theirs, loss)}


def segment(folder: Path) -> Sides:
    """A step of `Segmenter` (UPerNet, which torchvision lacks) and equal heads on stock timm's maps."""
    photos = torch.rand(4, 3, SEGMENTATION, SEGMENTATION)
    classes = torch.randint(0, CLASSES, (4, SEGMENTATION, SEGMENTATION))
    ours = create_backbone("atto", pretrained=False)
    stock = Backbone(convnext.convnextv2_atto(features_only=True), {}, mean=ours.mean, std=ours.std, img_size=224)
    ours, theirs = (Segmenter(b, CLASSES, channels=128, auxiliary_channels=64) for b in (ours, stock))

    def loss(model: nn.Module) -> Tensor:
        return sum(model(photos, classes).values())  # type: ignore[return-value]

    return {"ours": step_of(ours, loss), "other": step_of(theirs, loss)}


def processes(folder: Path) -> Sides:
    """A whole `pretrain` of 24 epochs in two processes of one thread, and in one process of one thread."""
    words = ["pretrain", "--data-dir", str(folder / "train"), "--model", "atto", "--img-size", "128"]
    words += ["--decoder-dim", "128"]
    words += ["--epochs", "24", "--warmup-epochs", "1", "--workers", "0", "--device", "cpu", "--recon-interval", "0"]
    words += ["--output", str(folder / "runs"), "--overwrite"]
    log = folder / "pretrain.log"

    def run(name: str, batch: int, *start: str) -> Callable[[], float]:
        command = [sys.executable, *start, "-m", "timm_convnextv2", *words, "--experiment", name]
        return lambda: run_logged([*command, "--batch-size", str(batch)], log)

    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")
    return {"ours": run("two", 16, *torchrun), "other": run("one", 32)}


def python(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def importing(folder: Path) -> Sides:
    """`import timm_convnextv2` and `import timm`, each in a new process."""
    return {"ours": python("-c", "import timm_convnextv2"), "other": python("-c", "import timm")}


def show_help(folder: Path) -> Sides:
    """`timm-convnextv2 pretrain --help` and `import timm`, which the help of timm's scripts begins with."""
    return {"ours": python("-m", "timm_convnextv2", "pretrain", "--help"), "other": python("-c", "import timm")}


# name of the task: its sides, what is compared with what
TASKS: dict[str, tuple[Callable[[Path], Sides], str]] = {
    "embed": (embed, "Encoder.embed; a loop of timm's loader and model"),
    "evaluate": (evaluate, "evaluate with all baselines; 4 networks by timm's loader, kNN alone"),
    "finetune": (finetune_loader, "an epoch of samples for train.py; timm's data set"),
    "detect": (detect, f"a step of Mask R-CNN, 2 images of {DETECTION} px; torchvision's on stock timm"),
    "segment": (segment, f"a step of UPerNet, 4 images of {SEGMENTATION} px; the same heads on stock timm"),
    "processes": (processes, "pretrain in 2 processes of one thread; in one process of one thread"),
    "import": (importing, "import timm_convnextv2; import timm"),
    "help": (show_help, "timm-convnextv2 pretrain --help; import timm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=500, help="of the JPEGs, in pixels")
    parser.add_argument("--images", type=int, default=96, help="of each of the two splits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), args.size, args.images)
        for task in args.tasks:
            build, what = TASKS[task]
            seconds = time_in_turn(build(Path(name)), args.rounds, warmup=1)
            middle, low, high = ratio(seconds["other"], seconds["ours"])
            medians = {f"{side}_s": f"{statistics.median(times):.3f}" for side, times in seconds.items()}
            rows.append(
                dict(task=task, ratio=f"{middle:.2f}", min=f"{low:.2f}", max=f"{high:.2f}", **medians, what=what)
            )
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = conditions(torch.device("cpu"), args.threads) | {
        "inputs": f"{args.images} JPEGs of {args.size} px per split, {args.rounds} rounds in turn; ratio = other / ours"
    }
    print(write_csv("tasks", rows, about))


if __name__ == "__main__":
    main()
