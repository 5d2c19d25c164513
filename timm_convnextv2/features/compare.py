"""Which weights to start from: finetuning from several candidates, each at its own learning rate, once per seed."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from ..checkpoint.loading import shared_inputs
from ..config import read_json
from ..console import PACKAGE, closest, duration, ended_by_signals
from ..data.formats.files import printable
from ..data.labelled import Row
from ..files import claim_folder, read_rows, write_csv, write_json
from .budgets import budget_sizes, nested_subsets
from .config import CompareConfig
from .linear import HELD_OUT
from .verdict import OWN, SCRATCH, Curve, draw, last_of, pretraining_cost, verdict

SPLIT_SEED = 0  # of data without a split: more --seeds keep it
MADE_WITH = "compare.json"  # in the folder of a finished finetuning
VALIDATIONS = 12  # per finetuning at most: with few labels they would take longer than the training


class Candidate(NamedTuple):
    """A name in the table, the weights to finetune, and a recipe that suits them.

    `options` are more words of `finetune`; `rates` are the values of --lr-base to choose from, `values` are the options
    that the recipe sets.
    """

    name: str
    model: str
    options: tuple[str, ...]
    recipe: str
    rates: tuple[float, ...]
    values: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """The recipe's --batch-size, or that of train.py."""
        return self.values.get("batch_size", 128)

    @property
    def start(self) -> list[str]:
        """The words of `finetune` for these weights."""
        return ["--model", self.model, *self.options, "--recipe", self.recipe]


class Cell(NamedTuple):
    """A finetuning to run: on `data`, a folder with train/ and validation/."""

    candidate: Candidate
    images: int
    epochs: int
    seed: int
    rate: float
    data: Path
    digest: str  # of the names of its images
    folder: Path
    tunes: bool  # chooses the learning rate; the others are given the chosen one


class Part(NamedTuple):
    """Folders with train/ and validation/ that link to some of the images: to tune on, and to train on."""

    tune: Path
    train: Path
    digest: str  # of the names of the images


def check_options(config: CompareConfig, rest: Sequence[str]) -> None:
    """Refuses contradictory options, and an output folder that is in use, before anything starts."""
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds takes different numbers, got '{' '.join(map(str, config.seeds))}'.")
    if len(set(config.lr_grid)) < max(2, len(config.lr_grid)):
        raise ValueError(
            f"--lr-grid takes two or more different numbers, got '{' '.join(f'{x:g}' for x in config.lr_grid)}': "
            "candidates with one learning rate are not compared fairly."
        )
    if fixed := [word for word in rest if word.partition("=")[0] in ("--lr", "--lr-base")]:
        raise ValueError(f"{fixed[0]} is tuned for each candidate: give --lr-grid, multiples of the recipe's rate.")
    if not (config.encoder or config.unlabelled):
        raise ValueError("Nothing to compare. Give --encoder MODEL, or --unlabelled DIR to pretrain one first.")
    if config.encoder and (config.unlabelled or config.pretrain):
        raise ValueError("--encoder is pretrained already: leave out --unlabelled and --pretrain, or --encoder.")
    claim_folder(config.output, overwrite=config.resume, flag="--resume")


def pretrain_options(config: CompareConfig) -> list[str]:
    """The words of the pretraining."""
    words = ["--data-dir", str(config.unlabelled), *shlex.split(config.pretrain)]
    return [*words, "--output", config.output, "--experiment", "pretrain", "--resume", "auto"]


def candidates_of(encoder: str, config: CompareConfig, values_of: Callable[[str], Any]) -> list[Candidate]:
    """Random weights, the user's encoder and those of --also, which must differ and get the encoder's inputs.

    `values_of` has the options that a recipe sets. Random weights get --scratch-recipe, the others --recipe.
    """

    def candidate(name: str, model: str, random: bool, *options: str) -> Candidate:
        recipe = config.scratch_recipe if random else config.recipe
        values = values_of(recipe)
        if "lr_base" not in values:
            raise ValueError(f"--recipe {recipe} sets no lr_base, which --lr-grid multiplies.")
        rates = tuple(x * values["lr_base"] for x in config.lr_grid)
        return Candidate(name, model, options, recipe, rates, values)

    found = [candidate(SCRATCH, encoder, True, "--from-scratch"), candidate(OWN, encoder, False)]
    for name in config.also:
        random = ":" not in name and "." not in name
        options = "--from-scratch" if random else "--pretrained", *shared_inputs(encoder, name, random)
        found.append(candidate(name, name, random, *options))
    for i, one in enumerate(found):
        if one.name in [other.name for other in found[:i]]:
            raise ValueError(f"--also names {one.name} twice.")
        tagged = "." in one.model
        if ":" not in one.model and not (timm.models.is_model_pretrained if tagged else timm.is_model)(one.model):
            near = closest(one.model, timm.list_models(pretrained=tagged))
            option = "--also" if one.name == one.model else "--encoder"
            raise ValueError(f"{option} {one.model}: timm has no model of this name.{near}")
    return found


