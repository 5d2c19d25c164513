"""`timm-convnextv2 pretrain`."""

import argparse
import contextlib
import difflib
import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ParseKwargs

from ..checkpoint.provenance import training_of
from ..console import PROGRAM, CommandParser, refused, say
from ..data import Pixels
from ..models.masking import random_channels
from ..pretrain.batches import Batches, DataError, worker_died
from ..pretrain.checkpoints import NotSavedError
from ..pretrain.config import AUTO
from ..pretrain.loop import Run, keep_bad_step, train
from ..pretrain.measures import KEEP_BEST
from ..pretrain.messages import not_finite, resume_hint, start_command, stopped
from ..pretrain.replay import load_weights, read_record, replay
from ..pretrain.setup import create_model, find_files, open_data, set_up
from ..pretrain.start import Start, open_start, open_weights
from ..report.next_steps import next_commands
from ..runs.end import NotFiniteError, end_workers
from ..runs.lock import release_locks
from ..runs.world import Seat, World, leave
from .images import add_source_options, check_percentiles, pixels_of


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake in settings or data is one message and exit status 2.

    Args:
        argv: The options; those of the process by default.

    Returns:
        Exit status: 0, 1 where the run could not finish, 2 for a mistake.
    """
    world, run, others = None, None, {*multiprocessing.active_children()}
    try:
        args, start = parse_options(argv)
        if args.replay:
            return replay_bad_step(args, argv)
        world = World(args.device)
        run = set_up(args, start, world, start_command(argv))
        if run is None:
            return 0
        train(run, world)
    except Exception as e:
        return ended_by(e, run, world)
    finally:
        release_locks()
        end_workers({*multiprocessing.active_children()} - others)
        if world is not None:
            world.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if not run.stop:
        say(f"Done: the encoder is in {run.folder.encoder}")
        say(next_commands(run.settings, run.folder.path, run.plan.epochs))
        return 0
    say(stopped(run.progress, run.plan, run.stop, args.max_bad_images, args.experiment))
    return int(run.stop == "images")


def ended_by(error: Exception, run: Run | None, world: World | None) -> int:
    """Tells an error that has ended the run, once and on the process where it arose; the others end without a word.

    Returns:
        Exit status. What is no user's mistake is raised again, for its traceback.
    """
    if world is None:
        if not isinstance(error, ValueError | RuntimeError):
            raise error
        return refused("pretrain", error)
    if not isinstance(error, ValueError) and world.is_consequence(error):
        leave(1)  # what waits for the other processes would wait for ever
    if isinstance(error, NotFiniteError) and run is not None:
        return end_not_finite(error, run, world)
    if not world.training and isinstance(error, ValueError | RuntimeError):
        world.tell(f"timm-convnextv2 pretrain: error: {error}")
        return 2
    reason = worker_died(error) or (str(error) if isinstance(error, DataError | NotSavedError) else "")
    if not reason and world.distributed:  # before the others end, at which torchrun ends this one
        world.tell(f"Process {world.rank} of {world.size} fails:\n{''.join(traceback.format_exception(error))}")
        return 1
    if not reason or run is None:
        raise error
    world.tell(f"timm-convnextv2 pretrain: {reason}\n{resume_hint(run.folder.path.name)}")
    return 1


def end_not_finite(error: NotFiniteError, run: Run, world: World) -> int:
    """Tells of a loss that is not finite, which all processes found at once, and keeps what repeats it."""
    if world.primary:
        record = keep_bad_step(run, world, error, weights=True)
        world.tell(not_finite(error, run.settings["max_bad_steps"], record))
    else:
        with contextlib.suppress(RuntimeError):
            world.wait()  # or the first one would be asked to end while it writes
    return 1


def replay_bad_step(args: argparse.Namespace, argv: list[str] | None) -> int:
    """--replay: repeats the forward of an update whose loss was not finite; returns exit status 0.

    Args:
        args: The options.
        argv: As given; of them, --data-dir, --data-list, --index and --device win over those of the run.

    Raises:
        ValueError: The record, its weights or the data cannot be read.
    """
    path = Path(args.replay)
    record = read_record(path)
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    own = {
        k: getattr(args, k) for k in ("data_dir", "data_list", "index", "device") if f"--{k.replace('_', '-')}" in given
    }
    vars(args).update(record["settings"] | own | {"pretrained": False, "weights": None})
    if record["images"][0] is not None:
        args.workers = 0  # they change nothing but the order of streams
    world = World(args.device)
    device, listing = world.device, find_files(args, world)
    model = create_model(args, open_start(args.model))
    say(f"Weights: {load_weights(record, path, model)}")

    def open_rank(rank: int) -> Batches:
        return open_data(args, model, Seat(rank, record["world_size"]), listing)

    found = ""
    for finding in replay(record, model, open_rank, device):
        found = found or finding.cause
        what = finding.cause or "everything is finite"
        say(f"Process {finding.rank}, batch {finding.step + 1}: loss {finding.loss:.4g}; {what}")
    if not found:
        say(f"The loss was {record['loss']}, and is finite here: it depends on device, compilation, or other weights.")
    return 0


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


AT_LEAST_ONE = ("in_chans", "patch_size", "decoder_dim", "batch_size", "grad_accum_steps", "epochs")


AT_LEAST_ONE += ("checkpoint_interval", "log_interval", "lr_base_size")


# fmt: off
def build_parser() -> CommandParser:
    """The options; defaults are the paper's recipe for ImageNet-1K, and a horizontal flip (TRAINING.md)."""
    parser = CommandParser(
        prog=f"{PROGRAM} pretrain", description="FCMAE pretraining of ConvNeXt V2 on unlabelled images."
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file that sets any of the options below")
    parser.add_argument("--dry-run", action="store_true", help="print settings, image count and memory, then stop")
    parser.add_argument("--replay", metavar="FILE", help="repeat the forward of a run's bad-step-*.json, then stop")
    _add_data_options(parser.add_argument_group("data"))
    _add_model_options(parser.add_argument_group("model"))
    _add_optimizer_options(parser.add_argument_group("optimisation"))
    _add_run_options(parser.add_argument_group("run"))
    return parser


def _number_or_auto(word: str) -> float | str:
    return word if word == AUTO else float(word)


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_source_options(add)
    add("--source-weights", type=float, nargs="+", metavar="X",
        help="share of an epoch's places for each --data-dir (or --data-list), in order")
    add("--holdout", type=float, default=0.0, metavar="X", help="share never trained on, for eval_loss, e.g. 0.01")
    add("--max-bad-images", type=float, default=0.01, metavar="X", help="stop when a larger share cannot be decoded")
    add("--img-size", type=int, default=224, metavar="N", help="side of the square crops")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="replaces --in-chans and --img-size")
    add("--in-chans", type=int, default=3, metavar="N", help="1, 3, or the number of bands of TIFF and .npy files")
    add("--mean", type=_number_or_auto, nargs="+", metavar="X", help="per channel, of the divided pixels; or auto")
    add("--std", type=_number_or_auto, nargs="+", metavar="X",
        help="likewise (default: ImageNet's for 3 channels, 0.5 and 0.25 for 1, auto for others)")
    add("--scale", type=float, nargs=2, default=[0.2, 1.0], metavar="X", help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="aspect ratio of the random crop")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--train-interpolation", default="bicubic", choices=["bicubic", "bilinear", "nearest"])


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default="fcmae_convnextv2_atto", metavar="NAME",
        help="fcmae_convnextv2_{atto..huge}, or local-dir:FOLDER or hf-hub:USER/NAME to continue from")
    add("--pretrained", action="store_true", help="start from those weights, or the published encoder (CC-BY-NC 4.0)")
    add("--weights", metavar="FILE", help="start from a local file: the official format, timm's, or an FCMAE's")
    add("--patch-size", type=int, default=4, metavar="N", help="stem patch; 1 for small images (stride 8)")
    add("--mask-ratio", type=float, default=0.6, metavar="X", help="share of the patches to remove")
    add("--channel-dropout", type=float, default=0.0, metavar="P", help="remove each channel of an image with this "
        "probability, so that the encoder serves images with fewer")
    add("--decoder-depth", type=int, default=1, metavar="N")
    add("--decoder-dim", type=int, default=512, metavar="N")
    add("--norm-pix-loss", action=argparse.BooleanOptionalAction, default=True, help="normalise targets per patch")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="more of timm.create_model's")
    add("--grad-checkpointing", action="store_true", help="less memory, a sixth to a third more work")
    add("--model-ema", action="store_true", help="keep and export a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9999, metavar="X")
    add("--model-ema-warmup", action=argparse.BooleanOptionalAction,
        help="start with a shorter average (default: yes, or as the run that is resumed)")


def _add_optimizer_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images per process and step")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps per update")
    add("--global-batch-size", type=int, metavar="N", help="images per update over all processes: steps follow, and "
        "--batch-size is the most that a process takes at once")
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
    add("--max-bad-steps", type=int, default=0, metavar="N", help="updates to skip if the loss is not finite, in all")


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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
    add("--overwrite", action="store_true", help="first remove what an earlier run wrote to the folder")
    add("--checkpoint-interval", type=int, default=1, metavar="N", help="epochs between checkpoints")
    add("--recovery-interval", type=int, default=0, metavar="N", help="updates between checkpoints within an epoch")
    add("--checkpoint-minutes", type=float, default=0.0, metavar="M", help="likewise, by the clock")
    add("--milestone-interval", type=int, metavar="N", help="epochs between checkpoints to keep (default: epochs / 4)")
    add("--probe-dir", metavar="PLACE", help="labelled images: class folders, or a CSV of name,label; kNN and ridge on "
        "frozen features")
    add("--probe-interval", type=int, metavar="N", help="epochs between these (default: as --recon-interval)")
    add("--keep-best", choices=[*KEEP_BEST], help="keep the best encoder by this measure in encoder-best, too")
    add("--recon-interval", type=int, metavar="N", help="epochs between reconstructions (default: epochs / 10)")
    add("--log-interval", type=int, default=10, metavar="N", help="updates between readings of the loss")
    add("--log-wandb", action="store_true")
    add("--wandb-project", metavar="NAME")
    add("--log-tensorboard", action="store_true")
    add("--license", default="", metavar="ID", help="licence of the exported weights, e.g. mit")
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
        arguments += _words(action, key, value, path)
    return arguments


