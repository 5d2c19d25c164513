"""Finetuning of ConvNeXt V2 with timm's own train.py and a recipe: a launcher, without a training loop.

    timm-convnextv2 finetune --recipe smoke --model local-dir:runs/mine/encoder --data-dir DATA
    torchrun --nproc-per-node 8 -m timm_convnextv2 finetune --recipe finetune-1k-tiny --model ... --data-dir ...
    timm-convnextv2 finetune --list-recipes

It finds train.py, checks the recipe, the model's folder, the data and the batch, runs train.py in this process, and
exports the result to OUTPUT/EXPERIMENT/model, a timm folder that stock timm opens. Options that are not listed below
go to train.py. The same by hand, without checks and export:

    python train.py --device-modules timm_convnextv2 --config RECIPES/smoke.yaml --model ...
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from timm.utils.distributed import world_info_from_env

from ..checkpoint import export_finetuned
from ..checkpoint.finetuned import LABEL_NAMES
from ..console import PROGRAM, CommandParser, invocation, refused, say
from ..data import Pixels
from ..finetune.images import feed
from ..finetune.plan import (
    ADDED_OPTIONS,
    Options,
    Plan,
    channels,
    count,
    describe,
    make_plan,
    resolve_options,
    warnings,
)
from ..finetune.preflight import check_augmentation
from ..finetune.start import tell
from ..finetune.train_script import find_train_script, load_train_script, script_path
from ..recipes import list_recipes, load_recipe, recipe_names
from ..runs.device import check_device

RECIPES = Path(__file__).parents[1] / "finetune" / "recipes"

# What validate.py must be told as train.py was.
EVALUATION_OPTIONS = ("dataset", "class_map", "input_img_mode", "input_key", "target_key", "device")


# fmt: off
def build_parser() -> CommandParser:
    """The launcher's own options."""
    parser = CommandParser(
        prog=f"{PROGRAM} finetune",
        description=__doc__,
        epilog=f"RECIPES: {RECIPES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="a recipe of --list-recipes, or a YAML file with options of train.py")
    add("--list-recipes", action="store_true", help="print names and purposes, then stop")
    add("--timm-train", metavar="PATH", help="timm's train.py (else: TIMM_TRAIN, a clone of timm, a download)")
    add("--global-batch-size", type=int, metavar="N", help="images per update over all processes")
    add("--from-scratch", action="store_true", help="the same recipe from random weights")
    add("--nodata", type=float, metavar="V",
        help="stored value of pixels without data, which get the others' mean (default: the encoder's; nan: none)")
    add("--license", metavar="ID", help="licence of the weights, e.g. mit; those started from keep theirs")
    add("--dry-run", action="store_true", help="check everything, print what would run, then stop")
    return parser
# fmt: on


def prepare(argv: list[str]) -> Plan | None:
    """Checks everything that can be checked before training, and says what will run.

    Returns:
        The plan, or None where there is nothing to run (--list-recipes, --dry-run).

    Raises:
        ValueError: A user's mistake, in one message.
    """
    own, rest = build_parser().parse_known_args(argv)
    rest += [f"--{name}={getattr(own, name)}" for name in ADDED_OPTIONS if getattr(own, name) is not None]
    if own.list_recipes:
        say(list_recipes(RECIPES))
        return None
    check_words(own.recipe, rest)
    recipe = load_recipe(own.recipe, RECIPES)
    if own.from_scratch:
        recipe = recipe.from_scratch()
    script = load_train_script(find_train_script(own.timm_train))
    options = resolve_options(script, recipe, rest)
    check_start(options, own.from_scratch)
    if not own.dry_run:
        check_device(options.values.device)
    check_augmentation(options.values.aa)
    plan = make_plan(script, recipe, options, rest, own.global_batch_size)

    for line in describe(plan):
        say(line)
    for warning in warnings(plan, own.from_scratch):
        say(f"warning: {warning}", error=True)
    if not own.dry_run:
        return plan
    say("train.py's options that differ from its defaults:")
    for name, value in options.changed().items():
        say(f"  {name}: {value}")
    return None


def check_words(recipe: str | None, rest: list[str]) -> None:
    """Asks for the recipe, which is train.py's --config."""
    if not recipe:
        raise ValueError(f"--recipe is needed: {', '.join(recipe_names(RECIPES))}, or the path of a .yaml file.")
    if any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        raise ValueError("--config is what the launcher gives to train.py: give your file as --recipe FILE.")


def check_start(options: Options, from_scratch: bool) -> None:
    """Refuses options about the first weights that contradict each other."""
    args = options.values
    if from_scratch:
        for name in ("pretrained", "pretrained_path", "initial_checkpoint"):
            if getattr(args, name, None):
                raise ValueError(f"--from-scratch starts from random weights; leave out --{name.replace('_', '-')}.")
    if args.pretrained_path and not args.pretrained:
        raise ValueError("--pretrained-path is read by train.py only with --pretrained: add it, or leave both out.")


@contextmanager
def arguments(plan: Plan) -> Iterator[None]:
    """sys.argv as if train.py had been started with the recipe."""
    before = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        config = plan.recipe.path
        if yaml.safe_load(config.read_text(encoding="utf-8")) != plan.recipe.values:  # --from-scratch
            config = Path(folder) / config.name
            config.write_text(yaml.safe_dump(plan.recipe.values), encoding="utf-8")
        sys.argv = [str(script_path(plan.script)), "--config", str(config), *plan.train_argv()]
        try:
            yield
        finally:
            sys.argv = before


@contextmanager
def telling(plan: Plan) -> Iterator[None]:
    """Says what is whole and how to resume, where train.py fails."""
    try:
        yield
    except BaseException as e:
        failed = not isinstance(e, SystemExit) or e.code not in (None, 0)
        if failed and world_info_from_env()[1] == 0:
            left = tell(plan.folder, plan.epochs, plan.options.values.experiment)
            say(f"train.py failed ({type(e).__name__}). {left}", error=True)
        raise


def next_commands(plan: Plan, model: Path) -> list[str]:
    """Commands that evaluate the result, and show what publishing would send."""
    args = plan.options.values
    commands = []
    if args.val_split:
        words = [*invocation("validate"), "--model", f"local-dir:{model}"]
        words += [] if os.environ.get("TIMM_TRAIN") else ["--timm-train", str(script_path(plan.script))]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--split", args.val_split] if args.val_split != "validation" else []
        for name in EVALUATION_OPTIONS:
            if getattr(args, name) != plan.options.defaults[name]:
                words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        words += ["--amp", "--amp-dtype", args.amp_dtype] if args.amp else []
        commands.append(shlex.join(words))
    commands.append(shlex.join([*invocation("publish"), str(plan.folder), "USER/NAME", "--dry-run"]))
    return commands


def epochs_done(folder: Path) -> int | None:
    """Epochs in the run's summary.csv; None where there is none."""
    try:
        rows = (folder / "summary.csv").read_text(encoding="utf-8").splitlines()
        return int(rows[-1].partition(",")[0]) + 1
    except (OSError, IndexError, ValueError):
        return None


def keep_label_names(plan: Plan) -> None:
    """Writes the classes' names into the run's folder: the data may be gone when the model is exported again."""
    if plan.splits and world_info_from_env()[1] == 0:
        index = plan.splits[0].reader.class_to_idx
        names = {i: name for name, i in index.items()}
        if sorted(names) == list(range(plan.options.values.num_classes)):  # a class map may leave gaps
            plan.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps([names[i] for i in sorted(names)], ensure_ascii=False, indent=0)
            (plan.folder / LABEL_NAMES).write_text(text + "\n", encoding="utf-8")


def export(plan: Plan) -> Path:
    """Exports what train.py saved to the run's `model` folder.

    Raises:
        ValueError: There is no checkpoint, or it could not be exported.
    """
    if not any((plan.folder / name).is_file() for name in ("model_best.pth.tar", "last.pth.tar")):
        raise ValueError(f"train.py ended without a checkpoint in {plan.folder}; there is nothing to export.")
    try:
        return export_finetuned(plan.folder, plan.folder / "model", info={"Recipe": plan.recipe.name})
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"the run in {plan.folder} is whole, but its model could not be exported: {e}") from e


