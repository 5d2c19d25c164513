"""Reads the folder of a run for its report; corrupt files are left out and noted."""

import json
import math
import pickle
import re
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ..config import parse_yaml, read_json
from ..files import read_rows
from .classes import FILE as CLASSES
from .classes import ClassResults, read_classes

Row = dict[str, float]
_TEXT_COLUMNS = ("block",)  # of collapse.csv: the module's name

_Kinds = dict[str, type | tuple[type, ...]]
# The settings that a report needs, by task; runs of pretraining name no task.
# `mask_ratio` and `aa` (a policy of augmentation) distinguish runs of pretraining and of timm's train.py.
_PRETRAINING: _Kinds = {
    "model": str, "epochs": int, "mask_ratio": (int, float), "batch_size": int, "grad_accum_steps": int,
    "decoder_depth": int, "decoder_dim": int, "patch_size": int, "input_size": list, "seed": int,
    "data_dir": (str, list, type(None)), "dataset": (str, type(None)), "license": (str, type(None)), "pretrained": bool,
}  # fmt: skip
_TRANSFER: _Kinds = {
    "model": str, "data_dir": str, "classes": list, "num_images": int, "num_validation": int, "batch_size": int,
    "grad_accum_steps": int, "world_size": int, "total_updates": int, "img_size": int, "in_chans": int, "seed": int,
    "from_scratch": bool, "lr": (int, float),
}  # fmt: skip
_FINETUNING: _Kinds = {"model": str, "epochs": int, "batch_size": int, "opt": str, "aa": (str, type(None))}
_SETTINGS = {"pretraining": _PRETRAINING, "detection": _TRANSFER, "segmentation": _TRANSFER, "finetuning": _FINETUNING}


@dataclass
class RunRecord:
    """The content of a run's folder; missing files leave their attribute empty."""

    path: Path  # the folder
    label: str  # its name beside other runs
    settings: dict[str, Any]  # content of args.yaml
    task: str = "pretraining"  # a key of `kinds.KINDS`
    versions: str = ""  # versions of the packages that trained
    command: str = ""  # the command that started the run
    warnings: list[str] = field(default_factory=list)  # that the run began with
    # summary.csv by epoch, from 0, without empty cells
    rows: dict[int, Row] = field(default_factory=dict)
    # collapse.csv by epoch, from 1: rows of numbers, in order of depth
    collapse: dict[int, list[Row]] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)  # content of probe.json
    # PNG by epoch, from 1: reconstructions, or predictions beside the ground truth
    predictions: dict[int, Path] = field(default_factory=dict)
    neighbours: dict[int, Path] = field(default_factory=dict)  # PNG of nearest neighbours by epoch
    progress: dict[str, Any] = field(default_factory=dict)  # progress in the last checkpoint
    classes: ClassResults | None = None  # content of classes.json
    notes: list[str] = field(default_factory=list)  # files and lines that were left out, with the reason

    def column(self, name: str) -> dict[int, float]:
        """A column of summary.csv by epoch, from 1, without epochs that did not measure it."""
        return {epoch + 1: row[name] for epoch, row in self.rows.items() if name in row}


def read_run(folder: Path, label: str = "") -> RunRecord:
    """Reads the folder of a run; `label` defaults to the folder's name. Corrupt files become `notes`.

    Raises:
        ValueError: It is not the folder of a run, or its args.yaml is corrupt.
    """
    head, settings, task = _read_settings(folder)
    run = RunRecord(folder, label or folder.resolve().name, settings, task)
    for line in head:
        if line.startswith("command: "):
            run.command = _decoded(line.removeprefix("command: "))
        elif line.startswith("warning: "):
            run.warnings.append(line.removeprefix("warning: "))
        else:
            run.versions = run.versions or line
    run.rows = {int(row["epoch"]): row for row in _read_table(run, "summary.csv")}
    if run.task != "pretraining":
        # COCO's evaluators return -1 for empty categories, such as large objects in a data set without any
        run.rows = {epoch: {k: v for k, v in row.items() if v >= 0} for epoch, row in run.rows.items()}
        run.predictions = _epochs_of(folder / "predictions")
        try:
            run.classes = read_classes(folder)
        except (OSError, ValueError) as e:
            run.notes.append(f"{CLASSES} cannot be read ({e}).")
        return run
    for row in _read_table(run, "collapse.csv", needed=("depth", "distance")):
        run.collapse.setdefault(int(row["epoch"]), []).append(row)
    for rows in run.collapse.values():
        rows.sort(key=lambda row: row["depth"])
    run.probe = _read_probe(run)
    run.progress = _read_progress(run)
    run.predictions = _epochs_of(folder / "reconstructions")
    run.neighbours = _epochs_of(folder / "neighbours")
    return run


