"""`timm-convnextv2 compare`: finetuning from random weights, from your encoder and from other models."""

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checkpoint.loading import model_name
from ..config import build, evolve
from ..console import PROGRAM, count, ended_by_signals, refused, say
from ..data.labelled import Row, check_classes, divide, read_labelled
from ..features import compare as comparison
from ..features import verdict as results
from ..features.compare import candidates_of, pretrain_options, tail
from ..features.config import CompareConfig
from ..finetune.config import RECIPES
from ..hub_errors import HubError
from ..recipes import load_recipe
from ..runs.lock import Lock
from .base import own_options


def main(argv: list[str] | None = None) -> int:
    """A user error is one message and exit status 2, a finetuning that fails is status 1."""
    try:
        given, rest = own_options("compare", argv)
        with ended_by_signals():
            start(build(CompareConfig, given), rest)
        return 0
    except (ValueError, OSError, HubError) as e:
        return refused("compare", e)
    except KeyboardInterrupt:
        say("Stopped. Finished runs are kept: resume with --resume.", error=True)
        return 130
    except subprocess.CalledProcessError as e:
        say(f"{PROGRAM} compare: {failure(e)}", error=True)
        return 1


def failure(error: subprocess.CalledProcessError) -> str:
    """Which child failed, and the end of its log."""
    log = Path(error.cmd[-1])
    return (
        f"'{error.cmd[0]}' failed with status {error.returncode}; its last lines:\n{tail(log, 15)}\n"
        f"The whole output is in {log}. Finished runs are kept: resume with --resume."
    )


def start(config: CompareConfig, rest: list[str]) -> None:
    """Compares, prints and writes; `rest` are options of `finetune`. A child that fails is a `CalledProcessError`."""
    comparison.check_options(config, rest)
    with ExitStack() as stack:
        if config.dry_run:  # leaves nothing behind that a run would take for its own
            config = evolve(config, output=stack.enter_context(TemporaryDirectory()))
        stack.callback(Lock(Path(config.output)).release)
        _run(config, rest)


def _run(config: CompareConfig, rest: list[str]) -> None:
    output = Path(config.output)
    encoder = model_name(config.encoder) if config.encoder else _untrained(config, output)
    candidates = candidates_of(encoder, config, lambda name: load_recipe(name, RECIPES).values)
    rows, parts = _open_data(config, output / "data")
    tuning, final = comparison.cells_of(candidates, config, len(rows), parts)
    # user errors must appear before hours of work
    for cell in {(cell.candidate.name, cell.images): cell for cell in (*tuning, *final)}.values():
        _check_finetuning([*comparison.words_of_cell(cell, rest), "--data-dir", str(cell.data)], output / "dry-run.log")
    what = comparison.plan_text(tuning, final, rest)
    if config.dry_run:
        say(f"Would run {what}. Nothing was started.")
        return
    say(f"{what}. The remaining time is printed after each.")
    if not config.encoder:
        encoder = _pretrain(config, output)
        candidates = candidates_of(encoder, config, lambda name: load_recipe(name, RECIPES).values)
        tuning, final = comparison.cells_of(candidates, config, len(rows), parts)
    curves = []
    for curve in comparison.compare(tuning, final, rest, resume=config.resume, note=say):
        curves.append(curve)
        comparison.write_results(curves, candidates, config, output)
    say(results.table(curves))
    # benchmarks/results/real_compare.csv: by 15 points on photographs
    more = (
        "" if config.also else "A small ResNet from random weights may be the better baseline: --also resnet18 --resume"
    )
    for line in [results.pretraining_cost(encoder), *results.verdict(results.last_of(curves)), more]:
        if line:
            say(line)
    say(f"Written: {output}/compare.csv, compare.json, compare.png")


def _open_data(config: CompareConfig, folder: Path) -> tuple[list[Row], dict[int, comparison.Part]]:
    """The training images, and folders of links to the images of each budget."""
    place, how = config.data_dir, config.split
    rows, notes = read_labelled(place, how.groups, how.group_by)
    check_classes(rows, place)
    train, validation = divide(rows, place, how.validation_share, comparison.SPLIT_SEED)
    for note in notes:
        say(note)
    if not any(row.part for row in rows):
        parts = f"{count(len(train), 'image')} to train on, {len(validation)} to validate on"
        say(f"{place} is split: {parts}, for all seeds")
    return train, comparison.part_folders(train, config.label_budgets, validation, folder)


def _check_finetuning(words: Sequence[str], log: Path) -> None:
    """Raises the `ValueError` with which `finetune` would refuse its options."""
    from .finetune import prepare

    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        prepare([*words, "--dry-run"])


def _untrained(config: CompareConfig, output: Path) -> str:
    """Exports the encoder to pretrain with random weights, so that all finetunings can be checked first."""
    from ..checkpoint import export_encoder
    from ..pretraining.start import create_model
    from .pretrain import parse_options

    words = pretrain_options(config)
    log = output / "dry-run.log"
    try:
        comparison.call("pretrain", [*words, "--dry-run"], log)
    except subprocess.CalledProcessError as e:
        raise ValueError(f"--unlabelled, --pretrain: {tail(log, 1).partition(': error: ')[2] or tail(log, 5)}") from e
    planned, start = parse_options(words)
    # nothing is trained with numbers that are still to be measured
    planned = evolve(planned, **dict.fromkeys(planned.crops.unmeasured, (0.5,) * planned.crops.in_chans))
    folder, license = output / "untrained", planned.destination.license
    model = create_model(planned.network, planned.crops, seed=planned.seed, start=start, license=license)
    mean, std = planned.crops.normalization
    export_encoder(model, folder, mean=mean, std=std, license=license or None, pixels=planned.pixels.to_pixels())
    return f"local-dir:{folder.resolve()}"


def _pretrain(config: CompareConfig, output: Path) -> str:
    """Pretrains or resumes, unless that has finished; returns the name of the encoder."""
    seconds = comparison.call("pretrain", pretrain_options(config), output / "pretrain.log")
    say(f"Pretrained on {config.unlabelled} in {seconds:.0f} s; log in {output / 'pretrain.log'}")
    return f"local-dir:{(output / 'pretrain' / 'encoder').resolve()}"
