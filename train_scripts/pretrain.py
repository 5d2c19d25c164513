#!/usr/bin/env python3
"""FCMAE pretraining of ConvNeXt V2 on unlabelled images: a small loop, to read from top to bottom and to change.

    python train_scripts/pretrain.py                                            # the small embedded data set
    python train_scripts/pretrain.py --data-dir IMAGES --model fcmae_convnextv2_tiny --output runs
    torchrun --nproc-per-node 8 train_scripts/pretrain.py --data-dir IMAGES ...  # a process per GPU

Options have the names that timm's train.py gives them, wherever it has the option. The result is
OUTPUT/EXPERIMENT/encoder, a timm folder that stock timm opens.
"""

import argparse
import contextlib
import difflib
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torch.distributed as dist
import yaml
from huggingface_hub.errors import HfHubHTTPError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import (
    NativeScaler,
    ParseKwargs,
    dispatch_clip_grad,
    init_distributed_device,
    trim_summary,
    unwrap_model,
    update_summary,
)
from torch.utils.data import DataLoader

import timm_convnextv2
from timm_convnextv2 import FCMAETask
from timm_convnextv2.checkpoint import export_encoder, load_checkpoint
from timm_convnextv2.data import (
    EpochBatchSampler,
    PretrainDataset,
    PretrainStream,
    PretrainTransform,
    TimmStream,
    check_readable,
    collate,
    create_source,
    sample_seed,
)
from timm_convnextv2.memory import memory_estimate, peak_memory
from timm_convnextv2.provenance import WEIGHTS, config_beside, read_config, resolve_license
from timm_convnextv2.report import (
    Progress,
    check_logs,
    open_logs,
    save_loss_curve,
    save_reconstructions,
)

# What changes where neither --data-dir nor --dataset is given: a run of about two minutes on two CPU cores.
EMBEDDED_DEFAULTS = dict(
    dataset="embedded",
    train_num_samples=512,
    img_size=56,
    patch_size=1,
    batch_size=16,
    epochs=6,
    lr_base=1.6e-2,
    workers=0,
    experiment="embedded",
)
VERSIONS = f"timm_convnextv2 {timm_convnextv2.__version__}, timm {timm.__version__}, torch {torch.__version__}"
SHOWN_EPOCH = 2**31 - 1  # crops and masks of the pictures: drawn as those of an epoch that never comes
# A checkpoint fits only a model, and its optimizer state only an optimizer, that agree in these.
# `pretrained` decides on the licence.
ARCHITECTURE = ("model", "pretrained", "in_chans", "patch_size", "decoder_depth", "decoder_dim", "model_kwargs", "opt")
# A run stopped in the middle of an epoch goes on only with the same of these.
DATA_ORDER = ("seed", "batch_size", "grad_accum_steps")
# Not settings of the run but of the call: args.yaml and checkpoints leave them out.
CALL_ONLY = ("config", "resume", "overwrite", "dry_run")


