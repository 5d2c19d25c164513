"""Which weights to start from: the same finetuning from several candidates, once per seed."""

import contextlib
import csv
import hashlib
import json
import math
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..console import PACKAGE
from ..files import claim_folder, write_csv, write_json
from ..report.images import save_figure
from .config import CompareConfig

SCRATCH, OWN = "from scratch", "own encoder"
MADE_WITH = "compare.json"  # in the folder of a finished finetuning
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5 %, 1 to 9 degrees of freedom


class Candidate(NamedTuple):
    """A name in the table, and the weights to finetune: `--model` and more options of `finetune`."""

    name: str
    model: str
    options: tuple[str, ...] = ()

    @property
    def start(self) -> list[str]:
        """The words of `finetune` for these weights."""
        return ["--model", self.model, *self.options]


class Curve(NamedTuple):
    """One finetuning of a candidate: top-1 in % on the validation images after each epoch.

    `seed` is that of the order of images, augmentation and new weights; `seconds` is 0 if the run had finished before.
    """

    name: str
    seed: int
    accuracy: list[float]
    seconds: float


def check_options(config: CompareConfig) -> None:
    """Refuses contradictory options, and an output folder that is in use, before anything starts."""
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds takes different numbers, got '{' '.join(map(str, config.seeds))}'.")
    if not (config.encoder or config.unlabelled):
        raise ValueError("Nothing to compare. Give --encoder MODEL, or --unlabelled DIR to pretrain one first.")
    if config.encoder and (config.unlabelled or config.pretrain):
        raise ValueError("--encoder is pretrained already: leave out --unlabelled and --pretrain, or --encoder.")
    claim_folder(config.output, overwrite=config.resume, flag="--resume")


def finetune_options(config: CompareConfig, more: Sequence[str]) -> list[str]:
    """The words of `finetune` that are the same for all candidates."""
    warmup = config.budget // 10
    # with --warmup-prefix, train.py adds the warmup to --epochs
    length = ["--epochs", str(config.budget - warmup), "--warmup-epochs", str(warmup), "--warmup-prefix"]
    return ["--recipe", config.recipe, "--data-dir", config.data_dir, *length, *more]


def pretrain_options(config: CompareConfig) -> list[str]:
    """The words of the pretraining."""
    words = ["--data-dir", str(config.unlabelled), *shlex.split(config.pretrain)]
    return [*words, "--output", config.output, "--experiment", "pretrain", "--resume", "auto"]


def candidates_of(encoder: str, weights: Sequence[str]) -> list[Candidate]:
    """Random weights, the user's encoder and the named weights, which must differ."""
    own = [Candidate(SCRATCH, encoder, ("--from-scratch",)), Candidate(OWN, encoder)]
    found = [*own, *(Candidate(model, model, ("--pretrained",)) for model in weights)]
    for i, candidate in enumerate(found):
        if candidate.name in [other.name for other in found[:i]]:
            raise ValueError(f"--weights names {candidate.name} twice.")
    return found


def compare(
    candidates: Sequence[Candidate], options: Sequence[str], seeds: Sequence[int], output: Path, *, epochs: int,
    resume: bool = False,
) -> Iterator[Curve]:  # fmt: skip
    """Finetunes each candidate once per seed, all candidates of a seed before the next seed, and yields each curve.

    `options` of `finetune` are the same for all and give `epochs`; the runs are in the folder `output`. `resume` keeps
    finished runs, which must have the same options and weights, and starts the others again. A failure is a
    `CalledProcessError`, see `call`.
    """
    runs: list[tuple[Candidate, int, Path, dict[str, Any], dict[str, Any] | None]] = []
    weights = {candidate.model: _digest(candidate.model) for candidate in candidates}
    for seed in seeds:
        for number, candidate in enumerate(candidates):
            run = output / f"finetune-{number}-seed-{seed}"
            words = [*candidate.start, *options, "--seed", str(seed)]
            made_with = {"options": words, "epochs": epochs, "weights": weights[candidate.model]}
            before = _finished(run) if resume else None
            if differing := [key for key in made_with if before and before.get(key) != made_with[key]]:
                changed = "; ".join(f"{key} {_shown(before, key)}, now {_shown(made_with, key)}" for key in differing)
                remedy = "Resume with the same options, or choose another --output"
                raise ValueError(f"'{run}' was finetuned with {changed}. {remedy}.")
            runs.append((candidate, seed, run, made_with, before))
    for candidate, seed, run, made_with, before in runs:
        if before is None:
            shutil.rmtree(run, ignore_errors=True)  # of a finetuning that was stopped
            place, log = ["--output", str(output), "--experiment", run.name], output / f"{run.name}.log"
            seconds = call("finetune", [*made_with["options"], *place], log)
            if len(_accuracies(run)) != epochs:  # train.py ends quietly on Ctrl-C
                raise subprocess.CalledProcessError(1, ["finetune", str(log)])
            write_json(run / MADE_WITH, made_with, indent=1)
        yield Curve(candidate.name, seed, _accuracies(run), 0.0 if before else seconds)


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
        return json.loads((run / MADE_WITH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _shown(made_with: dict[str, Any] | None, key: str) -> str:
    value = (made_with or {}).get(key)
    return shlex.join(value) if isinstance(value, list) else str(value)[:12]


def call(command: str, words: Sequence[str], log: Path) -> float:
    """Runs a command of this package as a child process, which ends with this one; returns its duration in seconds.

    A failure is a `CalledProcessError`; the last word of its `cmd` is the log.
    """

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    start, main = time.perf_counter(), threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP) if main}
    with open(log, "w", encoding="utf-8") as file:
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
            for number, handler in before.items():
                signal.signal(number, handler)
    if code:
        raise subprocess.CalledProcessError(code, [f"{command} {shlex.join(words)}", str(log)])
    return time.perf_counter() - start


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def _accuracies(run: Path) -> list[float]:
    """Validation accuracy in % after each epoch, from train.py's summary.csv."""
    with open(run / "summary.csv", newline="", encoding="utf-8") as file:
        return [float(row["eval_top1"]) for row in csv.DictReader(file) if row.get("eval_top1")]


