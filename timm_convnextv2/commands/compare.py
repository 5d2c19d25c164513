"""Should I pretrain? The same finetuning from random weights, from your encoder and from named weights.

    timm-convnextv2 compare --data-dir LABELLED --encoder runs/mine --output compared
    timm-convnextv2 compare --data-dir LABELLED --unlabelled IMAGES --pretrain "--model fcmae_convnextv2_pico" \\
        --weights convnextv2_pico.fcmae_ft_in1k --budget 60 --output compared

Each candidate is finetuned with timm's train.py and one recipe, for the same number of epochs on the same images, once
per seed. What was pretrained is compared with random weights of the same model. LABELLED is a folder with train/ and
validation/. Prints a table; writes compare.csv, compare.json and compare.png. Options that are not listed below go to
`timm-convnextv2 finetune`. A comparison that was stopped continues with --resume.
"""

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from ..console import PROGRAM, CommandParser, refused, say
from ..files import whole_file

SCRATCH, OWN = "from scratch", "own encoder"


class Candidate(NamedTuple):
    """Weights to start a finetuning from.

    Attributes:
        name: What the table calls it.
        model: What `finetune --model` takes.
        options: More options of `finetune`.
    """

    name: str
    model: str
    options: tuple[str, ...] = ()


class Curve(NamedTuple):
    """One finetuning.

    Attributes:
        name: Of its candidate.
        seed: Of the order of the images, augmentation and new weights.
        accuracy: Top-1 in % on the validation images, after each epoch.
        seconds: It took; 0 where it was found finished.
    """

    name: str
    seed: int
    accuracy: list[float]
    seconds: float