def refuse(message: str) -> NoReturn:
    """A mistake in the options, told as any other: once, and without the usage of all options."""
    raise ValueError(message)


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The options; defaults are the paper's recipe for ImageNet-1K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file that sets any of the options below")
    parser.add_argument("--dry-run", action="store_true", help="print settings, image count and memory, then stop")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="images anywhere below it; the root of --dataset where that is given")
    add("--dataset", default="", metavar="NAME", help="timm's hfds/, hfids/, wds/, tfds/, torch/...; or 'embedded'")
    add("--train-split", default="train", metavar="NAME", help="split of --dataset")
    add("--train-num-samples", type=int, metavar="N", help="images per epoch, streamed or embedded")
    add("--dataset-download", action="store_true", help="let --dataset download itself")
    add("--input-key", metavar="NAME", help="image column of --dataset")
    add("--max-bad-images", type=float, default=0.01, metavar="X", help="stop when a larger share cannot be decoded")
    add("--img-size", type=int, default=224, metavar="N", help="side of the square crops")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="replaces --in-chans and --img-size")
    add("--in-chans", type=int, default=3, metavar="N", help="1, 3, or the number of bands of TIFF and .npy files")
    add("--mean", type=float, nargs="+", metavar="X", help="per channel, of pixels scaled to [0, 1]")
    add("--std", type=float, nargs="+", metavar="X", help="likewise (default: ImageNet's for 3 channels)")
    add("--scale", type=float, nargs=2, default=[0.2, 1.0], metavar="X", help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="aspect ratio of the random crop")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--train-interpolation", default="bicubic", choices=["bicubic", "bilinear", "nearest"])

    add = parser.add_argument_group("model").add_argument
    add("--model", default="fcmae_convnextv2_atto", metavar="NAME",
        help="fcmae_convnextv2_{atto..huge}, or local-dir:FOLDER or hf-hub:USER/NAME to go on from")
    add("--pretrained", action="store_true", help="start from those weights, or the published encoder (CC-BY-NC 4.0)")
    add("--patch-size", type=int, default=4, metavar="N", help="stem patch; 1 for small images (stride 8)")
    add("--mask-ratio", type=float, default=0.6, metavar="X", help="share of the patches to remove")
    add("--decoder-depth", type=int, default=1, metavar="N")
    add("--decoder-dim", type=int, default=512, metavar="N")
    add("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=True, help="normalise targets per patch")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="more of timm.create_model's")
    add("--grad-checkpointing", action="store_true", help="less memory, a sixth to a third more work")
    add("--model-ema", action="store_true", help="keep and export a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9999, metavar="X")
    add("--model-ema-warmup", action="store_true", help="start with a shorter average")

    add = parser.add_argument_group("optimisation").add_argument
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images per process and step")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps per update")
    add("--epochs", type=int, default=800, metavar="N")
    add("--warmup-epochs", type=float, metavar="N", help="default: a twentieth of --epochs, at most 40")
    add("--lr-base", type=float, default=1.5e-4, metavar="X", help="lr = lr_base * images per update / lr_base_size")
    add("--lr-base-size", type=int, default=256, metavar="N")
    add("--lr", type=float, metavar="X", help="the learning rate itself; replaces --lr-base")
    add("--warmup-lr", type=float, default=0.0, metavar="X")
    add("--min-lr", type=float, default=0.0, metavar="X")
    add("--opt", default="adamw", metavar="NAME", help="any optimizer of timm")
    add("--opt-betas", type=float, nargs=2, default=[0.9, 0.95], metavar="X")
    add("--opt-eps", type=float, default=1e-8, metavar="X")
    add("--weight-decay", type=float, default=0.05, metavar="X")
    add("--clip-grad", type=float, metavar="NORM", help="clip the gradient's norm (default: no clipping)")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="bfloat16", choices=["bfloat16", "float16"])
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND")
    add("--seed", type=int, default=42, metavar="N")
    add("-j", "--workers", type=int, default=4, metavar="N", help="data processes per training process")
    add("--pin-mem", action="store_true", help="faster copies to the GPU, for more memory")
    add("--output", default="output", metavar="DIR")
    add("--experiment", default="", metavar="NAME", help="sub-folder of --output (default: time, model and size)")
    add("--resume", default="", metavar="PATH", help="a checkpoint, or 'auto' for the experiment's last")
    add("--overwrite", action="store_true", help="empty the experiment's folder first")
    add("--checkpoint-interval", type=int, default=1, metavar="N", help="epochs between checkpoints")
    add("--milestone-interval", type=int, metavar="N", help="epochs between checkpoints to keep (default: epochs / 4)")
    add("--recon-interval", type=int, metavar="N", help="epochs between reconstructions (default: epochs / 10)")
    add("--log-interval", type=int, default=10, metavar="N", help="updates between lines of plain progress")
    add("--log-wandb", action="store_true")
    add("--wandb-project", metavar="NAME")
    add("--log-tensorboard", action="store_true")
    add("--license", default="", metavar="ID", help="licence of the exported weights, e.g. mit")
    return parser
# fmt: on


