"""Evaluation and prediction with timm's own validate.py and inference.py, whose images are read as in pretraining."""

import argparse
import sys
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from timm.data import resolve_data_config
from timm.models import parse_model_name
from torch import nn

from ..console import PROGRAM, CommandParser, refused, say
from ..data import ImageError, Pixels
from ..finetune import folders
from ..finetune.images import Images, feed, probe, refuse_for_tensors
from ..finetune.plan import channel_words, channels, check_input_mode, fit_channels
from ..finetune.preflight import Split, check_folder_weights, create_meta_model, open_split
from ..finetune.start import check_start_file, choose_pixels
from ..finetune.train_script import find_script, load_script, script_path
from ..runs.device import check_device

SHOWN = 5  # names in a message


def run_script(command: str, script_name: str, description: str, argv: list[str], *, labelled: bool) -> int:
    """Runs one of timm's scripts in this process; returns its exit status. What the script raises passes through.

    Args:
        command: Ours, for messages.
        script_name: 'validate.py' or 'inference.py'.
        description: Text of the help.
        argv: Our options and the script's.
        labelled: The images' classes are compared with the model's answers. Without, an image that cannot be decoded
            is an error: it would get the answer for the next one.
    """
    try:
        own, rest = _own_parser(command, description).parse_known_args(argv)
        script = load_script(find_script(script_name, own.timm_train), script_name)
        words = _prepare(script, _with_model(rest), labelled, own.nodata)
    except ValueError as e:
        return refused(command, e)
    before = sys.argv
    sys.argv = [str(script_path(script)), *words]
    try:
        script.main()
    except ImageError as e:  # from a worker with its traceback
        return refused(command, ValueError(str(e).strip().splitlines()[-1].rpartition("ImageError: ")[2]))
    finally:
        sys.argv = before
    return 0


def _prepare(script: ModuleType, words: list[str], labelled: bool, nodata: float | None) -> list[str]:
    """Checks options, model and images, and lets the script read them; returns the words for the script.

    Args:
        script: validate.py or inference.py.
        words: Its options.
        labelled: See `run_script`.
        nodata: Value of pixels without data; None for the model's own.

    Raises:
        ValueError: A user's mistake, in one message.
    """
    args = _resolve(script, words)
    check_device(args.device)
    check_input_mode(getattr(args, "input_img_mode", None))
    class_to_idx, pixels = None, Pixels(nodata)
    if not _names_several(args):
        model = create_meta_model(
            args.model, need_weights=not args.checkpoint, num_classes=args.num_classes, model_kwargs=args.model_kwargs
        )
        if not getattr(model, "num_classes", 0):
            raise ValueError(f"--model {args.model} has no classifier. Finetune it first, or see `embed`.")
        source, place = parse_model_name(args.model)
        if source == "local-dir" and not args.checkpoint:
            check_folder_weights(Path(place), model)
        words = words + _fit(args, model)
        if args.checkpoint:
            check_start_file("--checkpoint", args.checkpoint, model)
        pixels = choose_pixels(nodata, args.model, channels(args))
        class_to_idx = _check_images(args, model, labelled, pixels)
    feed(script, in_chans=channels(args), strict=not labelled, pixels=pixels, class_to_idx=class_to_idx)
    return words


def _fit(args: argparse.Namespace, model: nn.Module) -> list[str]:
    """Options on channels, image size, mean and std that follow from the model's config and were not given."""
    cfg: Any = model.pretrained_cfg
    given = {name for name in ("in_chans", "input_size", "mean", "std") if getattr(args, name)}
    if not given & {"in_chans", "input_size"}:
        args.in_chans = (cfg.get("input_size") or (3,))[0]  # the script would build 3 channels
    for line in fit_channels(args, model):
        say(line)
    return channel_words(args, given)


def _own_parser(command: str, description: str) -> CommandParser:
    parser = CommandParser(
        prog=f"{PROGRAM} {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--timm-train", metavar="PATH", help="a script of timm or the folder of a clone (else TIMM_TRAIN)"
    )
    parser.add_argument(
        "--nodata", type=float, metavar="V",
        help="stored value of pixels without data, which get the others' mean (default: the model's; nan: none)",
    )  # fmt: skip
    return parser


