"""Running train.py by a plan, and what follows: the export, and the commands that evaluate and publish the result."""

import contextlib
import json
import shlex
import tempfile
from pathlib import Path
from types import ModuleType

import yaml
from timm.utils.distributed import world_info_from_env

from ..checkpoint import export_finetuned
from ..checkpoint.finetuned import BEST, LABEL_NAMES
from ..checkpoint.provenance import read_object
from ..console import invocation, say
from ..data.labelled import SPLIT_FILE, write_split
from ..files import read_rows
from ..models.convnextv2 import ConvNeXtV2
from ..report.html import write_report
from ..report.kinds import verdict
from ..report.next_steps import near, publish_preview
from ..report.run import read_run
from .classes import describe_classes
from .folders import RowReader
from .images import Reading, feed
from .plan import Plan
from .scripts import find_script, run_script, script_path

# validate.py must get the same values of these as train.py did
EVALUATION_OPTIONS = ("dataset", "class_map", "input_img_mode", "input_key", "target_key", "device")


def run_plan(plan: Plan) -> None:
    """Runs train.py in this process, with our images; its errors pass through."""
    _keep_labels(plan)
    names = (plan.options.train_split, plan.options.val_split)
    feed(plan.script, Reading(plan.options.channels, plan.pixels), dict(zip(names, plan.splits, strict=False)))
    with tempfile.TemporaryDirectory() as folder:
        config = plan.recipe.path
        if yaml.safe_load(config.read_text(encoding="utf-8")) != plan.recipe.values:  # --from-scratch, --no-amp
            config = Path(folder) / config.name
            config.write_text(yaml.safe_dump(plan.recipe.values), encoding="utf-8")
        run_script(plan.script, ["--config", str(config), *plan.words])


def _keep_labels(plan: Plan) -> None:
    """Writes a split that was made here, and the names of the classes, into the run's folder.

    The data may be gone when the model is exported again.
    """
    if not plan.splits or world_info_from_env()[1] != 0:
        return
    reader, file = plan.splits[0], plan.folder / SPLIT_FILE
    plan.folder.mkdir(parents=True, exist_ok=True)
    if isinstance(reader, RowReader) and not (plan.options.resume and file.is_file()):
        write_split(file, *(split.rows for split in plan.splits if isinstance(split, RowReader)))
    if sorted(reader.class_to_idx.values()) == list(range(plan.options.num_classes)):  # a class map may leave gaps
        text = json.dumps(reader.classes, ensure_ascii=False, indent=0)
        (plan.folder / LABEL_NAMES).write_text(text + "\n", encoding="utf-8")


def export(plan: Plan) -> Path | None:
    """Exports the result of train.py to the folder `model` of the run; None for models that are not ConvNeXt V2."""
    if not any((plan.folder / name).is_file() for name in BEST):
        raise ValueError(f"train.py ended without a checkpoint in {plan.folder}; there is nothing to export.")
    if not isinstance(plan.model, ConvNeXtV2):
        return None
    try:
        return export_finetuned(plan.folder, plan.folder / "model", info={"Recipe": plan.recipe.name})
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"The run in {plan.folder} is complete, but its model could not be exported: {e}") from e


def epochs_done(folder: Path) -> int | None:
    """Finished epochs by the run's summary.csv; None if it has none."""
    try:
        return int(str(read_rows(folder / "summary.csv")[0][-1]["epoch"])) + 1
    except (OSError, IndexError):
        return None


def exported(plan: Plan, model: Path | None) -> str:
    """'the finetuned model is in run/model: the best epoch, 3 of 10, with 57.1 % top-1', as far as it is known."""
    if model is None:
        best = next(plan.folder / name for name in BEST if (plan.folder / name).is_file())
        return f"the weights are in {near(best)}; only ConvNeXt V2 is exported, and this is {plan.options.model}"
    return f"the finetuned model is in {near(model)}{_epoch(plan, model)}"


def _epoch(plan: Plan, model: Path) -> str:
    try:
        training = read_object(model / "config.json")["training"]
        epoch = training["table"]["Epochs"].partition(",")[0]
    except (ValueError, KeyError):
        return ""
    top1 = (training.get("metrics") or {}).get("top1")
    measured = "" if top1 is None else f", with {top1:.1f} % top-1 on the validation images"
    return f": the {'best' if (plan.folder / BEST[0]).is_file() else 'last'} epoch, {epoch}{measured}"


def describe(plan: Plan, model: Path | None) -> None:
    """Writes the report, with results per class of an exported model; a failure is a warning, because it is trained."""
    try:
        if model:
            describe_classes(plan, model, epochs_done(plan.folder) or 0)
        write_report([plan.folder], plan.folder / "report.html")
    except (OSError, ValueError, RuntimeError) as e:
        say(f"warning: results per class and the report could not be written: {e}", error=True)


def result(plan: Plan) -> list[str]:
    """Sentences on the accuracy of the run and on its files; fewer if it measured or wrote nothing."""
    lines = []
    with contextlib.suppress(ValueError):
        lines.append(verdict(read_run(plan.folder)).text)
    files = ("model/", "report.html", "summary.csv", SPLIT_FILE, LABEL_NAMES)
    if written := [name for name in files if (plan.folder / name).exists()]:
        lines.append(f"Written to {near(plan.folder)}: {', '.join(written)}")
    return lines


def _needs_path(script: ModuleType) -> bool:
    """Whether train.py is found by --timm-train alone."""
    with contextlib.suppress(ValueError):
        return find_script("train.py").resolve() != script_path(script).resolve()
    return True


def next_commands(plan: Plan, model: Path) -> list[str]:
    """Commands that evaluate the exported model and show what publishing would send."""
    options, commands = plan.options, []
    if options.val_split:
        words = [*invocation("validate"), "--model", f"local-dir:{near(model)}"]
        words += ["--timm-train", str(near(script_path(plan.script)))] if _needs_path(plan.script) else []
        words += ["--data-dir", options.data_folder] if options.data_folder else []
        words += ["--split", options.val_split] if options.val_split != "validation" else []
        for name in EVALUATION_OPTIONS:
            if getattr(options, name) != options.defaults[name]:
                words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        words += ["--amp", "--amp-dtype", options.amp_dtype] if options.amp else []
        commands.append(shlex.join(words))
    commands.append(publish_preview(plan.folder, model))
    return commands
