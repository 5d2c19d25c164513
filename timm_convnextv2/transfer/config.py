"""The options of `detect` and `segment`: parts that both share, and a config for each of their actions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import MODEL, device_option, option, part, workers_option
from ..runs.logs import Logs

if TYPE_CHECKING:
    import torch


# fmt: off
@dataclass(frozen=True)
class Compute:
    """How images are read and where models run."""

    nodata: float | None = option(
        None, 'stored value meaning "no data"; such pixels are filled with the mean of the others (default: as the '
        "model was trained)", metavar="V")
    device: str = device_option()
    amp: bool = option(False, "mixed precision", negatable=True)
    amp_dtype: str = option("bfloat16", "type of mixed precision", choices=("bfloat16", "float16"))
    workers: int = workers_option("data processes per training process")

    @property
    def autocast(self) -> "torch.dtype | None":
        """Type of mixed precision; None for float32."""
        import torch

        return getattr(torch, self.amp_dtype) if self.amp else None


@dataclass(frozen=True)
class BackboneOptions:
    """The backbone of a new model."""

    model: str = option("", MODEL, metavar="MODEL")
    from_scratch: bool = option(False, "random weights in the backbone, for comparison")
    frozen: bool = option(False, "train only the layers above the backbone")
    in_chans: int | None = option(None, "channels of the images (default: the model's)", metavar="N", at_least=1)
    drop_path: float | None = option(None, "fraction of residual paths dropped in training", metavar="X")
    model_kwargs: dict[str, Any] = option({}, "more options of timm.create_model")


@dataclass(frozen=True)
class Crops:
    """Crops and flips of training images."""

    img_size: int = option(1024, "side of the training crops in pixels", metavar="N", at_least=1)
    scale: tuple[float, float] = option((0.1, 2.0), "image size before the crop, relative to --img-size", metavar="X")
    hflip: float = option(0.5, "probability of a horizontal flip", metavar="P")
    vflip: float = option(0.0, "probability of a vertical flip", metavar="P")

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"--scale {low:g} {high:g}: expected two factors above 0, the smaller one first.")


@dataclass(frozen=True)
class Learning:
    """Length, batch, optimizer and schedule, with the defaults of the paper's appendix A.3."""

    epochs: int = option(36, "passes over the images", metavar="N", at_least=1)
    updates: int | None = option(None, "length of the run in updates, instead of --epochs", metavar="N", at_least=1)
    batch_size: int = option(4, "images per process and step", short="-b", metavar="N", at_least=1)
    grad_accum_steps: int = option(1, "steps per update", metavar="N", at_least=1)
    opt: str = option("adamw", "any optimizer of timm", metavar="NAME")
    lr: float = option(1e-4, "learning rate of everything above the backbone", metavar="X")
    weight_decay: float = option(0.05, "none on biases and norms", metavar="X")
    layer_decay: float = option(1.0, "learning rate of a layer relative to the next higher one", metavar="X")
    layer_decay_type: str = option("group", "layers of a ConvNeXt V2", choices=("group", "single"))
    clip_grad: float | None = option(None, "clip the gradient's norm (default: no clipping)", metavar="NORM")
    model_ema: bool = option(False, "evaluate and export a moving average of the weights", negatable=True)
    model_ema_decay: float = option(0.9998, "share of the average that each update keeps", metavar="X")
    sched: str = option("step", "poly: linear to 0; step: see --decay-epochs", choices=("step", "cosine", "poly"))
    decay_epochs: tuple[float, ...] = option(
        (27.0, 33.0), "epochs after which 'step' divides the learning rate by 10", metavar="N")
    warmup_updates: int = option(1000, "updates of linear warmup", metavar="N", at_least=0)
    warmup_share: float = option(1e-3, "first learning rate of the warmup, relative to --lr", metavar="X")
    seed: int = option(42, "seed of weights, order and crops", metavar="N")


@dataclass(frozen=True)
class RunOptions:
    """The folder of a run, and its reports."""

    output: str = option("output", "folder of all runs", metavar="DIR")
    experiment: str = option("", "sub-folder of --output (default: time, task and model)", metavar="NAME")
    resume: str = option("", "a checkpoint, or 'auto' for the experiment's last", metavar="PATH", recorded=False)
    overwrite: bool = option(False, "first remove the files of an earlier run from the folder", recorded=False)
    eval_interval: int = option(1, "epochs between evaluations", metavar="N", at_least=1)
    shown_images: int = option(4, "images drawn at each evaluation", metavar="N", at_least=0)
    log_interval: int = option(20, "updates between progress lines", metavar="N", at_least=1)
    dry_run: bool = option(False, "check everything and exit before training", recorded=False)