def _last(curves: Sequence[Curve]) -> dict[str, dict[int, float]]:
    """Accuracy after the last epoch, by candidate and seed."""
    names = dict.fromkeys(curve.name for curve in curves)
    return {name: {c.seed: c.accuracy[-1] for c in curves if c.name == name} for name in names}


def table(curves: Sequence[Curve]) -> str:
    """Accuracy after the last epoch: one row per candidate, one column per seed; and the gains over random weights."""
    last, seeds = _last(curves), sorted({c.seed for c in curves})
    width = max(map(len, last))
    lines = [f"{'validation top-1, %':{width}}  " + "  ".join(f"seed {s:<3}" for s in seeds) + "  median"]
    for name, values in last.items():
        cells = "  ".join(f"{values[s]:8.1f}" if s in values else " " * 8 for s in seeds)
        lines.append(f"{name:{width}}  {cells}  {statistics.median(values.values()):6.1f}")
    return "\n".join([*lines, *(f"{name} against {SCRATCH}: {gain}" for name, gain in gains_of(curves).items())])


def gains_of(curves: Sequence[Curve]) -> dict[str, str]:
    """The mean gain of each candidate over random weights, and its paired 95 % interval over seeds, as text."""
    last, found = _last(curves), {}
    for name, values in last.items():
        gains = [value - last[SCRATCH][seed] for seed, value in values.items() if seed in last.get(SCRATCH, {})]
        if name == SCRATCH or not gains:
            continue
        mean, n = statistics.fmean(gains), len(gains)
        if n == 1:
            found[name] = f"{mean:+.1f} points with one seed, which gives no interval; use several --seeds"
            continue
        half = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * statistics.stdev(gains) / math.sqrt(n)
        low, high = mean - half, mean + half
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        found[name] = f"{mean:+.1f} points (95 % interval over {n} seeds {low:+.1f} to {high:+.1f}): {verdict}"
    return found


def write_results(
    curves: Sequence[Curve], candidates: Sequence[Candidate], config: CompareConfig, output: Path
) -> None:
    """Writes the curves so far: compare.csv, compare.json and compare.png."""
    rows = ((c.name, c.seed, i, a) for c in curves for i, a in enumerate(c.accuracy, 1))
    write_csv(output / "compare.csv", ("candidate", "seed", "epoch", "top1"), rows)
    found: dict[str, Any] = {
        "budget": config.budget, "recipe": config.recipe, "data_dir": config.data_dir,
        "candidates": {c.name: c.model for c in candidates}, "top1": _last(curves), "gains": gains_of(curves),
        "seconds": {f"{c.name}, seed {c.seed}": round(c.seconds, 1) for c in curves},
    }  # fmt: skip
    write_json(output / "compare.json", found, indent=2)
    draw_curves(curves, output / "compare.png")


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draws accuracy over epochs as a PNG: thin lines for seeds, a thick one for the median of a candidate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(_last(curves)):
        own, colour = [c.accuracy for c in curves if c.name == name], f"C{i}"
        for values in own:
            axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.35, linewidth=1)
        middle = [statistics.median(values) for values in zip(*own, strict=False)]
        epochs, marker = range(1, len(middle) + 1), "o" if len(middle) == 1 else None
        label = f"{name}, median of {len(own)}"
        axes.plot(epochs, middle, color=colour, linewidth=2.5, marker=marker, label=label)
    title = "The same finetuning from different weights"
    axes.set(xlabel="epoch of finetuning", ylabel="validation top-1, %", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