def config_arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file as command-line arguments, so that the parser checks its keys and values."""
    try:
        config = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path} cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} holds a {type(config).__name__}, expected `option: value` lines.")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    arguments = []
    for key, value in config.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(str(key), actions, n=1)
            raise ValueError(
                f"--config {path}: unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ".")
            )
        options = action.option_strings
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"--config {path}: '{key}' takes true or false, got {value!r}.")
            arguments += options[:1] if value else options[1:]
        elif action.nargs == "?" and isinstance(value, bool):
            arguments += options[:1] if value else []
        elif value is not None:
            if isinstance(value, dict):
                value = [f"{k}={v}" for k, v in value.items()]
            arguments += [options[-1], *map(str, value if isinstance(value, list) else [value])]
    return arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line over config file over defaults, with what depends on several options resolved."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    given = {word.partition("=")[0] for word in argv}
    argv = (config_arguments(config, parser) if config else []) + argv
    args = parser.parse_args(argv)
    if not args.data_dir and args.dataset in ("", "embedded"):
        parser.set_defaults(**EMBEDDED_DEFAULTS)
        args = parser.parse_args(argv)
    start = start_folder(args.model)
    if start:
        if not args.pretrained:
            parser.error(
                f"--model {args.model} without --pretrained would start from random weights: add --pretrained."
            )
        parser.set_defaults(**start_defaults(start[1], sized="--img-size" in argv))
        args = parser.parse_args(argv)

    chans, *size = args.input_size or [args.in_chans, args.img_size, args.img_size]
    if "--input-size" not in given:  # then it is a config's, and the command line wins
        chans = args.in_chans if "--in-chans" in given else chans
        size = [args.img_size, args.img_size] if "--img-size" in given else size
    args.in_chans, args.input_size = chans, [chans, *size]
    for name in (
        "in_chans",
        "patch_size",
        "decoder_dim",
        "batch_size",
        "grad_accum_steps",
        "epochs",
        "checkpoint_interval",
        "log_interval",
        "lr_base_size",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if start and args.mean is None and args.std is None:
        cfg = start[1].get("pretrained_cfg", {})
        for name in ("mean", "std"):
            values = cfg.get(name) or []
            if len(values) in (1, args.in_chans):
                setattr(args, name, list(values) * (args.in_chans // len(values)))
    if args.mean is None and args.std is None:
        pictures = args.in_chans == 3
        args.mean = list(IMAGENET_DEFAULT_MEAN) if pictures else [0.5] * args.in_chans
        args.std = list(IMAGENET_DEFAULT_STD) if pictures else [0.25] * args.in_chans
        if args.in_chans not in (1, 3):
            parser.error(f"--in-chans {args.in_chans} needs --mean and --std with {args.in_chans} values each.")
    for name in ("mean", "std"):
        if len(getattr(args, name) or []) != args.in_chans:
            parser.error(f"--{name} has {len(getattr(args, name) or [])} values for {args.in_chans} channels.")
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs / (12 if args.dataset == "embedded" else 20))
    if not 0 <= args.warmup_epochs < args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} must lie below --epochs {args.epochs}.")
    if not 0 <= args.max_bad_images <= 1:
        parser.error(f"--max-bad-images is a share between 0 and 1, got {args.max_bad_images}.")
    args.milestone_interval = args.milestone_interval or max(1, args.epochs // 4)
    args.recon_interval = args.recon_interval or max(1, args.epochs // 10)
    return args


def start_folder(name: str) -> tuple[dict, dict] | None:
    """Where the weights of a `local-dir:` or `hf-hub:` model are, as timm's overlay, and its config.json; else None."""
    source, _, place = name.partition(":")
    if source not in ("local-dir", "hf-hub"):
        return None
    if source == "local-dir":
        overlay = {"file": str(Path(place) / WEIGHTS)}
        config = read_config(Path(place) / "config.json")
        if not Path(overlay["file"]).is_file():
            raise ValueError(f"--model {name}: the folder has no {WEIGHTS}.")
        return overlay, config
    overlay = {"hf_hub_id": place}
    try:
        config = config_beside(overlay)
    except (OSError, HfHubHTTPError) as e:
        raise ValueError(
            f"--model {name}: the Hugging Face Hub or its local cache does not give its config.json "
            f"({type(e).__name__}: {str(e).partition(chr(10))[0]}). Check name, network and token."
        ) from e
    if config is None:
        raise ValueError(
            f"--model {name}: the repository has no config.json of a ConvNeXt V2 or FCMAE in timm's format."
        )
    return overlay, config


def start_defaults(config: dict, sized: bool) -> dict:
    """Defaults that follow from the config.json of the model to go on from: its options and image size."""
    options, cfg = config.get("model_args", {}), config.get("pretrained_cfg", {})
    names = ("in_chans", "patch_size", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
    defaults = {name: options[name] for name in names if name in options}
    defaults.setdefault("patch_size", 4)
    chans, height, width = cfg.get("input_size", (3, 224, 224))
    defaults.setdefault("in_chans", chans)
    if height == width:
        defaults["img_size"] = height
    elif not sized:
        defaults["input_size"] = [chans, height, width]
    return defaults


def short_name(model: str) -> str:
    """The model's name without the folders that lead to it."""
    return model.rstrip("/").rpartition("/")[2]


def settings_of(args: argparse.Namespace) -> dict:
    """The settings of the run, for args.yaml and checkpoints."""
    return {k: v for k, v in vars(args).items() if k not in CALL_ONLY}


def create_fcmae(args: argparse.Namespace) -> timm_convnextv2.FCMAE:
    """The model that the options name, from the seed."""
    known, start = timm.list_models("fcmae_*"), start_folder(args.model)
    name = f"fcmae_{start[1]['architecture'].removeprefix('fcmae_')}" if start else args.model
    if name.split(".")[0] not in known:
        near = f"fcmae_{args.model}" if f"fcmae_{args.model.split('.')[0]}" in known else ""
        near = near or next(iter(difflib.get_close_matches(args.model, known, n=1, cutoff=0.3)), known[0])
        raise ValueError(
            f"--model {args.model} is not an FCMAE model; did you mean {near}? There are: {', '.join(known)}."
        )
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(
            name,
            pretrained=args.pretrained,
            pretrained_cfg_overlay=start[0] if start else None,
            img_size=tuple(args.input_size[1:]),
            in_chans=args.in_chans,
            patch_size=args.patch_size,
            mask_ratio=args.mask_ratio,
            decoder_depth=args.decoder_depth,
            decoder_dim=args.decoder_dim,
            norm_pix_loss=args.norm_pix_loss,
            **args.model_kwargs,
        )
    except (AssertionError, KeyError, TypeError) as e:
        raise ValueError(f"--model-kwargs {args.model_kwargs} does not suit {args.model}: {e!r}") from e
    resolve_license(args.license or None, model.encoder.pretrained_cfg.get("license"))  # not only at the first export
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model


class Run:
    """What a rank knows of the run: device, folder, and who speaks."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            world = argparse.Namespace(device=args.device)
            self.device = init_distributed_device(world)
            torch.zeros(1, device=self.device)
        except (AssertionError, RuntimeError) as e:
            raise ValueError(f"--device {args.device} cannot be used: {e}") from e
        self.rank, self.world_size, self.distributed = world.rank, world.world_size, world.distributed
        self.primary = self.rank == 0
        self.training = False  # whether settings and data have been checked
        self.stop = ""  # name of the signal that asked to stop

    def say(self, text: str) -> None:
        if self.primary:
            print(text, flush=True)

    def watch_signals(self) -> None:
        """SIGTERM and SIGINT ask to stop after the step; a second one stops at once."""

        def ask(number: int, _frame) -> None:
            self.stop = signal.Signals(number).name
            for other in (signal.SIGTERM, signal.SIGINT):
                signal.signal(other, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)

    def total(self, *values: float) -> list[float]:
        """Sums of values over all ranks."""
        return self.send(*values)()

    def send(self, *values: float | torch.Tensor) -> Callable[[], list[float]]:
        """Asks for sums of values over all ranks; calling the result waits for them, where that is a GPU's work."""
        if not self.distributed and not any(isinstance(v, torch.Tensor) for v in values):
            return lambda: list(values)
        # from the CPU's memory, which may be written again at once, as its own: only so the host does not wait
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(self.device, non_blocking=True) for v in values])
        if self.distributed:
            dist.all_reduce(sums)
        if sums.device.type != "cuda":
            return sums.tolist
        host = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list[float]:
            arrived.synchronize()
            return host.tolist()

        return read


