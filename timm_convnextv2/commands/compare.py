"""Should I pretrain? The same finetuning from random weights, from your encoder and from named weights.

    timm-convnextv2 compare --data-dir LABELLED --encoder runs/mine --output compared
    timm-convnextv2 compare --data-dir LABELLED --unlabelled IMAGES --pretrain "--model fcmae_convnextv2_pico" \\
        --weights convnextv2_pico.fcmae_ft_in1k --budget 60 --output compared

Each candidate is finetuned with timm's train.py and one recipe, for the same number of epochs on the same images, once
per seed. The random weights have the architecture of your encoder. LABELLED is a folder with train/ and validation/.
Prints a table; writes compare.csv, compare.json and compare.png. Options that are not listed below go to
`timm-convnextv2 finetune`. A stopped comparison continues with --resume.
"""

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from ..config import evolve
from ..console import PROGRAM, refused, say
from ..features import compare as comparison
from ..features.compare import candidates_of, pretrain_options, tail
from ..features.config import CompareConfig
from ..features.encoder import model_name
from ..runs.lock import Lock
from .base import own_options


def main(argv: list[str] | None = None) -> int:
    """A user error is one message and exit status 2, a finetuning that fails is status 1."""
    try:
        start(*own_options("compare", __doc__, CompareConfig, argv))
        return 0
    except (ValueError, OSError) as e:
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
    comparison.check_options(config)
    with ExitStack() as stack:
        if config.dry_run:  # leaves nothing behind that a run would take for its own
            config = evolve(config, output=stack.enter_context(TemporaryDirectory()))
        stack.callback(Lock(Path(config.output)).release)
        _run(config, rest)


def _run(config: CompareConfig, rest: list[str]) -> None:
    output = Path(config.output)
    options = comparison.finetune_options(config, rest)
    encoder = model_name(config.encoder) if config.encoder else _untrained(config, output)
    for candidate in candidates_of(encoder, config.weights):  # user errors must appear before hours of work
        _check_finetuning([*candidate.start, *options], output / "dry-run.log")
    if config.dry_run:
        count = (2 + len(config.weights)) * len(config.seeds)
        say(f"Would finetune {count} times for {config.budget} epochs; nothing was started.")
        return
    if not config.encoder:
        encoder = _pretrain(config, output)
    candidates, curves = candidates_of(encoder, config.weights), []
    how = {"epochs": config.budget, "resume": config.resume}
    for curve in comparison.compare(candidates, options, config.seeds, output, **how):
        curves.append(curve)
        took = f"{curve.seconds:.0f} s" if curve.seconds else "finished before"
        say(f"seed {curve.seed}: {curve.name:12} {curve.accuracy[-1]:5.1f} %  ({len(curve.accuracy)} epochs, {took})")
        comparison.write_results(curves, candidates, config, output)
    say(comparison.table(curves))
    say(f"Written: {output}/compare.csv, compare.json, compare.png")


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