def part_folders(
    rows: Sequence[Row], budgets: Sequence[float], validation: Sequence[Row], folder: Path
) -> dict[int, Part]:  # fmt: skip
    """Folders of links to the training images `rows`, by number of images; links that are there are kept.

    The validation/ to tune on is a fifth of the training images of each class; the other one has `validation`. Refuses
    budgets with less than two images of a class, and labels that cannot be the name of a folder.
    """
    for row in (*rows, *validation):
        label, *more = row.labels
        if more:
            raise ValueError(f"'{printable(row.path)}' has several labels; finetuning takes one class per image.")
        if os.sep in label or label in (".", ".."):
            raise ValueError(f"The label '{printable(label)}' cannot be the name of a folder: rename it.")
    names = sorted({row.labels[0] for row in rows})
    labels = torch.tensor([names.index(row.labels[0]) for row in rows])
    subsets = nested_subsets(labels, budget_sizes(budgets, labels))
    for size, chosen in subsets.items():
        if labels[chosen].bincount().min() < 2:
            few = names[int(labels[chosen].bincount().argmin())]
            raise ValueError(
                f"--label-budgets {size} of {len(rows)} images leaves one image of {few}; expected two or more per "
                "class, one of them to choose the learning rate with."
            )
    found: dict[int, Part] = {}
    for index, row in enumerate(validation):
        _link(row, index, folder / "validation")
    for size, chosen in subsets.items():
        own = labels[chosen]
        held = {*nested_subsets(own, [max(len(names), round(HELD_OUT * size))], seed=1).popitem()[1].tolist()}
        tune, train = folder / f"{size}-tune", folder / str(size)
        sha = hashlib.sha256()
        for i, index in enumerate(chosen.tolist()):
            _link(rows[index], index, tune / ("validation" if i in held else "train"))
            _link(rows[index], index, train / "train")
            sha.update(os.path.realpath(rows[index].path).encode(errors="surrogateescape") + b"\0")
        if not os.path.lexists(train / "validation"):
            (train / "validation").symlink_to((folder / "validation").resolve(), target_is_directory=True)
        found[size] = Part(tune, train, sha.hexdigest())
    return found


def _link(row: Row, index: int, folder: Path) -> None:
    place = folder / row.labels[0] / f"{index:07d}{Path(row.path).suffix}"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(place):  # a copy of the folder may hold the images themselves
        place.symlink_to(os.path.realpath(row.path))


def epochs_of(epochs: int, images: int, total: int) -> int:
    """Epochs for fewer images: in proportion to the square root, so that they get more epochs and fewer updates."""
    return round(epochs * math.sqrt(total / images))


def cells_of(
    candidates: Sequence[Candidate], config: CompareConfig, total: int, parts: Mapping[int, Part]
) -> tuple[list[Cell], list[Cell]]:
    """The finetunings that choose learning rates, and the final ones, without a rate yet (NaN); see `part_folders`."""
    output, tuning, final = Path(config.output), [], []
    for images, (tune, train, digest) in parts.items():
        epochs = epochs_of(config.epochs, images, total)
        for number, candidate in enumerate(candidates):
            for rate in candidate.rates:
                folder = output / f"tune-{number}-{images}-images-{rate:g}"
                tuning.append(Cell(candidate, images, epochs, config.seeds[0], rate, tune, digest, folder, True))
            for seed in config.seeds:
                folder = output / f"finetune-{number}-{images}-images-seed-{seed}"
                final.append(Cell(candidate, images, epochs, seed, math.nan, train, digest, folder, False))
    return tuning, sorted(final, key=lambda cell: (cell.images, config.seeds.index(cell.seed)))


def wider(cell: Cell, tried: Mapping[float, float]) -> Cell | None:
    """One step of the grid further, if the best learning rate is the smallest or largest; `tried`: accuracy by rate."""
    best, rates = _best(tried), sorted(tried)
    if best not in (rates[0], rates[-1]):
        return None
    rate = best * best / (rates[1] if best == rates[0] else rates[-2])
    folder = cell.folder.with_name(cell.folder.name.removesuffix(f"{cell.rate:g}") + f"{rate:g}")
    return cell._replace(rate=rate, folder=folder)


def _best(tried: Mapping[float, float]) -> float:
    return max(tried, key=lambda rate: tried[rate])