def _with_model(words: list[str]) -> list[str]:
    """The script's words, where the first may be the model: a name, or a folder."""
    words = list(words)
    if words and not words[0].startswith("-"):
        if any(word in ("-m", "--model") or word.startswith("--model=") for word in words):
            raise ValueError(f"'{words[0]}' and --model both name a model; the folder of the images is --data-dir.")
        name = words.pop(0)
        words = ["--model", f"local-dir:{name}" if Path(name).is_dir() else name, *words]
    return words


def _resolve(script: ModuleType, words: list[str]) -> argparse.Namespace:
    """The script's options, by its own parser."""
    parser = script.parser
    parser.error = MethodType(CommandParser.error, parser)  # one message, without the usage
    args = parser.parse_args(words)
    if args.model == parser.get_default("model"):
        raise ValueError("--model is needed: --model local-dir:FOLDER, the `model` folder of a finetuning, or a name.")
    args.data_dir = args.data or args.data_dir
    if not args.data_dir and not args.dataset:
        raise ValueError("--data-dir is needed: the folder of the images.")
    return args


def _names_several(args: argparse.Namespace) -> bool:
    """Whether validate.py will go through several models or checkpoints, which it finds itself."""
    pattern = args.model == "all" or any(c in args.model for c in "*?[") or Path(args.model).is_file()
    return pattern or Path(args.checkpoint or "?").is_dir()


def _label_names(cfg: dict[str, Any]) -> list[str] | None:
    """Names of the model's classes in the order of its outputs; None where its folder does not tell them."""
    names = cfg.get("label_names")
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _check_images(args: argparse.Namespace, model: nn.Module, labelled: bool, pixels: Pixels) -> dict[str, int] | None:
    """Says what the folder has, and compares its classes with the model's.

    Returns:
        The model's class by the name of a folder, where the model's folder tells it.
    """
    if folders.is_opaque(args.dataset) or not args.data_dir or Path(args.data_dir).is_file():
        return None
    cfg: Any = model.pretrained_cfg
    names, num_classes = _label_names(cfg), int(model.num_classes)  # type: ignore[arg-type]
    root = Path(args.data_dir)
    if not root.is_dir():
        raise ValueError(f"--data-dir {root} does not exist.")
    options = {"class_map": args.class_map, "input_key": getattr(args, "input_key", None)}
    class_to_idx = None
    if labelled:
        split = _open_labelled(root, args.split, options)
        if names and not args.class_map and not getattr(args, "valid_labels", ""):
            class_to_idx = _match(split, names)
        elif max(split.reader.class_to_idx.values()) >= num_classes:
            raise ValueError(f"{split.root} has {len(split.classes)} classes and --model {args.model} {num_classes}.")
        reader = split.reader
    else:
        reader = folders.FolderReader(folders.split_folder(root, args.split), **options)
    for line in folders.describe(reader):
        say(line)
    if class_to_idx is not None and len(reader.class_to_idx) < len(class_to_idx):
        say(f"{len(reader.class_to_idx)} of the model's {len(class_to_idx)} classes are there; matched by their names.")
    kinds = probe(Images(reader, channels(args), pixels=pixels))
    refuse_for_tensors(kinds, vars(args), resolve_data_config(vars(args), model=model)["crop_mode"])
    return class_to_idx


def _open_labelled(root: Path, split: str, options: dict[str, Any]) -> Split:
    """The split below a data folder, or the folder itself where it has a sub-folder a class."""
    folder = folders.split_folder(root, split)
    if folder.resolve() != root.resolve() or not any(p.is_dir() for p in root.iterdir()):
        return open_split(root, split, "--split", **options)
    reader = folders.FolderReader(root, **options)
    if "" in reader.class_to_idx:
        raise ValueError(f"{root} has images that lie in no sub-folder, so that their class is unknown.")
    return Split(split, root, reader)


def _match(split: Split, names: list[str]) -> dict[str, int]:
    """The model's class by name.

    Raises:
        ValueError: The folder has a class that the model does not know.
    """
    class_to_idx = {name: i for i, name in enumerate(names)}
    unknown = [name for name in split.classes if name not in class_to_idx]
    if unknown:
        raise ValueError(
            f"{split.root} has {len(unknown)} classes that the model does not know: {', '.join(unknown[:SHOWN])}"
            f"{', ...' * (len(unknown) > SHOWN)}. The model's: {', '.join(names[:SHOWN])}"
            f"{', ...' * (len(names) > SHOWN)}. Rename the folders, or give their order with --class-map FILE."
        )
    return class_to_idx