def build_parser() -> CommandParser:
    """The options; what is not among them goes to `finetune`."""
    parser = CommandParser(
        prog=f"{PROGRAM} compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="labelled images, train/ and validation/")
    add("--encoder", metavar="MODEL", help="your encoder: the folder of a run, local-dir:FOLDER or hf-hub:USER/NAME")
    add("--unlabelled", metavar="DIR", help="images to pretrain an encoder on, in the place of --encoder")
    add("--pretrain", default="", metavar="OPTIONS", help="options of that pretraining, as one word in quotes")
    add("--weights", nargs="+", default=[], metavar="NAME", help="more candidates: timm's names, local-dir:, hf-hub:")
    add("--budget", type=int, default=60, metavar="N", help="epochs of each finetuning, a tenth of them warmup")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--recipe", default="small-data", metavar="NAME", help="recipe of the finetuning (default: small-data)")
    add("--output", default="output/compare", metavar="DIR")
    add("--resume", action="store_true", help="keep what an earlier call finished there")
    add("--dry-run", action="store_true", help="check everything, then stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; a user's mistake is one message and exit status 2, a finetuning that fails is status 1."""
    try:
        args, rest = build_parser().parse_known_args(argv)
        return _run(args, rest)
    except (ValueError, OSError) as e:
        return refused("compare", e)
    except subprocess.CalledProcessError as e:
        log = Path(e.cmd[-1])
        say(f"{PROGRAM} compare: '{e.cmd[0]}' failed with status {e.returncode}; its last lines:", error=True)
        say(_tail(log, 15), error=True)
        say(f"All it printed is in {log}. What is finished stays: --resume.", error=True)
        return 1


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    output = Path(args.output)
    _check(args, output)
    output.mkdir(parents=True, exist_ok=True)
    options = ["--recipe", args.recipe, "--data-dir", args.data_dir, *_length(args.budget), *rest]
    encoder = _encoder_name(args.encoder) if args.encoder else _untrained(args, output)
    for candidate in _candidates(encoder, args.weights):  # mistakes come before hours of work
        _check_finetuning([*_start(candidate), *options], output / "dry-run.log")
    if args.dry_run:
        count = (2 + len(args.weights)) * len(args.seeds)
        say(f"Would finetune {count} times for {args.budget} epochs; nothing was started.")
        return 0
    if not args.encoder:
        encoder = _pretrain(args, output)
    candidates, curves = _candidates(encoder, args.weights), []
    for curve in compare(candidates, options, args.seeds, output, resume=args.resume):
        curves.append(curve)
        took = f"{curve.seconds:.0f} s" if curve.seconds else "finished before"
        say(f"seed {curve.seed}: {curve.name:12} {curve.accuracy[-1]:5.1f} %  ({len(curve.accuracy)} epochs, {took})")
        _write(curves, candidates, args, output)
    say(table(curves))
    say(f"Written: {output}/compare.csv, compare.json, compare.png")
    return 0


def _check(args: argparse.Namespace, output: Path) -> None:
    """Refuses what can be known before anything is started."""
    if args.budget < 1 or not args.seeds:
        raise ValueError(f"--budget is at least 1 epoch, and --seeds at least one number; got {args.budget}.")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} has one number twice.")
    if not (args.encoder or args.unlabelled):
        raise ValueError("What to compare? Give --encoder MODEL, or --unlabelled DIR to pretrain one first.")
    if args.encoder and (args.unlabelled or args.pretrain):
        raise ValueError("--encoder is pretrained already: leave out --unlabelled and --pretrain, or --encoder.")
    if output.is_dir() and any(output.iterdir()) and not args.resume:
        raise ValueError(f"{output} is not empty. Continue that comparison with --resume, or choose another --output.")


def _check_finetuning(words: Sequence[str], log: Path) -> None:
    """Raises the `ValueError` that `finetune` would refuse its options with."""
    from .finetune import prepare

    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        prepare([*words, "--dry-run"])


def _encoder_name(place: str) -> str:
    """A run's folder, or an encoder's, as a name of timm; other names as they are."""
    path = Path(place)
    for folder in (path / "encoder", path):
        if (folder / "config.json").is_file():
            return f"local-dir:{folder.resolve()}"
    if path.exists():
        raise ValueError(f"--encoder {place} has neither encoder/config.json nor config.json.")
    return place


def _pretrain_words(args: argparse.Namespace, output: Path) -> list[str]:
    words = ["--data-dir", args.unlabelled, *shlex.split(args.pretrain)]
    return [*words, "--output", str(output), "--experiment", "pretrain", "--resume", "auto"]


def _untrained(args: argparse.Namespace, output: Path) -> str:
    """The encoder that would be pretrained, with random weights, so that all finetunings can be checked first."""
    from ..checkpoint import export_encoder
    from ..config import evolve
    from ..pretrain.start import create_model
    from .pretrain import parse_options

    words = _pretrain_words(args, output)
    log = output / "dry-run.log"
    try:
        _call("pretrain", [*words, "--dry-run"], log)
    except subprocess.CalledProcessError as e:
        raise ValueError(f"--unlabelled, --pretrain: {_tail(log, 1).partition(': error: ')[2] or _tail(log, 5)}") from e
    config, start = parse_options(words)
    # nothing is trained with numbers that are still to be measured
    config = evolve(config, **dict.fromkeys(config.crops.unmeasured, (0.5,) * config.crops.in_chans))
    folder, license = output / "untrained", config.destination.license
    model = create_model(config.network, config.crops, seed=config.seed, start=start, license=license)
    mean, std = config.crops.normalization
    export_encoder(model, folder, mean=mean, std=std, license=license or None, pixels=config.pixels.to_pixels())
    return f"local-dir:{folder.resolve()}"


def _pretrain(args: argparse.Namespace, output: Path) -> str:
    """Pretrains, or resumes that; a run that had ended is left as it is. Returns the name of the encoder."""
    seconds = _call("pretrain", _pretrain_words(args, output), output / "pretrain.log")
    say(f"Pretrained on {args.unlabelled} in {seconds:.0f} s; log in {output / 'pretrain.log'}")
    return f"local-dir:{(output / 'pretrain' / 'encoder').resolve()}"


def _candidates(encoder: str, weights: Sequence[str]) -> list[Candidate]:
    """Random weights, the own encoder, and what else was named, each once."""
    found = [Candidate(SCRATCH, encoder, ("--from-scratch",)), Candidate(OWN, encoder)]
    names = {SCRATCH, OWN}
    for model in weights:
        if model in names:
            raise ValueError(f"--weights names {model} twice.")
        names.add(model)
        found.append(Candidate(model, model, ("--pretrained",)))
    return found


def _start(candidate: Candidate) -> list[str]:
    return ["--model", candidate.model, *candidate.options]


def _length(epochs: int) -> list[str]:
    """So many epochs in all: train.py adds the warmup to --epochs where the recipe has `warmup_prefix`."""
    warmup = epochs // 10
    return ["--epochs", str(epochs - warmup), "--warmup-epochs", str(warmup), "--warmup-prefix"]


def compare(
    candidates: Sequence[Candidate], options: Sequence[str], seeds: Sequence[int], output: Path, resume: bool = False
) -> Iterator[Curve]:
    """Finetunes each candidate once per seed, all candidates of a seed before the next seed.

    Args:
        candidates: What to start from.
        options: Of `finetune`, the same for all: recipe, data, length.
        seeds: Of the finetunings.
        output: Folder of their runs.
        resume: Take those that are finished there, and begin the others anew.

    Yields:
        A curve as soon as it is there.

    Raises:
        CalledProcessError: A finetuning failed; the last word of `cmd` is its log.
    """
    for seed in seeds:
        for number, candidate in enumerate(candidates):
            name = f"finetune-{number}-seed-{seed}"
            run, seconds = output / name, 0.0
            if not (resume and (run / "model" / "config.json").is_file()):
                words = [*_start(candidate), *options, "--seed", str(seed)]
                words += ["--output", str(output), "--experiment", name]
                seconds = _call("finetune", words, output / f"{name}.log")
            yield Curve(candidate.name, seed, _accuracies(run), seconds)


def _call(command: str, words: Sequence[str], log: Path) -> float:
    """Runs a command of this package in a process of its own; returns the seconds it took.

    Raises:
        CalledProcessError: It failed; the last word of its `cmd` is the log.
    """
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", f"timm_convnextv2.{command}", *words], stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, [f"{command} {shlex.join(words)}", str(log)])
    return time.perf_counter() - start


def _tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def _accuracies(run: Path) -> list[float]:
    """Validation accuracy in % after each epoch, from train.py's summary.csv."""
    with open(run / "summary.csv", newline="", encoding="utf-8") as file:
        return [float(row["eval_top1"]) for row in csv.DictReader(file) if row.get("eval_top1")]


def table(curves: Sequence[Curve]) -> str:
    """Accuracy after the last epoch: a line a candidate, a column a seed; and what pretraining brought, by seed."""
    last = {name: {c.seed: c.accuracy[-1] for c in curves if c.name == name} for name in _names(curves)}
    seeds = sorted({c.seed for c in curves})
    width = max(map(len, last))
    lines = [f"{'validation top-1, %':{width}}  " + "  ".join(f"seed {s:<3}" for s in seeds) + "  median"]
    for name, values in last.items():
        cells = "  ".join(f"{values[s]:8.1f}" if s in values else " " * 8 for s in seeds)
        lines.append(f"{name:{width}}  {cells}  {statistics.median(values.values()):6.1f}")
    for name, values in last.items():
        gains = [values[s] - last[SCRATCH][s] for s in seeds if s in values and s in last.get(SCRATCH, {})]
        if name != SCRATCH and gains:
            better = sum(gain > 0 for gain in gains)
            lines.append(
                f"{name} against {SCRATCH}: {statistics.median(gains):+.1f} points (median; {min(gains):+.1f} to "
                f"{max(gains):+.1f}), better with {better} of {len(gains)} seeds"
            )
    return "\n".join(lines)


def _names(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.name for curve in curves))


