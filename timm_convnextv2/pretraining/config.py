"""`PretrainConfig`: every option of pretraining, declared once, with its default, limits and help.

`resolve` turns the options that a user gave into a config in which no value is left open. Functions below `setup` take
one of these parts, or plain values, never the whole config.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import device_option, option, part, workers_option
from ..data.config import DataSet, ImagePaths, PixelOptions, WindowOptions
from ..runs.logs import Logs

if TYPE_CHECKING:
    import torch

AUTO = "auto"  # --mean and --std that are to be measured
KEEP_BEST = {"knn": True, "ridge": True, "loss": False}  # measure, and whether larger values are better


def number_or_auto(word: str) -> float | str:
    """Converts one word of --mean or --std."""
    return word if word == AUTO else float(word)


# fmt: off
@dataclass(frozen=True)
class Selection:
    """Which of the images are trained on, and how often."""

    source_weights: tuple[float, ...] | None = option(
        None, "share of an epoch's samples for each --data-dir (or --data-list), in order", metavar="X")
    holdout: float = option(0.0, "fraction held out for the validation loss, e.g. 0.01", metavar="X")
    max_bad_images: float = option(
        0.01, "stop if a larger fraction cannot be decoded", metavar="X", at_least=0, at_most=1)


@dataclass(frozen=True)
class Crops:
    """How an image becomes the input of the network.

    `mean` and `std` hold `(AUTO,)` until they are measured.
    """

    img_size: int = option(224, "side of the square crops", metavar="N")
    input_size: tuple[int, int, int] | None = option(
        None, "replaces --in-chans and --img-size", metavar=("C", "H", "W"))
    in_chans: int = option(3, "1, 3, or the number of bands of TIFF and .npy files", metavar="N", at_least=1)
    mean: tuple[float, ...] | None = option(
        None, "mean per channel, or auto (default: ImageNet's, 0.5 for 1 channel, auto for others)", metavar="X",
        parse=number_or_auto)
    std: tuple[float, ...] | None = option(
        None, "standard deviation, or auto (default: ImageNet's, 0.25 for 1 channel, auto for others)", metavar="X",
        parse=number_or_auto)
    scale: tuple[float, float] = option((0.2, 1.0), "area of the random crop, relative to the image", metavar="X")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "aspect ratio of the random crop", metavar="X")
    hflip: float = option(0.5, "probability of a horizontal flip", metavar="P")
    vflip: float = option(0.0, "probability of a vertical flip", metavar="P")
    train_interpolation: str = option("bicubic", "how crops are resized", choices=("bicubic", "bilinear", "nearest"))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops in pixels."""
        return self.input_size[1:] if self.input_size else (self.img_size, self.img_size)

    @property
    def unmeasured(self) -> list[str]:
        """The names among 'mean' and 'std' that are still to be measured."""
        return [name for name in ("mean", "std") if getattr(self, name) == (AUTO,)]

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, once `resolve` and `measure` have set them."""
        assert self.mean is not None and self.std is not None and not self.unmeasured
        return self.mean, self.std


@dataclass(frozen=True)
class Network:
    """The FCMAE and its initial weights."""

    model: str = option(
        "fcmae_convnextv2_atto", "atto to huge; or, to continue from, the folder of a run or model, local-dir:FOLDER "
        "or hf-hub:USER/NAME", metavar="MODEL")
    pretrained: bool = option(False, "start from those weights, or from the published encoder (CC-BY-NC 4.0)")
    weights: str | None = option(
        None, "start from a local file in the official format, timm's, or an FCMAE's", metavar="FILE")
    patch_size: int = option(4, "stem patch; 1 for small images (stride 8)", metavar="N", at_least=1)
    mask_ratio: float = option(0.6, "fraction of the patches to remove", metavar="X")
    channel_dropout: float = option(
        0.0, "remove each channel of an image with this probability, so that the encoder works for images with fewer",
        metavar="P")
    decoder_depth: int = option(1, "blocks of the decoder", metavar="N")
    decoder_dim: int = option(512, "channels of the decoder", metavar="N", at_least=1)
    norm_pix_loss: bool = option(True, "normalise targets per patch")
    model_kwargs: dict[str, Any] = option({}, "more arguments of timm.create_model")
    grad_checkpointing: bool = option(False, "saves memory, 17 to 33 % more compute")


@dataclass(frozen=True)
class Average:
    """The moving average of the weights."""

    model_ema: bool = option(False, "keep and export a moving average of the weights")
    model_ema_decay: float = option(0.9999, "share of the average that each update keeps", metavar="X")
    model_ema_warmup: bool | None = option(
        None, "start with a shorter average (default: yes, or as in the run that is resumed)")


@dataclass(frozen=True)
class Schedule:
    """Length, batches and learning rate of a run."""

    batch_size: int = option(64, "images per process and step", short="-b", metavar="N", at_least=1)
    grad_accum_steps: int = option(1, "steps per update", metavar="N", at_least=1)
    global_batch_size: int | None = option(
        None,
        "images per update over all processes; sets the accumulation steps, and --batch-size becomes the per-process "
        "maximum", metavar="N", at_least=1)
    epochs: int | None = option(
        None, "passes over the images (default: 800, but at least 7,500 and at most 250,000 updates)", metavar="N",
        at_least=1)
    warmup_epochs: float | None = option(
        None, "epochs of linear warmup (default: a twentieth of --epochs, at most 40)", metavar="N", at_least=0)
    lr_base: float = option(
        6e-4, "learning rate for lr_base_size images per update; the paper's for its 4096", metavar="X", at_least=0)
    lr_base_size: int = option(256, "images per update that --lr-base is meant for", metavar="N", at_least=1)
    lr_base_scale: str = option(
        "sqrt", "how the learning rate follows the images of an update; the paper's linear with --lr-base 1.5e-4",
        choices=("sqrt", "linear"))
    lr: float | None = option(None, "peak learning rate; replaces --lr-base", metavar="X", at_least=0)


@dataclass(frozen=True)
class Optimizer:
    """How an update changes the weights."""

    warmup_lr: float = option(0.0, "learning rate at the start of the warmup", metavar="X", at_least=0)
    min_lr: float = option(0.0, "learning rate at the end", metavar="X", at_least=0)
    opt: str = option("adamw", "any optimizer of timm", metavar="NAME")
    opt_betas: tuple[float, float] = option((0.9, 0.95), "AdamW's betas", metavar="X")
    opt_eps: float = option(1e-8, "term in the optimizer's denominator", metavar="X")
    weight_decay: float = option(0.05, "none on biases, norms and GRN", metavar="X")
    clip_grad: float | None = option(None, "clip the gradient's norm (default: no clipping)", metavar="NORM")
    max_bad_steps: int = option(0, "NaN/inf updates to skip before stopping", metavar="N", at_least=0)


@dataclass(frozen=True)
class Compute:
    """Where and in which precision the model trains."""

    device: str = device_option()
    amp: bool = option(False, "mixed precision", negatable=True)
    amp_dtype: str = option("bfloat16", "type of mixed precision", choices=("bfloat16", "float16"))
    torchcompile: str | None = option(None, "compile the model", const="inductor", metavar="BACKEND")

    @property
    def dtype(self) -> "torch.dtype | None":
        """Type of mixed precision; None for float32."""
        import torch

        return getattr(torch, self.amp_dtype) if self.amp else None


@dataclass(frozen=True)
class Loading:
    """Data workers."""

    workers: int = workers_option("data processes per training process")
    pin_mem: bool = option(False, "faster copies to the GPU, for more memory")


@dataclass(frozen=True)
class Destination:
    """The folder of the run."""

    output: str = option("output", "folder of all runs", metavar="DIR")
    experiment: str = option("", "sub-folder of --output (default: time, model and size)", metavar="NAME")
    resume: str = option("", "a checkpoint, or 'auto' for the experiment's last", metavar="PATH", recorded=False)
    overwrite: bool = option(False, "first remove what an earlier run wrote to the folder", recorded=False)
    log_interval: int = option(10, "updates between readings of the loss", metavar="N", at_least=1)
    license: str = option("", "licence of the exported weights, e.g. mit", metavar="ID")


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are written."""

    checkpoint_interval: int = option(1, "epochs between checkpoints", metavar="N", at_least=1)
    recovery_interval: int = option(0, "updates between checkpoints within an epoch; 0: none", metavar="N", at_least=0)
    checkpoint_minutes: float = option(
        0.0, "minutes between checkpoints within an epoch; 0: none", metavar="M", at_least=0)
    milestone_interval: int | None = option(
        None, "epochs between checkpoints to keep (default: epochs / 4)", metavar="N", at_least=0)