@dataclass(frozen=True)
class TrainConfig:
    """What `detect train` and `segment train` share."""

    recipe: str | None = option(None, "settings by name, or a .yaml file; the command line wins", metavar="NAME")
    list_recipes: bool = option(False, "list the recipes and exit", recorded=False)
    compute: Compute = part(Compute)
    run: RunOptions = part(RunOptions, "run")
    logs: Logs = part(Logs, "run")


@dataclass(frozen=True)
class ExportedConfig:
    """What `eval` and `predict` share: an exported model, and where it runs."""

    model: str = option(..., "exported model: RUN/model, or hf-hub:USER/NAME", metavar="FOLDER")
    overwrite: bool = option(False, "replace existing files")
    compute: Compute = part(Compute)


@dataclass(frozen=True)
class Predicted:
    """The images of `predict`, and what to do with them."""

    data_dir: str = option("", "folder with images at any depth (default: needed)", metavar="DIR", words="IMAGES")
    max_bad_images: float = option(
        1.0, "stop if more than this fraction of the images cannot be decoded (default: only if none can)",
        metavar="X", at_least=0, at_most=1)
    draw: str | None = option(None, "folder for images of what was found", metavar="DIR")

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise ValueError("No images given. Name a folder: predict IMAGES.")


# ---------------------------------------------------------------------------------------------------------- detection


@dataclass(frozen=True)
class DetectData:
    """Annotated images to evaluate on."""

    data_dir: str = option("", "root of the data set; the paths below are relative to it", metavar="DIR")
    val: str = option("validation.json", "annotations to evaluate on, COCO's JSON or YOLO's data.yaml", metavar="FILE")
    val_images: str = option("validation/images", "their images", metavar="DIR")
    drop_wrong: bool = option(False, "leave out wrong annotations and report their number instead of stopping")
    merge_duplicates: bool = option(
        False, "merge images, annotations and category names that occur twice instead of stopping")
    max_objects: int | None = option(
        None, "objects per image that are found and evaluated (default: the most in the data, at least 100, which is "
        "COCO's number)", metavar="N", at_least=1)


@dataclass(frozen=True)
class DetectTrainData(DetectData):
    """Annotated images to train and evaluate on."""

    train: str = option("train.json", "annotations to train on, COCO's JSON or YOLO's data.yaml", metavar="FILE")
    train_images: str = option("train/images", "their images", metavar="DIR")


@dataclass(frozen=True)
class DetectModel(BackboneOptions):
    """A detector."""

    boxes_only: bool = option(False, "Faster R-CNN: boxes without masks")
    out_channels: int = option(256, "channels of the pyramid", metavar="N", at_least=1)
    detector_kwargs: dict[str, Any] = option(
        {}, "more options of torchvision's MaskRCNN, such as box_detections_per_img=300")
    test_size: tuple[int, int] | None = option(
        None, "image size in evaluation: shorter side, and limit of the longer one (default: --img-size for both)",
        metavar=("SHORT", "LONG"), at_least=1)


@dataclass(frozen=True)
class DetectConfig(TrainConfig):
    """`detect train`."""

    data: DetectTrainData = part(DetectTrainData)
    backbone: DetectModel = part(DetectModel, "model")
    crops: Crops = part(Crops, "images")
    learning: Learning = part(Learning, "training")


@dataclass(frozen=True)
class DetectUse(ExportedConfig):
    """How an exported detector runs."""

    soft_nms: str | None = option(
        None, "lower the scores of boxes that overlap better ones, as in the paper, instead of removing them "
        "(default: remove)", choices=("linear", "gaussian"))
    batch_size: int = option(2, "images per batch", short="-b", metavar="N", at_least=1)


@dataclass(frozen=True)
class DetectEvalConfig(DetectUse):
    """`detect eval`."""

    data: DetectData = part(DetectData)
    output: str | None = option(None, "folder for metrics.json and predictions.json", metavar="DIR")


@dataclass(frozen=True)
class DetectPredictConfig(DetectUse, Predicted):
    """`detect predict`."""

    output: str = option(..., "JSON file to write, in COCO's format", metavar="FILE")
    min_score: float = option(0.3, "leave out objects with a lower score", metavar="X")


# ------------------------------------------------------------------------------------------------------- segmentation