def _read_settings(folder: Path) -> tuple[list[str], dict[str, Any], str]:
    """The lines of the head comment, the settings and the task."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"'{folder}' {found}, expected the folder of a run, such as output/NAME.")
    path = folder / "args.yaml"
    if not path.is_file():
        below = sorted(p.parent.name for p in folder.glob("*/args.yaml"))[:5]
        hint = f" Runs below it: {', '.join(below)}." if below else ""
        raise ValueError(f"'{folder}' is not the folder of a run: it has no args.yaml.{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        settings = parse_yaml(text)
    except (OSError, ValueError) as e:
        raise ValueError(f"'{path}' cannot be read: {e}") from e
    values = settings if isinstance(settings, dict) else {}
    task = values.get("task", "finetuning" if "aa" in values and "mask_ratio" not in values else "pretraining")
    needed = _SETTINGS.get(task, _PRETRAINING) if isinstance(task, str) else _PRETRAINING
    wrong = [name for name, kind in needed.items() if name not in values or not isinstance(values[name], kind)]
    if "input_size" in needed and "input_size" not in wrong and [*map(type, values["input_size"])] != [int] * 3:
        wrong.append("input_size")
    if wrong or task not in _SETTINGS:
        raise ValueError(
            f"'{path}' does not hold the settings of a run of {task}: {', '.join(wrong[:3])} missing or of another "
            "type. Give the folder that `pretrain`, `finetune`, `detect train` or `segment train` wrote."
        )
    head = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    return head, settings, task


def _decoded(text: str) -> str:
    """The command that `head_comment` quoted; '' if the line was edited."""
    try:
        command = json.loads(text)
    except ValueError:
        return ""
    return command if isinstance(command, str) else ""


def _read_table(run: RunRecord, name: str, needed: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a CSV as finite numbers; torn lines are noted, rows without the needed columns are dropped."""
    path = run.path / name
    try:
        rows, damaged = read_rows(path)
    except OSError as e:
        run.notes.append(f"{name} cannot be read ({e.strerror}).")
        return []
    found = []
    for row in rows:
        try:
            numbers = {k: float(str(cell)) for k, cell in row.items() if cell != "" and k not in _TEXT_COLUMNS}
        except ValueError:
            damaged.append(",".join(map(str, row.values())))
            continue
        # a loss that is not finite is a gap in the curve
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
        if all(key in numbers for key in needed):
            found.append(numbers)
    if damaged:
        count = "1 corrupt line is" if len(damaged) == 1 else f"{len(damaged)} corrupt lines are"
        run.notes.append(f"{name}: {count} left out, the first: '{damaged[0][:60]}'.")
    return found


def _read_probe(run: RunRecord) -> dict[str, Any]:
    path = run.path / "probe.json"
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        run.notes.append(f"probe.json cannot be read ({e}).")
        return {}
    baselines = content.get("baselines", {}) if isinstance(content, dict) else None
    whole = isinstance(baselines, dict) and all(isinstance(of, dict) for of in baselines.values())
    if not isinstance(baselines, dict) or not whole or not isinstance(content.get("classes", []), list):
        run.notes.append("probe.json does not hold a probe and is left out.")
        return {}
    content["baselines"] = {
        name: {k: float(v) for k, v in of.items() if isinstance(v, int | float) and abs(v) <= sys.float_info.max}
        for name, of in baselines.items()
    }
    try:
        latest = content.pop("latest")
        against = {base: {key: str(gain) for key, gain in of.items()} for base, of in latest["against"].items()}
        content["latest"] = {"epoch": latest["epoch"], "against": against}
    except (AttributeError, KeyError, TypeError):  # no comparison: none is shown
        pass
    return content


def _read_progress(run: RunRecord) -> dict[str, Any]:
    """The progress in the last checkpoint; `mmap` avoids reading its tensors."""
    path = run.path / "last.pth.tar"
    if not path.exists():
        return {}
    try:
        progress = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["progress"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as e:
        run.notes.append(f"last.pth.tar cannot be read ({type(e).__name__}): bad images and updates are unknown.")
        return {}
    return progress if isinstance(progress, dict) else {}


def _epochs_of(folder: Path) -> dict[int, Path]:
    """The images of a folder by epoch, in order."""
    found = {re.fullmatch(r"epoch-(\d+)\.png", path.name): path for path in folder.glob("epoch-*.png")}
    return dict(sorted((int(match[1]), path) for match, path in found.items() if match))