@dataclass(frozen=True)
class Measures:
    """What is measured and drawn during the run."""

    recon_interval: int | None = option(
        None, "epochs between reconstructions (default: epochs / 10)", metavar="N", at_least=0)
    show_bands: tuple[int, ...] | None = option(
        None, "channels to draw as red, green and blue, or one (default: 1 2 3; 1 below three)", metavar="N")
    probe_dir: str | None = option(
        None, "labelled images (class folders, a CSV of name,label, or demo) for kNN and ridge on frozen features",
        metavar="PLACE")
    probe_interval: int | None = option(
        None, "epochs between these (default: as --recon-interval)", metavar="N", at_least=0)
    keep_best: str | None = option(
        None, "also keep the best encoder by this measure, in encoder-best", choices=tuple(KEEP_BEST))


@dataclass(frozen=True)
class PretrainConfig:
    """The options of a run. Defaults follow the paper, except for what docs/pretraining.md#recipes names."""

    config: str | None = option(
        None, "YAML file that sets any of the options", short="-c", metavar="FILE", recorded=False)
    recipe: str | None = option(
        None, "paper, small-images, or a .yaml file of options (default: small-images for images or crops of at most "
        "96 px, unless options of the network are given)", metavar="NAME")
    dry_run: bool = option(
        False, "print changed settings, images, memory and time, then stop", recorded=False)
    replay: str | None = option(
        None, "repeat the forward of a run's bad-step-*.json, then stop", metavar="FILE", recorded=False)
    paths: ImagePaths = part(ImagePaths, "data")
    data_set: DataSet = part(DataSet, "data")
    pixels: PixelOptions = part(PixelOptions, "data")
    windows: WindowOptions = part(WindowOptions, "data")
    selection: Selection = part(Selection, "data")
    crops: Crops = part(Crops, "data")
    network: Network = part(Network, "model")
    average: Average = part(Average, "model")
    schedule: Schedule = part(Schedule, "optimisation")
    optimizer: Optimizer = part(Optimizer, "optimisation")
    compute: Compute = part(Compute, "run")
    loading: Loading = part(Loading, "run")
    destination: Destination = part(Destination, "run")
    logs: Logs = part(Logs, "run")
    checkpoints: Checkpoints = part(Checkpoints, "run")
    measures: Measures = part(Measures, "run")
    seed: int = option(42, "seed of weights, order, crops and masks", metavar="N")