def _write(curves: Sequence[Curve], candidates: Sequence[Candidate], args: argparse.Namespace, output: Path) -> None:
    """The curves so far, as CSV, JSON and figure."""
    with whole_file(output / "compare.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("candidate", "seed", "epoch", "top1"))
        writer.writerows((c.name, c.seed, i, a) for c in curves for i, a in enumerate(c.accuracy, 1))
    found: dict[str, Any] = {
        "budget": args.budget,
        "recipe": args.recipe,
        "data_dir": args.data_dir,
        "candidates": {c.name: c.model for c in candidates},
        "top1": {n: {c.seed: c.accuracy[-1] for c in curves if c.name == n} for n in _names(curves)},
        "seconds": {f"{c.name}, seed {c.seed}": round(c.seconds, 1) for c in curves},
    }
    with whole_file(output / "compare.json") as part:
        part.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curves(curves, output / "compare.png")


def draw_curves(curves: Sequence[Curve], path: Path, title: str = "The same finetuning from different weights") -> None:
    """Accuracy over epochs as a PNG: each seed thin, the median of the candidate thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(_names(curves)):
        own, colour = [c.accuracy for c in curves if c.name == name], f"C{i}"
        for values in own:
            axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.35, linewidth=1)
        middle = [statistics.median(values) for values in zip(*own, strict=False)]
        epochs, marker = range(1, len(middle) + 1), "o" if len(middle) == 1 else None
        label = f"{name}, median of {len(own)}"
        axes.plot(epochs, middle, color=colour, linewidth=2.5, marker=marker, label=label)
    axes.set(xlabel="epoch of finetuning", ylabel="validation top-1, %", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, format="png")
