"""Validation and prediction: model and images are checked, then timm's validate.py or inference.py reads them."""

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ..checkpoint.loading import model_name
from ..console import count
from ..data import Pixels
from ..data.formats.files import TRAIN_FOLDERS
from ..data.labelled import SPLIT_FILE, kept_rows, read_labelled
from .folders import FolderReader, Open, RowReader, describe, is_folder, is_table, open_split, shown, split_folder
from .images import Images, Kept, Reading, feed, probe, refuse_for_tensors
from .model import check_weights_file, choose_pixels, create_fitted_model
from .options import ScriptOptions, check_input_mode, for_this_machine, resolve_options

RESULTS = "predictions"  # the file of inference.py, without its ending


def prepare_evaluation(
    script: ModuleType, words: list[str], *, kept: Kept | None, nodata: float | None
) -> tuple[list[str], list[str]]:
    """Checks options, model and images, and lets the script read the images.

    The first of the script's `words` may be the model instead. Without `kept` images are labelled: the folder's classes
    are compared with the model's. Returns the command line of the script, and notes for the user.
    """
    words = _with_model(words)
    options = resolved = resolve_options(script, words)
    if options.model == options.defaults["model"]:
        raise ValueError("--model is needed: --model local-dir:FOLDER, the `model` folder of a finetuning, or a name.")
    options = options.evolve(model=model_name(options.model))
    if not options.data_folder and not options.dataset:
        raise ValueError("--data-dir is needed: the folder of the images.")
    if kept is not None:
        options = _with_results(options)
    options, device = for_this_machine(options)
    check_input_mode(options)
    reader, pixels, notes = None, Pixels(nodata), []
    if not _names_several(options):
        loads = not options.checkpoint
        options, model, notes = create_fitted_model(options, need_weights=loads, check_weights=loads)
        if not getattr(model, "num_classes", 0):
            raise ValueError(f"--model {options.model} has no classifier. Finetune it first, or see `embed`.")
        if options.checkpoint:
            check_weights_file("--checkpoint", options.checkpoint, model)
        pixels, read = choose_pixels(nodata, options.model, options.channels)
        reader, listed = _check_images(options, model, kept is None, pixels)
        notes += [*read, *listed]
    feed(script, Reading(options.channels, pixels, kept), {options.split: reader} if reader is not None else None)
    return [*words, *options.words_since(resolved)], [*device, *notes]


def _with_model(words: list[str]) -> list[str]:
    """The words, with --model before the first if that is a name or a folder."""
    if not words or words[0].startswith("-"):
        return words
    name, *rest = words
    if any(word in ("-m", "--model") or word.startswith("--model=") for word in rest):
        raise ValueError(f"'{name}' and --model both name a model; the folder of the images is --data-dir.")
    return ["--model", name, *rest]


def _with_results(options: ScriptOptions) -> ScriptOptions:
    """Lets inference.py write a file that can be named, and print no results to the console.

    Its own name for the file has that of the model, whose folder need not exist below the results.
    """
    wanted = {"results_file": RESULTS, "no_console_results": True}
    unset = [name for name in wanted if options.values.get(name, "") in (None, False)]  # validate.py has neither
    return options.evolve(**{name: wanted[name] for name in unset})


def results_files(script: ModuleType, words: list[str]) -> list[Path]:
    """The files that inference.py wrote with this command line."""
    options, endings = resolve_options(script, words), getattr(script, "_FMT_EXT", {})
    path = Path(options.values.get("results_dir") or "") / (options.values.get("results_file") or RESULTS)
    stem = path.with_suffix("") if path.suffix in endings.values() else path
    kinds = options.values.get("results_format") or ()
    names = dict.fromkeys(stem.with_name(stem.name + endings.get(kind, ".csv")) for kind in kinds)
    return [file for file in names if file.is_file()]


def _names_several(options: ScriptOptions) -> bool:
    """Whether validate.py will evaluate several models or checkpoints, which it finds itself."""
    pattern = options.model == "all" or any(c in options.model for c in "*?[") or Path(options.model).is_file()
    return pattern or Path(options.checkpoint or "?").is_dir()


def _check_images(
    options: ScriptOptions, model: nn.Module, labelled: bool, pixels: Pixels
) -> tuple[FolderReader | None, list[str]]:
    """The images, numbered as the model's classes if its config has their names; and notes on them."""
    folder = options.data_folder
    if not folder or not is_folder(options.dataset, folder) and not (labelled and is_table(folder)):
        return None, []
    root = Path(folder)
    if not root.exists():
        raise ValueError(f"--data-dir {root} does not exist.")
    open_folder = partial(FolderReader, class_map=options.class_map, input_key=getattr(options, "input_key", None))
    class_to_idx, notes = None, []
    if labelled:
        reader, notes = _open_labelled(options, root, open_folder)
        cfg: Any = model.pretrained_cfg
        names, num_classes = cfg.get("label_names"), int(model.num_classes)  # type: ignore[arg-type]
        if isinstance(names, list | tuple) and not options.class_map and not getattr(options, "valid_labels", ""):
            class_to_idx = {str(name): i for i, name in enumerate(names)}
            if unknown := [name for name in reader.classes if name not in class_to_idx]:
                raise ValueError(
                    f"{reader.root} has {count(len(unknown), 'class')} that the model does not have: {shown(unknown)}. "
                    f"The model's: {shown([*class_to_idx])}. Rename the folders, or give their order with --class-map "
                    "FILE."
                )
            reader = reader.renumbered(class_to_idx)
        elif max(reader.class_to_idx.values()) >= num_classes:
            found = f"{reader.root} has {count(len(reader.classes), 'class')}"
            raise ValueError(f"{found} and --model {options.model} {num_classes}.")
    else:
        reader = open_folder(split_folder(root, options.split))
    notes += describe(reader, labelled)
    present = sum(map(bool, reader.counts().values()))
    if class_to_idx is not None and present < len(class_to_idx):
        notes.append(f"{present} of the model's {len(class_to_idx)} classes are present; matched by name.")
    values = dict(options.values)
    kinds = probe(Images(reader, Reading(options.channels, pixels)))
    refuse_for_tensors(kinds, values, resolve_data_config(values, model=model)["crop_mode"])
    return reader, notes


def _open_labelled(options: ScriptOptions, root: Path, open_folder: Open) -> tuple[FolderReader, list[str]]:
    """The images of --split; of a folder or CSV without splits, those that the run of the model did not train on."""
    rows, source = [], root
    if is_table(root):
        rows = read_labelled(root)[0]
        reader = RowReader(str(root), rows, options.class_map)
    else:
        reader = open_split(root, options.split, "--split", open_folder, root_too=True)
        if Path(reader.root) != root:
            return reader, []
    weights = Path(options.checkpoint or options.model.removeprefix("local-dir:")).parent / SPLIT_FILE
    if not any(row.part for row in rows) and weights.is_file():
        rows, source = kept_rows(weights, [path for path, _ in reader.samples]), weights
        if not rows:
            return reader, [f"None of the {len(reader)} images is in {source}: all are measured."]
    if not any(row.part for row in rows):
        return reader, []
    train = options.split.partition("[")[0] in TRAIN_FOLDERS
    chosen = [row for row in rows if (row.part in TRAIN_FOLDERS) == train]
    if not chosen:
        raise ValueError(f"{source} has no images of --split {options.split} in {root}.")
    note = f"Measured: {count(len(chosen), 'training image' if train else 'validation image')} of {source}"
    left = len(reader) - len(chosen)
    note += f"; {count(left, 'other image')} of {root} left out."
    return RowReader(str(root), chosen, options.class_map), [note]