@dataclass(frozen=True)
class SegmentData:
    """Images with masks."""

    data_dir: str = option(
        "", "folder with SPLIT/images and SPLIT/masks, or images/SPLIT and masks/SPLIT, for the splits train and "
        "validation; or with YOLO's data.yaml", metavar="DIR")
    classes: str | None = option(
        None, "class names, one per line, line 1 is index 0 (default: DATA_DIR/classes.txt)", metavar="FILE")
    ignore_index: int = option(255, "value in masks of pixels that do not count", metavar="N")
    reduce_zero_label: bool = option(
        False, "0 in a mask means no class and the first class is 1, as in ADE20K", negatable=True)
    mask_values: tuple[str, ...] = option(
        (), "values in masks, one word per class: '0 255', or '0 1,255' for two values of class 1", metavar="V")
    mask_colors: bool = option(False, "masks have colours; lines of the class file are NAME R G B")
    mask_suffix: str = option("", "what the names of masks have after those of their images, such as _mask",
                              metavar="TEXT")
    allow_absent: bool = option(False, "train although a class has no pixel in the training masks")


@dataclass(frozen=True)
class Averaging:
    """How a segmenter runs on images: whole or in sliding windows, averaged over scales and flips."""

    short_side: int | None = option(
        None, "resize images so that the shorter side has N pixels (default: their own size)", metavar="N", at_least=1)
    window: int | None = option(
        None, "evaluate in sliding windows of N pixels (default: whole images)", metavar="N", at_least=1)
    stride: int | None = option(
        None, "pixels between windows (default: two thirds of --window)", metavar="N", at_least=1)
    scales: tuple[float, ...] = option(
        (1.0,), "relative image sizes whose probabilities are averaged", metavar="X", above=0)
    flip: bool = option(False, "average with the mirrored image")

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"--scales are {list(self.scales)}, expected one or more numbers above 0.")
        if self.stride is not None and self.stride > (self.window or 0):
            window = self.window or "not given"
            raise ValueError(f"--stride is {self.stride}, expected 1 to --window, which is {window}.")


@dataclass(frozen=True)
class SegmentModel(BackboneOptions):
    """A segmenter."""

    channels: int = option(512, "channels of the head", metavar="N", at_least=1)
    auxiliary_channels: int = option(256, "channels of the auxiliary head, 0 for none", metavar="N", at_least=0)


@dataclass(frozen=True)
class SegmentCrops(Crops):
    """Scale, crop, flip and colours in training."""

    img_size: int = option(512, "side of the training crops in pixels", metavar="N", at_least=1)
    scale: tuple[float, float] = option(
        (0.5, 2.0), "image size before the crop, relative to its own or to --short-side", metavar="X")
    colours: bool = option(True, "distort the colours of images with three channels")


@dataclass(frozen=True)
class SegmentLearning(Learning):
    """With defaults for small data; the recipes have the paper's."""

    epochs: int = option(100, "passes over the images", metavar="N", at_least=1)
    # one image per batch has no batch statistics
    batch_size: int = option(8, "images per process and step, at least 2", short="-b", metavar="N", at_least=2)
    sched: str = option("poly", "poly: linear to 0; step: see --decay-epochs", choices=("poly", "cosine", "step"))
    warmup_updates: int = option(0, "updates of linear warmup", metavar="N", at_least=0)
    warmup_share: float = option(1e-6, "first learning rate of the warmup, relative to --lr", metavar="X")


@dataclass(frozen=True)
class SegmentConfig(TrainConfig):
    """`segment train`."""

    data: SegmentData = part(SegmentData)
    backbone: SegmentModel = part(SegmentModel, "model")
    crops: SegmentCrops = part(SegmentCrops, "images")
    averaging: Averaging = part(Averaging, "images in evaluation")
    learning: SegmentLearning = part(SegmentLearning, "training")


@dataclass(frozen=True)
class SegmentEvalConfig(ExportedConfig):
    """`segment eval`."""

    data: SegmentData = part(SegmentData)
    split: str = option("validation", "split to evaluate on", choices=("train", "validation", "test"))
    output: str | None = option(None, "folder for metrics.json", metavar="DIR")
    averaging: Averaging = part(Averaging)


@dataclass(frozen=True)
class SegmentPredictConfig(ExportedConfig, Predicted):
    """`segment predict`."""

    output: str = option(..., "folder for the index PNGs", metavar="DIR")
    averaging: Averaging = part(Averaging)