def words_of_cell(cell: Cell, more: Sequence[str]) -> list[str]:
    """The words of `finetune`, but for those that name folders of this comparison."""
    warmup = cell.epochs // 10
    # with --warmup-prefix, train.py adds the warmup to --epochs
    length = ["--epochs", str(cell.epochs - warmup), "--warmup-epochs", str(warmup), "--warmup-prefix"]
    # the last epoch is always validated, and nothing else counts in tuning
    interval = cell.epochs if cell.tunes else math.ceil(cell.epochs / VALIDATIONS)
    words = [*cell.candidate.start, *length, "--val-interval", str(interval), *more, "--seed", str(cell.seed)]
    most = int((1 - HELD_OUT) * cell.images)
    if most < cell.candidate.batch and not batch_given(more):  # train.py drops a batch that is not full
        words += ["--batch-size", str(2 ** int(math.log2(most)))]
    return words if math.isnan(cell.rate) else [*words, "--lr-base", f"{cell.rate:g}"]


def batch_given(words: Sequence[str]) -> str:
    """The value of -b or --batch-size in words of `finetune`; '' if there is none."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name in ("-b", "--batch-size"):
            found = value if equals else following
    return found


def updates_of(cell: Cell, more: Sequence[str]) -> int:
    """About how many updates a finetuning has: train.py drops the last batch of an epoch if it is not full."""
    images = round((1 - HELD_OUT) * cell.images) if cell.tunes else cell.images
    return cell.epochs * max(1, images // int(batch_given(words_of_cell(cell, more)) or cell.candidate.batch))


def plan_text(tuning: Sequence[Cell], final: Sequence[Cell], more: Sequence[str]) -> str:
    """How many finetunings, of what, and their updates."""
    names = ", ".join(dict.fromkeys(cell.candidate.name for cell in final))
    sizes = ", ".join(map(str, dict.fromkeys(cell.images for cell in final)))
    updates = sum(updates_of(cell, more) for cell in (*tuning, *final))
    return (
        f"{len(tuning)} finetunings to choose learning rates and {len(final)} to compare, about {updates:,} updates in "
        f"all (more while the best rate is the smallest or largest): {names}; with {sizes} images"
    )


def compare(
    tuning: Sequence[Cell], final: Sequence[Cell], more: Sequence[str], *, resume: bool = False,
    note: Callable[[str], None] = print,
) -> Iterator[Curve]:  # fmt: skip
    """Chooses the learning rate of each candidate and number of images by `tuning`, then runs `final`; yields curves.

    Rates are tried until the best one has a worse one, or an equal one, on either side. `more` are words of `finetune`
    for all. `resume` keeps finished runs, which must have the same options, recipe and weights, and starts the others
    again. A failure is a `CalledProcessError`, see `call`.
    """
    weights = {cell.candidate.model: _digest(cell.candidate.model) for cell in final}
    before: dict[Path, dict[str, Any] | None] = {}
    updates: dict[Path, int] = {}  # of the finetunings to go
    tried: dict[tuple[str, int], dict[float, float]] = {}
    spent, done = 0.0, 0

    def plan(cell: Cell) -> None:
        before[cell.folder] = _finished(cell.folder) if resume else None
        if before[cell.folder] is None:
            updates[cell.folder] = updates_of(cell, more)

    def made_with(cell: Cell) -> dict[str, Any]:
        recipe = hashlib.sha256(json.dumps(cell.candidate.values, sort_keys=True).encode()).hexdigest()
        return {"options": words_of_cell(cell, more), "epochs": cell.epochs, "images": cell.digest} | {
            "weights": weights[cell.candidate.model], "recipe": recipe
        }  # fmt: skip

    queue = deque((*tuning, *final))
    for cell in queue:
        plan(cell)
    for cell in tuning:  # differences are told before anything is run
        _refuse_other(cell.folder, before[cell.folder], made_with(cell))
    while queue:
        cell = queue.popleft()
        key = cell.candidate.name, cell.images
        if not cell.tunes:
            cell = cell._replace(rate=_best(tried[key]))
        _refuse_other(cell.folder, before[cell.folder], made_with(cell))
        seconds = 0.0
        if before[cell.folder] is None:
            seconds = _finetune(cell, made_with(cell))
            spent, done = spent + seconds, done + updates.pop(cell.folder)
        accuracy = accuracies(cell.folder)
        last = accuracy[cell.epochs]
        took = f"{seconds:.0f} s" if seconds else "finished before"
        to_go = spent * sum(updates.values()) / max(1, done)
        rest = f"; {len(updates)} to go, about {duration(to_go)}" if updates and done else ""
        what = f"learning rate {cell.rate:g}" if cell.tunes else f"seed {cell.seed}"
        note(f"{cell.images} images, {cell.candidate.name}, {what}: {last:.1f} % ({took}{rest})")
        if not cell.tunes:
            yield Curve(cell.candidate.name, cell.images, cell.seed, accuracy, cell.rate, tried[key], seconds)
            continue
        tried.setdefault(key, {})[cell.rate] = last
        if len(tried[key]) >= len(cell.candidate.rates) and (another := wider(cell, tried[key])):
            plan(another)
            queue.appendleft(another)


def _refuse_other(run: Path, before: dict[str, Any] | None, made_with: dict[str, Any]) -> None:
    """Refuses a finished run that was made with other options or weights."""
    if differing := [key for key in made_with if before and before.get(key) != made_with[key]]:
        changed = "; ".join(f"{key} {_shown(before, key)}, now {_shown(made_with, key)}" for key in differing)
        remedy = "Resume with the same options, or choose another --output"
        raise ValueError(f"'{run}' was finetuned with {changed}. {remedy}.")


def _finetune(cell: Cell, made_with: dict[str, Any]) -> float:
    run = cell.folder
    shutil.rmtree(run, ignore_errors=True)  # of a finetuning that was stopped
    place, log = (
        ["--data-dir", str(cell.data), "--output", str(run.parent), "--experiment", run.name],
        run.with_name(f"{run.name}.log"),
    )
    start = time.perf_counter()
    try:
        seconds = call("finetune", [*made_with["options"], *place], log)
    except subprocess.CalledProcessError:
        if cell.epochs not in accuracies(run):
            raise
        seconds = time.perf_counter() - start  # weights that diverged are not exported; their accuracy counts
    if cell.epochs not in accuracies(run):  # train.py ends quietly on Ctrl-C
        raise subprocess.CalledProcessError(1, ["finetune", str(log)])
    write_json(run / MADE_WITH, made_with, indent=1)
    return seconds


def _digest(model: str) -> str:
    """A checksum of the files of a local model; '' for other names, which stand for their weights."""
    folder, sha = Path(model.removeprefix("local-dir:")), hashlib.sha256()
    if not model.startswith("local-dir:"):
        return ""
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".pth")):
        sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()


def _finished(run: Path) -> dict[str, Any] | None:
    """What a finished finetuning was made with; None if it did not finish."""
    try:
        return read_json(run / MADE_WITH)
    except (OSError, ValueError):
        return None


def _shown(made_with: dict[str, Any] | None, key: str) -> str:
    value = (made_with or {}).get(key)
    return shlex.join(value) if isinstance(value, list) else str(value)[:12]


def call(command: str, words: Sequence[str], log: Path) -> float:
    """Runs a command of this package as a child process, which ends with this one; returns its duration in seconds.

    A failure is a `CalledProcessError`; the last word of its `cmd` is the log.
    """

    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file, ended_by_signals():
        line = [sys.executable, "-m", PACKAGE, command, *words]
        child = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()  # pretraining then saves its state
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(120)
                child.kill()
    if code:
        raise subprocess.CalledProcessError(code, [f"{command} {shlex.join(words)}", str(log)])
    return time.perf_counter() - start


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def accuracies(run: Path) -> dict[int, float]:
    """Validation accuracy in % by the number of epochs before it, from train.py's summary.csv."""
    rows = read_rows(run / "summary.csv")[0]
    return {int(str(row["epoch"])) + 1: float(str(row["eval_top1"])) for row in rows if row.get("eval_top1")}


def write_results(
    curves: Sequence[Curve], candidates: Sequence[Candidate], config: CompareConfig, output: Path
) -> None:
    """Writes the curves so far: compare.csv, compare.json and compare.png."""
    rows = ((c.name, c.images, c.seed, *point) for c in curves for point in c.accuracy.items())
    write_csv(output / "compare.csv", ("candidate", "images", "seed", "epoch", "top1"), rows)
    last = last_of(curves)
    found: dict[str, Any] = {
        "epochs": config.epochs, "data_dir": config.data_dir, "lr_grid": list(config.lr_grid),
        "candidates": {c.name: {"model": c.model, "recipe": c.recipe} for c in candidates}, "top1": last,
        "lr_base": {f"{c.name}, {c.images} images": c.rate for c in curves},
        "tuning": {f"{c.name}, {c.images} images": {f"{x:g}": y for x, y in sorted(c.tried.items())} for c in curves},
        "verdict": verdict(last),
        "pretraining": pretraining_cost(candidates[1].model),
        "seconds": {f"{c.name}, {c.images} images, seed {c.seed}": round(c.seconds, 1) for c in curves},
    }  # fmt: skip
    write_json(output / "compare.json", found, indent=2)
    draw(curves, output / "compare.png")