def _words(action: argparse.Action, key: str, value: Any, path: str) -> list[str]:
    """One setting of a config file as words of the command line."""
    options = action.option_strings
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"--config {path}: '{key}' takes true or false, got {value!r}.")
        return list(options[:1] if value else options[1:])
    if action.nargs == "?" and isinstance(value, bool):
        return list(options[:1] if value else [])
    if value is None:
        return []
    if isinstance(value, dict):
        value = [f"{k}={v}" for k, v in value.items()]
    return [options[-1], *map(str, value if isinstance(value, list) else [value])]


def parse_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, Start | None]:
    """Command line over config file over defaults, with what depends on several options resolved.

    Returns:
        The options; the timm folder that `--model` names, None for a variant's name.

    Raises:
        ValueError: An option that does not exist, or has a value that it does not take.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    given = {word.partition("=")[0] for word in argv}
    argv = (config_arguments(config, parser) if config else []) + argv
    args = parser.parse_args(argv)
    if not args.data_dir and not args.data_list and args.dataset in ("", "embedded"):
        parser.set_defaults(**EMBEDDED_DEFAULTS)
        args = parser.parse_args(argv)
    if args.weights:
        start = open_weights(args.weights, args.model, args.model_kwargs, args.license)
        parser.set_defaults(pretrained=True)
    else:
        start = open_start(args.model)
    if start:
        if not args.pretrained and not args.weights:
            raise ValueError(
                f"--model {args.model} without --pretrained would start from random weights: add --pretrained."
            )
        parser.set_defaults(**start.defaults(sized="--img-size" in argv))
        args = parser.parse_args(argv)
    _resolve_input_size(args, given)
    for name in AT_LEAST_ONE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if args.global_batch_size is not None:
        if args.global_batch_size < 1:
            raise ValueError(f"--global-batch-size must be at least 1, got {args.global_batch_size}.")
        if "--grad-accum-steps" in given:
            raise ValueError("--grad-accum-steps follows from --global-batch-size and the processes: leave it out.")
    if args.channel_dropout:
        try:
            random_channels(1, args.in_chans, args.channel_dropout)
        except ValueError as e:
            raise ValueError(f"--channel-dropout {args.channel_dropout:g}: {e}") from None
    _resolve_pixels(args, start, given)
    _resolve_normalization(args, start)
    _resolve_intervals(args)
    return args, start


def _resolve_input_size(args: argparse.Namespace, given: set[str]) -> None:
    """`input_size` and `in_chans` from --input-size, --in-chans and --img-size."""
    chans, *size = args.input_size or [args.in_chans, args.img_size, args.img_size]
    if "--input-size" not in given:  # then it is a config's, and the command line wins
        chans = args.in_chans if "--in-chans" in given else chans
        size = [args.img_size, args.img_size] if "--img-size" in given else size
    args.in_chans, args.input_size = chans, [chans, *size]


def _resolve_pixels(args: argparse.Namespace, start: Start | None, given: set[str]) -> None:
    """The record of how stored values become pixels: as given, or that of the model to start from."""
    check_percentiles(args.clip_percentiles)
    if "--clip-percentiles" in given:
        if given & {"--clip-low", "--clip-high"}:
            raise ValueError("--clip-percentiles measures the limits that --clip-low and --clip-high name: choose one.")
        args.clip_low = args.clip_high = None  # of a config
    names = ("nodata", "divide", "clip_low", "clip_high", "dicom_window", "pages")
    if start and args.clip_percentiles is None and all(getattr(args, name) is None for name in names):
        record = Pixels.from_record(training_of(start.config).get("pixels"))
        vars(args).update({name: getattr(record, name) for name in ("nodata", "divide")})
        for name in ("clip_low", "clip_high"):
            setattr(args, name, None if getattr(record, name) is None else list(getattr(record, name)))
        window = record.dicom_window
        args.dicom_window = None if window is None else [window] if isinstance(window, str) else list(window)
        args.pages = None if record.page is None else [record.page]
    pixels_of(args).check(args.in_chans)


def _resolve_normalization(args: argparse.Namespace, start: Start | None) -> None:
    """`mean` and `std`: as given, those of the model to start from, or the usual ones of 1 and 3 channels.

    What is to be measured becomes 'auto'.
    """
    if start and args.mean is None and args.std is None:
        vars(args).update(start.normalization(args.in_chans))
    if args.mean is None and args.std is None:
        rgb, usual = args.in_chans == 3, args.in_chans in (1, 3)
        args.mean = (list(IMAGENET_DEFAULT_MEAN) if rgb else [0.5]) if usual else [AUTO]
        args.std = (list(IMAGENET_DEFAULT_STD) if rgb else [0.25]) if usual else [AUTO]
    for name in ("mean", "std"):
        values = getattr(args, name) or []
        if AUTO in values:
            if len(values) > 1:
                raise ValueError(f"--{name} takes {AUTO} alone, or one number per channel; got {values}.")
            setattr(args, name, AUTO)
            continue
        count = len(values)
        if count != args.in_chans:
            raise ValueError(f"--{name} has {count} values for {args.in_chans} channels.")


def _resolve_intervals(args: argparse.Namespace) -> None:
    """Warmup, milestones and reconstructions from the number of epochs."""
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs / (12 if args.dataset == "embedded" else 20))
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g} must lie below --epochs {args.epochs}.")
    if not 0 <= args.max_bad_images <= 1:
        raise ValueError(f"--max-bad-images is a share between 0 and 1, got {args.max_bad_images}.")
    for name in ("recovery_interval", "checkpoint_minutes", "max_bad_steps"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 (none) or more, got {getattr(args, name)}.")
    args.milestone_interval = args.milestone_interval or max(1, args.epochs // 4)
    args.recon_interval = args.recon_interval or max(1, args.epochs // 10)
    args.probe_interval = args.probe_interval or args.recon_interval
    if args.keep_best and not (args.holdout if args.keep_best == "loss" else args.probe_dir):
        needed = "--holdout X" if args.keep_best == "loss" else "--probe-dir DIR"
        raise ValueError(f"--keep-best {args.keep_best} needs {needed}, which measures it.")