def leave_signals_to_parent(_worker: int) -> None:
    """Data workers live on while the training process finishes its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def prepare_folder(args: argparse.Namespace, run: Run) -> tuple[Path, dict | None]:
    """The experiment's folder, writable, and the checkpoint to resume from."""
    if not args.experiment:
        if args.resume == "auto":
            raise ValueError("--resume auto needs --experiment, the folder of the run that is to go on.")
        size = "x".join(map(str, args.input_size[1:]))
        stamp = [datetime.now().strftime("%Y%m%d-%H%M%S")]
        if run.distributed:
            dist.broadcast_object_list(stamp)
        args.experiment = f"{stamp[0]}-{short_name(args.model).replace('.', '_')}-{size}"
    folder = Path(args.output) / args.experiment
    if Path(args.output).resolve() not in folder.resolve().parents:
        raise ValueError(f"--experiment {args.experiment} is not a folder below --output {args.output}.")
    last, checkpoint = folder / "last.pth.tar", None
    if args.resume:
        path = last if args.resume == "auto" else Path(args.resume)
        if args.resume != "auto" or path.exists():
            checkpoint = {**load_checkpoint(path), "path": str(path)}
    here = args.resume == "auto" or checkpoint is not None and path.resolve().parent == folder.resolve()
    if checkpoint is not None and here:
        args.overwrite = False  # what is there is part of the run
    elif folder.is_dir() and any(folder.iterdir()) and not args.overwrite and not here:
        raise ValueError(
            f"The output folder {folder} is not empty. Go on with that run: --resume auto. Start again and delete what "
            "is in it: --overwrite. Or choose another --experiment or --output."
        )
    return folder, checkpoint


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Makes the folder and proves that it can be written."""
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise ValueError(f"The output folder {folder} cannot be written ({e}). Choose another with --output.") from e


def check_resume(args: argparse.Namespace, checkpoint: dict, progress: dict) -> None:
    """Refuses a checkpoint of another model, and one from the middle of an epoch of other data."""
    path, before, then = checkpoint["path"], checkpoint.get("args"), checkpoint.get("progress")
    if not isinstance(before, dict) or not isinstance(then, dict):
        raise ValueError(f"{path} is not a checkpoint of this script: it has no training state to resume.")

    def differences(old: dict, new: dict, names: tuple[str, ...]) -> list[str]:
        return [f"{name}: {old.get(name)!r} there, {new[name]!r} here" for name in names if old.get(name) != new[name]]

    differs = differences(before, vars(args), ARCHITECTURE)
    if differs:
        raise ValueError(
            f"Cannot resume from {path}, which differs in {'; '.join(differs)}. Repeat the settings of that run "
            "(its args.yaml), or start a new --experiment."
        )
    if args.model_ema and "state_dict_ema" not in checkpoint:
        raise ValueError(f"Cannot resume from {path} with --model-ema: that run kept no moving average.")
    differs = differences(before, vars(args), DATA_ORDER) + differences(then, progress, ("world_size", "num_images"))
    if differs and then["update"]:
        raise ValueError(
            f"Cannot resume from {path}: it was saved in the middle of an epoch, and the order of the images differs "
            f"in {'; '.join(differs)}. Resume with the same, or from a milestone checkpoint."
        )


def save_checkpoint(path: Path, task: FCMAETask, optimizer, scaler, args: argparse.Namespace, progress: dict) -> None:
    """Writes a checkpoint in timm's format, whole or not at all."""
    state = {
        "epoch": progress["epoch"] - 1,  # timm: the last one completed
        "arch": args.model,
        "version": 2,
        "args": settings_of(args),
        "progress": progress,
        "optimizer": optimizer.state_dict(),
        **task.get_checkpoint_state(),
        **task.get_checkpoint_state(ema=True),
    }
    if scaler is not None:
        state[scaler.state_dict_key] = scaler.state_dict()
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def next_commands(args: argparse.Namespace, folder: Path) -> str:
    """What to do with the result, ready to paste."""
    encoder, (chans, height, width) = folder.resolve() / "encoder", args.input_size
    size = f"--img-size {height}" if chans == 3 and height == width else f"--input-size {chans} {height} {width}"
    recipe = "small-data" if args.data_dir or args.dataset not in ("", "embedded") else "smoke"
    finetune = shlex.join(["python", str(Path(__file__).with_name("finetune.py")), "--recipe", recipe])
    publish = shlex.join(["python", str(Path(__file__).with_name("publish.py")), str(folder), "USER/NAME"])
    publish += "" if args.license or args.pretrained else " --license ID"
    return f"""\
Load it in Python, with timm alone:
  python -c "import timm; print(timm.create_model('local-dir:{encoder}', pretrained=True, num_classes=10))"
Finetune it with timm's train.py and a recipe, on a folder with train/ and validation/:
  {finetune} --model "local-dir:{encoder}" {size} --data-dir DATA
Look at the loss and at what it predicts:
  {folder.resolve() / "loss.png"}
  {folder.resolve() / "reconstructions" / f"epoch-{args.epochs:04d}.png"}
See what publishing would send:
  {publish} --dry-run"""


def resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with this run."""
    words, skip = [], False
    for word in sys.argv:
        if skip or word == "--overwrite":
            skip = False
        elif word in ("--resume", "--experiment"):
            skip = True
        elif not word.startswith(("--resume=", "--experiment=")):
            words.append(shlex.quote(word))
    launcher = (
        "python"
        if "LOCAL_WORLD_SIZE" not in os.environ
        else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    )
    return " ".join([launcher, *words, "--experiment", shlex.quote(args.experiment), "--resume auto"])


def reads_late(optimizer: torch.optim.Optimizer, scaler, device: torch.device) -> bool:
    """Whether the loss of an update is read while the next one is under way: the host never waits for the GPU.

    Then the optimizer itself must leave the weights alone when the loss is not finite, as PyTorch's fused ones do.
    """
    return device.type == "cuda" and scaler is None and all(group.get("fused") for group in optimizer.param_groups)


def train_update(
    task: FCMAETask, optimizer, scaler, batches, args: argparse.Namespace, run: Run, late: bool
) -> tuple[float | torch.Tensor, list[tuple[int, str]], float]:
    """One optimizer update: forward and backward of --grad-accum-steps batches, then the step.

    Returns:
        Mean loss (on the GPU where it is to be read `late`), `(index, reason)` of images that could not be decoded,
        seconds spent waiting for data.

    Raises:
        FloatingPointError: The loss is not finite. Then, and with `late` too, weights stay those of before the update.
    """
    optimizer.zero_grad()
    total, bad, waited = 0.0, [], 0.0
    for step in range(args.grad_accum_steps):
        start = time.perf_counter()
        images, masks, failed = next(batches)
        waited += time.perf_counter() - start
        bad += failed
        last = step + 1 == args.grad_accum_steps
        with contextlib.nullcontext() if last else task.no_sync():
            with torch.autocast(run.device.type, getattr(torch, args.amp_dtype), enabled=args.amp):
                loss = task(images.to(run.device, non_blocking=True), masks)["loss"] / args.grad_accum_steps
            total = total + (loss.detach().double() if late else loss.item())
            if not late and not math.isfinite(total):
                raise FloatingPointError(f"The loss is {total}.")
            if scaler is not None:
                scaler(loss, optimizer, args.clip_grad, "norm", task.get_clip_parameters(), need_update=last)
            else:
                loss.backward()
    if scaler is None:
        if args.clip_grad is not None:
            dispatch_clip_grad(task.get_clip_parameters(), args.clip_grad)
        if late:
            failed = (~torch.isfinite(total)).float()
            if run.distributed:
                dist.all_reduce(failed, op=dist.ReduceOp.MAX)
            # what GradScaler sets; here it stays: nothing is learnt between a loss and the host's reading it
            optimizer.found_inf = torch.maximum(failed, getattr(optimizer, "found_inf", failed))
        optimizer.step()
    return total, bad, waited


def note_bad_images(bad: list[tuple[str, str]], known: dict[str, str], run: Run, bar: Progress) -> None:
    """Adds images that could not be decoded, `(name, reason)` on any rank, to those known, and names the new ones."""
    everywhere = [bad]
    if run.distributed:
        everywhere = [None] * run.world_size
        dist.all_gather_object(everywhere, bad)
    for name, reason in sum(everywhere, []):
        if name not in known:
            known[name] = reason
            bar.note(f"Skipped an image that cannot be decoded ({len(known)} so far): {reason}")


def describe(args: argparse.Namespace, progress: dict, peak_lr: float) -> dict[str, str]:
    """How the weights were made, for the README of the export."""
    data = args.dataset if args.dataset != "embedded" else "the embedded data set of timm_convnextv2"
    images = args.batch_size * args.grad_accum_steps * progress["world_size"]
    return {
        "Method": f"FCMAE, mask ratio {args.mask_ratio}, decoder {args.decoder_depth} x {args.decoder_dim}, "
        + ("pixels normalised per patch" if args.norm_pix_loss else "plain pixels"),
        **(
            {"Started from": short_name(args.model) if ":" in args.model else "the published encoder"}
            if args.pretrained
            else {}
        ),
        "Data": f"{data or Path(args.data_dir).resolve().name}, {progress['num_images']} images",
        "Epochs": f"{progress['epoch']} of {args.epochs}" + (" and a part of the next" if progress["update"] else ""),
        "Optimizer": f"{args.opt}, lr {peak_lr:.2e} for {images} images per update, weight decay {args.weight_decay}, "
        f"betas {tuple(args.opt_betas)}",
        "Weights": f"moving average ({args.model_ema_decay})" if args.model_ema else "last",
        "Seed": str(args.seed),
        "Made with": VERSIONS,
    }


def open_data(args: argparse.Namespace, run: Run, grid: tuple[int, int]):
    """The data, checked before anything is written.

    Returns:
        The loader; `set_epoch(epoch, start_batch)`; batches per epoch; number of images; the name of an image by its
        index (None for streams); the few images and masks that the pictures show.
    """
    transform = PretrainTransform(
        tuple(args.input_size[1:]), tuple(args.scale), tuple(args.ratio), args.hflip, args.vflip,
        args.train_interpolation, tuple(args.mean), tuple(args.std),
    )  # fmt: skip

    def source_of_images():
        return create_source(
            args.data_dir, args.dataset, args.train_split, args.in_chans, args.input_key, args.dataset_download,
            args.train_num_samples, args.batch_size, args.seed,
        )  # fmt: skip

    source = source_of_images()
    options = dict(
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        persistent_workers=args.workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own, or each epoch would draw from the model's
    )
    if isinstance(source, TimmStream):
        dataset = PretrainStream(source, transform, grid, args.mask_ratio, args.seed)
        source.set_loader_cfg(num_workers=args.workers)
        loader = DataLoader(dataset, batch_size=args.batch_size, drop_last=True, **options)
        # from a reader of its own: workers would go on with one that has been opened here
        peek = PretrainStream(source_of_images(), transform, grid, args.mask_ratio, args.seed)
        images = len(source) * run.world_size
        return (
            loader,
            lambda epoch, _: dataset.set_epoch(epoch),
            len(source) // args.batch_size,
            images,
            None,
            [*islice(peek, 6)],
        )
    check_readable(source)
    dataset = PretrainDataset(source, transform, grid, args.mask_ratio, args.seed)
    sampler = EpochBatchSampler(len(source), args.batch_size, args.seed, run.rank, run.world_size)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    count = min(6, len(source))
    shown = [dataset[(SHOWN_EPOCH, i * len(source) // count)] for i in range(count)] if run.primary else []
    return loader, sampler.set_epoch, len(sampler), len(source), source.name, shown


def main(args: argparse.Namespace, run: Run) -> int:
    """Sets everything up, checks it, trains; returns the exit status."""
    # --- model, data, folder: whatever is wrong with them shows here, before anything is written
    model = create_fcmae(args)
    height, width = args.input_size[1:]
    grid = model.grid(height, width)
    loader, set_epoch, batches_per_epoch, num_images, name_of, shown = open_data(args, run, grid)
    accum = args.grad_accum_steps
    per_update = args.batch_size * accum * run.world_size
    updates_per_epoch = batches_per_epoch // accum
    if not updates_per_epoch:
        raise ValueError(
            f"An update takes {per_update} images ({args.batch_size} x {accum} steps x {run.world_size} processes), "
            f"but the data set has {num_images}. Lower --grad-accum-steps or --batch-size."
        )
    total_updates = args.epochs * updates_per_epoch
    peak_lr = args.lr if args.lr is not None else args.lr_base * per_update / args.lr_base_size
    progress = dict(epoch=0, update=0, loss_sum=0.0, bad_images={}, world_size=run.world_size, num_images=num_images)
    folder, checkpoint = prepare_folder(args, run)
    if checkpoint:
        check_resume(args, checkpoint, progress)
    check_logs(args.log_wandb, args.log_tensorboard)
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends(exclude_tags=()))
        raise ValueError(f"--torchcompile {args.torchcompile} is no backend of torch.compile; there are: {known}.")

    about = (
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f}M of them the encoder; "
        f"{num_images} images of {args.in_chans} x {height} x {width} in {grid[0]} x {grid[1]} patches of "
        f"{model.stride} px; "
        f"{total_updates} updates of {per_update} images, lr {peak_lr:.2e}, on {run.world_size} x {run.device.type}"
    )
    if args.dry_run:
        fixed, step = memory_estimate(model, args.batch_size, ema=args.model_ema, amp=args.amp, device=run.device)
        run.say(yaml.safe_dump(settings_of(args), sort_keys=False) + about)
        run.say(
            f"Memory per process: about {fixed + step:.2f} GiB, {fixed:.2f} for weights, gradients and AdamW, "
            f"{step:.2f} for a step of {args.batch_size} images; data workers take their own."
        )
        return 0

    # --- training state
    task = FCMAETask(model.to(run.device), device=run.device, verbose=False)
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=peak_lr, weight_decay=args.weight_decay, betas=tuple(args.opt_betas), eps=args.opt_eps,
        **(dict(fused=True) if args.opt in ("adam", "adamw") and run.device.type in ("cpu", "cuda") else {}),
    )  # fmt: skip
    warmup = round(args.warmup_epochs * updates_per_epoch)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max(1, total_updates - warmup), lr_min=args.min_lr, warmup_t=warmup,
        warmup_lr_init=args.warmup_lr, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    scaler = NativeScaler(run.device.type) if args.amp and args.amp_dtype == "float16" else None
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if checkpoint:
        task.load_checkpoint_state(checkpoint["state_dict"])
        if args.model_ema:
            task.load_checkpoint_state(checkpoint["state_dict_ema"], ema=True)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)  # load_state_dict took those of the checkpoint: --weight-decay and others
        if scaler is not None and scaler.state_dict_key in checkpoint:
            scaler.load_state_dict(checkpoint[scaler.state_dict_key])
        progress = {**checkpoint["progress"], "world_size": run.world_size, "num_images": num_images}
        about += f"\nResumed from {checkpoint['path']}: epoch {progress['epoch'] + 1}, update {progress['update'] + 1}"
        del checkpoint
    run.total(0)  # waits: no rank may find the folder already claimed
    logs = []
    if run.primary:
        claim_folder(folder, args.overwrite)
        (folder / "args.yaml").write_text(f"# {VERSIONS}\n" + yaml.safe_dump(settings_of(args), sort_keys=False))
        logs = open_logs(folder, settings_of(args), args.log_wandb, args.wandb_project, args.log_tensorboard)
    run.total(0)  # waits: no rank goes on where the first could not claim it
    run.training = True

    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if run.distributed:
        task.prepare_distributed(device_ids=[run.device] if run.device.type == "cuda" else None)
    summary = folder / "summary.csv"
    if run.primary:
        trim_summary(str(summary), progress["epoch"])
    run.say(f"{about}\nWriting to {folder}")
    bar = Progress(
        total_updates,
        progress["epoch"] * updates_per_epoch + progress["update"],
        args.epochs,
        args.log_interval,
        run.primary,
    )

    def save(milestone: bool) -> None:
        """Exported encoder, loss curve, checkpoint."""
        export_encoder(
            unwrap_model(task.trainable_module),
            folder / "encoder",
            state_dict=task.get_checkpoint_state(ema=True).get("state_dict_ema"),
            mean=args.mean,
            std=args.std,
            license=args.license or None,
            info=describe(args, progress, peak_lr),
        )
        if summary.exists():
            save_loss_curve(summary, folder / "loss.png")
        names = [f"milestone-{progress['epoch']}"] * milestone + ["last"]  # 'last' is last: the rest of it is there
        for name in names:
            save_checkpoint(folder / f"{name}.pth.tar", task, optimizer, scaler, args, progress)

    # --- the loop
    late, sent = reads_late(optimizer, scaler, run.device), deque()

    def settle(allowed: int) -> bool:
        """Reads updates but for the newest `allowed`; True if a rank was asked to stop."""
        asked = False
        while len(sent) > allowed:
            read, bad, lr, speed, wait = sent.popleft()
            loss, stop, any_bad = read()
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss}.")
            asked |= bool(stop)
            progress["loss_sum"] += loss
            bar.update(epoch, loss, lr, speed, wait)
            if any_bad:
                named = [(name_of(i) if name_of else why.partition(": ")[0], why) for i, why in bad]
                note_bad_images(named, progress["bad_images"], run, bar)
        return asked

    run.watch_signals()
    task.train()
    for epoch in range(progress["epoch"], args.epochs):
        first = progress["update"]
        set_epoch(epoch, first * accum)
        batches = iter(loader)
        start, waited = time.perf_counter(), 0.0
        for update in range(first, updates_per_epoch):
            update_start, done = time.perf_counter(), epoch * updates_per_epoch + update
            scheduler.step_update(done)
            torch.manual_seed(sample_seed(args.seed, done, run.rank))  # drop path, the same in a resumed run
            loss, bad, wait = train_update(task, optimizer, scaler, batches, args, run, late)
            task.update_ema(step=done)

            numbers = run.send(loss / run.world_size, bool(run.stop), bool(bad))
            waited, seconds, lr = waited + wait, time.perf_counter() - update_start, optimizer.param_groups[0]["lr"]
            progress["update"] = update + 1
            sent.append((numbers, bad, lr, per_update / seconds, wait / seconds))
            stop = settle(int(late))
            too_many = len(progress["bad_images"]) > args.max_bad_images * num_images
            if stop or too_many:
                break
        stop |= settle(0)
        too_many = len(progress["bad_images"]) > args.max_bad_images * num_images

        if progress["update"] == updates_per_epoch:
            seconds = time.perf_counter() - start
            metrics = dict(
                loss=progress["loss_sum"] / updates_per_epoch,
                images_per_s=round((updates_per_epoch - first) * per_update / seconds, 1),
                data_wait=round(waited / seconds, 4),
                seconds=round(seconds, 1),
                memory_gib=round(peak_memory(run.device), 2),
                bad_images=len(progress["bad_images"]),
            )
            progress.update(epoch=epoch + 1, update=0, loss_sum=0.0)
            if run.primary:
                update_summary(epoch, metrics, {}, str(summary), lr=lr)
                for log in logs:
                    log(epoch, {**metrics, "lr": lr})
                if epoch == 0 or (epoch + 1) % args.recon_interval == 0 or epoch + 1 == args.epochs:
                    picture = folder / "reconstructions" / f"epoch-{epoch + 1:04d}.png"
                    picture.parent.mkdir(exist_ok=True)
                    title = f"{short_name(args.model)}, epoch {epoch + 1} of {args.epochs}, loss {metrics['loss']:.3f}"
                    images, masks, _ = collate(shown)
                    save_reconstructions(
                        picture, unwrap_model(task.trainable_module), images, masks, args.mean, args.std, title
                    )
            bar.note(f"epoch {epoch + 1}/{args.epochs}  loss {metrics['loss']:.4f}  {seconds:.0f} s")
        ended = stop or too_many or progress["epoch"] == args.epochs
        milestone = not progress["update"] and progress["epoch"] % args.milestone_interval == 0
        if run.primary and (ended or milestone or (epoch + 1) % args.checkpoint_interval == 0):
            save(milestone)
        if ended:
            break

    bar.close()
    too_many = len(progress["bad_images"]) > args.max_bad_images * num_images
    if progress["epoch"] >= args.epochs and not too_many:
        run.say(f"Done: the encoder is in {folder / 'encoder'}\n{next_commands(args, folder)}")
        return 0
    where = f"in epoch {progress['epoch'] + 1} of {args.epochs}, update {progress['update']} of {updates_per_epoch}"
    if not progress["update"]:
        where = f"after epoch {progress['epoch']} of {args.epochs}"
    if too_many:
        names = "\n".join(f"  {why}" for why in progress["bad_images"].values())
        run.say(
            f"Stopped {where}, everything saved: {len(progress['bad_images'])} of {num_images} images cannot be "
            f"decoded, more than --max-bad-images {args.max_bad_images:g}:\n{names}\nMend or remove them or raise the "
            f"limit, then go on with\n  {resume_command(args)}"
        )
        return 1
    run.say(f"Stopped by {run.stop or 'a signal'} {where}; everything is saved. Go on with\n  {resume_command(args)}")
    return 0


def cli(argv: list[str] | None = None) -> int:
    """Runs `main`; a mistake in settings or data is one message and exit status 2."""
    run = None
    try:
        args = parse_args(argv)
        run = Run(args)
        return main(args, run)
    except (ValueError, RuntimeError) as e:
        if run is not None and run.training:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain.py: error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(
            f"pretrain.py: {e} The update was not made and the last checkpoint is whole. Usual remedies, then --resume "
            "auto: --amp-dtype bfloat16 or no --amp, --clip-grad 1, a lower --lr-base.",
            file=sys.stderr,
        )
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(cli())