def finish(plan: Plan) -> int:
    """Exports the result, and says what to do with it; returns the exit status."""
    try:
        model = export(plan)
    except ValueError as e:
        refused("finetune", e)
        return 1
    done = epochs_done(plan.folder)
    if done is not None and done < plan.epochs:  # train.py ends quietly on Ctrl-C
        resume = f"--experiment {plan.options.values.experiment} --resume {plan.folder / 'last.pth.tar'}"
        say(f"Stopped after {count(done, 'epoch')} of {plan.epochs}; the same command with {resume} resumes it.")
        say(f"What there is so far is in {model}")
    else:
        say(f"Done: the finetuned model is in {model}")
    say("Evaluate it, and see what would be published:")
    for command in next_commands(plan, model):
        say(f"  {command}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the launcher; returns its exit status. What train.py raises passes through, after a message that says what
    it left behind.

    Args:
        argv: Options; None for the process's own.
    """
    try:
        plan = prepare(sys.argv[1:] if argv is None else argv)
    except ValueError as e:
        return refused("finetune", e)
    if plan is None:
        return 0
    keep_label_names(plan)
    args = plan.options.values
    feed(plan.script, in_chans=channels(args), pixels=Pixels.from_record(args.pixels))
    with arguments(plan), telling(plan):
        plan.script.main()
    return finish(plan) if world_info_from_env()[1] == 0 else 0
