"""`timm-convnextv2 finetune`: timm's own train.py with a recipe, checked before and exported after."""

from timm.utils.distributed import world_info_from_env

from ..config import build
from ..console import count, refused, say
from ..finetune.checkpoints import after_failure
from ..finetune.config import RECIPES, FinetuneConfig
from ..finetune.launch import describe, epochs_done, export, exported, next_commands, result, run_plan
from ..finetune.options import ScriptOptions, resolve_options
from ..finetune.plan import Plan, check_augmentation, describe_plan, make_plan, warnings
from ..finetune.scripts import load_script
from ..hub_errors import HubError
from ..recipes import list_recipes, load_recipe, recipe_names
from ..report.next_steps import near
from .base import own_options


def prepare(argv: list[str] | None) -> Plan | None:
    """Checks everything that can be checked before training, and prints what will run.

    Returns None if there is nothing to run (--list-recipes, --dry-run).
    """
    given, rest = own_options("finetune", argv)
    config = build(FinetuneConfig, given)
    if config.list_recipes:
        say(list_recipes(RECIPES))
        return None
    if not config.recipe:
        raise ValueError(
            "--recipe is needed: small-data for your own 500 to 50,000 images, scratch-small for random weights, the "
            f"path of a .yaml file, or one of {', '.join(recipe_names(RECIPES))}."
        )
    if any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        raise ValueError("The launcher sets train.py's --config: give your file as --recipe FILE.")
    # train.py's parser knows these two as well, so that they are in its args.yaml
    kept = {"nodata": config.nodata, "license": config.license}
    rest += [f"--{name}={value}" for name, value in kept.items() if value is not None]
    recipe = load_recipe(config.recipe, RECIPES)
    if config.from_scratch:
        recipe = recipe.evolve(pretrained=False)
    if config.no_amp:
        recipe = recipe.evolve(amp=False)
    script = load_script("train.py", config.timm_train)
    options = resolve_options(script, rest, recipe)
    if options.amp and config.no_amp:
        raise ValueError("--amp and --no-amp exclude each other: leave one of them out.")
    _check_start(options, config.from_scratch)
    check_augmentation(options.aa)
    plan = make_plan(script, recipe, options, rest, config.global_batch_size, config.split, config.dry_run)

    for line in [*plan.notes, *describe_plan(plan)]:
        say(line)
    for warning in warnings(plan, config.from_scratch):
        say(f"warning: {warning}", error=True)
    if not config.dry_run:
        return plan
    say("train.py's options that differ from its defaults:")
    for name, value in plan.options.changed().items():
        say(f"  {name}: {value}")
    return None


def _check_start(options: ScriptOptions, from_scratch: bool) -> None:
    """Refuses contradictory options on the first weights."""
    for name in ("pretrained", "pretrained_path", "initial_checkpoint") if from_scratch else ():
        if getattr(options, name):
            raise ValueError(f"--from-scratch starts from random weights; leave out --{name.replace('_', '-')}.")
    if options.pretrained_path and not options.pretrained:
        raise ValueError("train.py reads --pretrained-path only with --pretrained: add it, or leave both out.")


def finish(plan: Plan) -> int:
    """Exports the result and prints the next commands; returns the exit status."""
    try:
        model = export(plan)
    except (ValueError, HubError) as e:
        refused("finetune", e)
        return 1
    done = epochs_done(plan.folder)
    if done is not None and done < plan.epochs:  # train.py ends quietly on Ctrl-C
        resume = f"--experiment {plan.options.experiment} --resume {near(plan.folder / 'last.pth.tar')}"
        say(f"Stopped after {count(done, 'epoch')} of {plan.epochs}; repeat the command with {resume} to resume.")
        say(f"So far {exported(plan, model)}")
    else:
        say(f"Done: {exported(plan, model)}")
    describe(plan, model)
    for line in result(plan):
        say(line)
    if model:
        say("Evaluate the model, and see what would be published:")
        for command in next_commands(plan, model):
            say(f"  {command}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Errors of train.py pass through, after a message on its files."""
    try:
        plan = prepare(argv)
    except (ValueError, HubError) as e:
        return refused("finetune", e)
    if plan is None:
        return 0
    first = world_info_from_env()[1] == 0
    try:
        run_plan(plan)
    except BaseException as e:
        if first and not (isinstance(e, SystemExit) and e.code in (None, 0)):
            left = after_failure(plan.folder, plan.epochs, plan.options.experiment)
            say(f"train.py failed ({type(e).__name__}). {left}", error=True)
        raise
    return finish(plan) if first else 0
