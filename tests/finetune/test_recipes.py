"""The recipes against the paper's tables, the official schedule, and timm's train.py."""

import argparse
import math
import re

import helpers
import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune.scripts import load_script
from timm_convnextv2.recipes import load_recipe

RECIPES = {path.stem: path for path in helpers.RECIPES.glob("*.yaml")}
GENERAL = {"linear-probe", "scratch-small", "small-data", "smoke"}
PROCESSES = 8  # that the paper's recipes are written for

# The paper (arXiv 2301.00808), appendix A.2, tables 9 to 13, and the official TRAINING.md; accuracy: tables 14 and 15.
COLUMNS = ("lr_base", "weight_decay", "layer_decay", "warmup", "epochs", "smoothing", "mixup", "cutmix", "drop_path")
PAPER = {
    "finetune-1k-atto": (2e-4, 0.3, 0.9, 0, 600, 0.2, 0.0, 0.0, 0.1, 76.7),
    "finetune-1k-femto": (2e-4, 0.05, 0.9, 0, 600, 0.2, 0.3, 0.3, 0.0, 78.5),
    "finetune-1k-pico": (2e-4, 0.3, 0.9, 0, 600, 0.2, 0.3, 0.3, 0.0, 80.3),
    "finetune-1k-nano": (2e-4, 0.3, 0.9, 0, 600, 0.2, 0.5, 0.5, 0.1, 81.9),
    "finetune-1k-tiny": (8e-4, 0.05, 0.9, 40, 300, 0.1, 0.8, 1.0, 0.2, 83.0),
    "finetune-1k-base": (6.25e-4, 0.05, 0.6, 20, 100, 0.1, 0.8, 1.0, 0.1, 84.9),  # table 11: 6.25e-3
    "finetune-1k-large": (6.25e-4, 0.05, 0.6, 20, 100, 0.1, 0.8, 1.0, 0.2, 85.8),  # likewise 6.25e-3
    "finetune-1k-huge": (1.25e-3, 0.05, 0.75, 10, 50, 0.1, 0.8, 1.0, 0.3, 86.3),
    "finetune-22k-nano": (2.5e-4, 0.05, 0.9, 5, 90, 0.1, 0.8, 1.0, 0.0, None),
    "finetune-22k-tiny": (2.5e-4, 0.05, 0.9, 5, 90, 0.1, 0.8, 1.0, 0.0, None),
    "finetune-22k-base": (2.5e-4, 0.05, 0.8, 5, 90, 0.1, 0.8, 1.0, 0.1, None),
    "finetune-22k-large": (2.5e-4, 0.05, 0.8, 5, 90, 0.1, 0.8, 1.0, 0.1, None),
    "finetune-22k-huge": (2.5e-4, 0.05, 0.8, 5, 90, 0.1, 0.8, 1.0, 0.3, None),
    "22k-to-1k-nano-224": (2.5e-5, 1e-8, 0.9, 0, 90, 0.1, 0.0, 0.0, 0.1, 82.1),
    "22k-to-1k-nano-384": (2.5e-5, 1e-8, 0.9, 0, 90, 0.1, 0.0, 0.0, 0.1, 83.4),
    "22k-to-1k-tiny-224": (2.5e-5, 1e-8, 0.9, 0, 90, 0.1, 0.0, 0.0, 0.1, 83.9),
    "22k-to-1k-tiny-384": (2.5e-5, 1e-8, 0.9, 0, 90, 0.1, 0.0, 0.0, 0.1, 85.1),
    "22k-to-1k-base-224": (2.5e-5, 1e-8, 0.8, 0, 30, 0.1, 0.0, 0.0, 0.2, 86.8),
    "22k-to-1k-base-384": (2.5e-5, 1e-8, 0.8, 0, 30, 0.1, 0.0, 0.0, 0.2, 87.7),
    "22k-to-1k-large-224": (2.5e-5, 1e-8, 0.8, 0, 30, 0.1, 0.0, 0.0, 0.3, 87.3),
    "22k-to-1k-large-384": (2.5e-5, 1e-8, 0.8, 0, 30, 0.1, 0.0, 0.0, 0.3, 88.2),
    "22k-to-1k-huge-384": (2.5e-5, 1e-8, 0.85, 0, 30, 0.1, 0.0, 0.0, 0.5, 88.7),
    "22k-to-1k-huge-512": (2.5e-5, 1e-8, 0.85, 0, 30, 0.1, 0.0, 0.0, 0.5, 88.9),
}
ACCURACY = {name: row[-1] for name, row in PAPER.items() if row[-1]}
PAPER = {name: row[:-1] for name, row in PAPER.items()}
GMACS = dict(atto=0.55, femto=0.78, pico=1.37, nano=2.45, tiny=4.47, base=15.4, large=34.4, huge=115)
GMACS_384 = dict(nano=7.21, tiny=13.1, base=45.2, large=101.1, huge=337.9)
# Numbers that the official code hands over on its command line or has as defaults, the same in every published recipe.
OFFICIAL = {
    "opt": "adamw", "opt_betas": [0.9, 0.999], "opt_eps": 1e-8, "sched": "cosine", "sched_on_updates": True,
    "lr_base_size": 256, "lr_base_scale": "linear", "min_lr": 1e-6, "warmup_lr": 0.0, "warmup_prefix": True,
    "aa": "rand-m9-mstd0.5-inc1", "color_jitter": None, "train_interpolation": "bicubic", "interpolation": "bicubic",
    "reprob": 0.25, "remode": "pixel", "head_init_scale": 0.001, "model_ema_decay": 0.9999, "workers": 10,
    "pin_mem": True, "checkpoint_hist": 3, "amp": True, "pretrained": True, "device_modules": ["timm_convnextv2"],
}  # fmt: skip
# Options of timm 1.0.31's train.py that recipes use.
TRAIN_OPTIONS = {
    *OFFICIAL, *COLUMNS, "amp_dtype", "batch_size", "clip_grad", "cooldown_epochs", "crop_pct", "device",
    "grad_accum_steps", "hflip", "img_size", "layer_decay_no_opt_scale", "log_interval", "mixup_off_epoch",
    "mixup_prob", "mixup_switch_prob", "model_ema", "model_ema_warmup", "no_prefetcher", "num_classes", "ratio",
    "scale", "seed", "val_split", "warmup_epochs",
} - {"warmup"}  # fmt: skip


def load(name):
    return yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))


def header(name):
    return [line[1:].strip() for line in RECIPES[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()]


def field(name, key):
    return next(line.partition(": ")[2] for line in header(name) if line.startswith(f"{key}: "))


def size_of(name):
    general = "tiny" if name in ("small-data", "scratch-small") else "base"
    return next((size for size in GMACS if size in name.split("-")), general)


def official_lr(epoch, *, lr, min_lr, warmup, epochs):
    """`adjust_learning_rate` of the official utils.py, at a fractional epoch."""
    if epoch < warmup:
        return lr * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def test_there_are_the_published_recipes_and_general_ones():
    assert set(RECIPES) == set(PAPER) | GENERAL


@pytest.mark.parametrize("name", sorted(PAPER))
def test_values_are_the_papers(name):
    recipe = load(name)
    expected = dict(zip(COLUMNS, PAPER[name], strict=True))
    expected["warmup_epochs"] = expected.pop("warmup")
    expected["epochs"] -= expected["warmup_epochs"]
    # table 12 and, for huge, table 13 have no moving average
    ema = not name.startswith("finetune-22k") and not name.startswith("22k-to-1k-huge")
    expected |= {**OFFICIAL, "model_ema": ema, "num_classes": 21841 if name.startswith("finetune-22k") else 1000}
    if not ema:
        del expected["model_ema_decay"]
    size = int(name.split("-")[-1]) if name.startswith("22k-to-1k") else 384 if name == "finetune-22k-huge" else 224
    expected |= {"img_size": size, "crop_pct": 0.875 if size == 224 else 1.0}
    assert {k: recipe.get(k) for k in expected} == expected
    batch = 512 if name.startswith("22k-to-1k") else 4096 if name.startswith("finetune-22k") else 1024
    assert recipe["batch_size"] * recipe["grad_accum_steps"] * PROCESSES == batch
    assert field(name, "Global batch") == str(batch)


@pytest.mark.parametrize("name", sorted(PAPER))
@pytest.mark.parametrize("updates_per_epoch", [1, 7])
def test_learning_rate_is_the_official_one_at_every_update(name, updates_per_epoch):
    recipe = load(name)
    lr, _, _, warmup, epochs, *_ = PAPER[name]
    lr *= 4
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 0.5}], lr=lr)
    how = scheduler_kwargs(argparse.Namespace(**recipe))
    scheduler, total = create_scheduler_v2(optimizer, **how, updates_per_epoch=updates_per_epoch)
    assert total == epochs
    for update in range(epochs * updates_per_epoch):
        if update:  # as train.py: the first update has the rate that the scheduler begins with
            scheduler.step_update(update)
        expected = official_lr(update / updates_per_epoch, lr=lr, min_lr=1e-6, warmup=warmup, epochs=epochs)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected, expected / 2], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_keys_and_types(name):
    recipe = load(name)
    assert set(recipe) <= TRAIN_OPTIONS
    assert "model" not in recipe and "data_dir" not in recipe
    for key, value in recipe.items():
        # train.py does not convert what a config sets, and YAML reads 1e-6 as a word
        assert not (isinstance(value, str) and re.fullmatch(r"[\d.e+-]+", value)), key


@pytest.mark.timm_train
def test_train_script_knows_every_key(timm_train):
    train = load_script("train.py", str(timm_train))
    known = vars(train.parser.parse_args([]))
    assert set(known) >= TRAIN_OPTIONS
    for name in RECIPES:
        for key, value in load(name).items():
            kind = (type(known[key]), int, *[float] * isinstance(known[key], int))
            assert known[key] is None or value is None or isinstance(value, kind), key
        train.parser.set_defaults(**load(name))
        train.parser.parse_args([])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_header_states_source_cost_and_accuracy(name):
    lines = header(name)
    assert 20 < len(lines[0]) < 120 and lines[1] == ""
    assert all(len(line) <= 120 for line in RECIPES[name].read_text(encoding="utf-8").splitlines())
    assert field(name, "Source") and field(name, "Cost") and field(name, "Expect")
    if name in ACCURACY:
        assert field(name, "Expect").startswith(f"{ACCURACY[name]} % top-1")


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"smoke"}))
def test_cost_is_what_the_arithmetic_gives(name):
    recipe, cost = load(name), field(name, "Cost")
    pattern = r"([\d,]+) images x (\d+) epochs x (\d) x ([\d.]+) GMACs x 2 / \(0.4 x 312 TFLOP/s\) = ([\d.,]+) A100"
    images, epochs, passes, gmacs, hours = (float(x.replace(",", "")) for x in re.match(pattern, cost).groups())
    imagenet = name in ACCURACY or name == "linear-probe"
    assert images == (1_281_167 if imagenet else 14_197_122 if "22k" in name else 10_000)
    assert epochs == recipe["epochs"] + recipe["warmup_epochs"]
    assert passes == (1 if name == "linear-probe" else 3)
    table = {512: {"huge": 600.8}, 384: GMACS_384}.get(recipe.get("img_size"), GMACS)
    assert gmacs == table[size_of(name)]
    assert hours == pytest.approx(images * epochs * passes * gmacs * 1e9 * 2 / (0.4 * 312e12) / 3600, abs=0.051)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_is_not_the_papers_is_marked(name):
    text = RECIPES[name].read_text(encoding="utf-8")
    if "none of the values below is from the paper" in text:
        return
    paper = dict(zip(COLUMNS, PAPER.get(name, PAPER["finetune-1k-tiny"]), strict=True)) | OFFICIAL
    if name in PAPER:
        paper["epochs"] -= paper["warmup"]
        paper |= {"warmup_epochs": paper["warmup"]}
        paper |= {k: load(name)[k] for k in ("model_ema", "batch_size", "grad_accum_steps", "crop_pct")}
    else:
        paper |= {"grad_accum_steps": 1, "model_ema": True}
    if name in ACCURACY:
        paper |= {"num_classes": 1000, "img_size": int(name[-3:]) if name[-3:].isdigit() else 224}
    if name == "finetune-22k-huge":
        paper |= {"img_size": 384}
    if name == "finetune-1k-large":
        del paper["lr_base"]  # table 11 has another number
    marked = set(re.findall(r"^(\w+): .*# not from the paper", text, re.M))
    assert {k for k, v in load(name).items() if k not in paper or paper[k] != v} <= marked


def test_head_starts_as_the_official_one():
    torch.manual_seed(0)
    head = timm.create_model("convnextv2_atto", num_classes=1000).get_classifier()
    with torch.no_grad():
        weight = head.weight * load("finetune-1k-atto")["head_init_scale"]
    assert weight.std().item() == pytest.approx(2e-5, rel=0.03) and not head.bias.any()


@pytest.mark.parametrize("name, resize, size", [("finetune-1k-base", 256, 224), ("22k-to-1k-base-384", 384, 384)])
def test_evaluation_crop(name, resize, size):
    recipe = load(name)
    how = {key: recipe[key] for key in ("crop_pct", "interpolation")}
    transform = create_transform((3, recipe["img_size"], recipe["img_size"]), **how)
    assert transform.transforms[0].size == resize and tuple(transform.transforms[1].size) == (size, size)
    assert transform.transforms[0].interpolation.value == "bicubic"


# of the stem: decay ** blocks where a layer is a block, decay ** 13 where it is a group
@pytest.mark.parametrize("size, power", [*zip(GMACS, (12, 12, 12, 14, 18, 13, 13, 13), strict=True)])
def test_stem_learns(size, power):
    recipe = load(f"finetune-1k-{size}")
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{size}")
    groups = param_groups_layer_decay(model, layer_decay=recipe["layer_decay"])
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}[id(model.stem[0].weight)]
    assert scale == pytest.approx(recipe["layer_decay"] ** power) and scale > 1e-3


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny", "convnextv2_base"])
def test_linear_probe_trains_the_classifier_and_nothing_else(name):
    model = timm.create_model(name, num_classes=3, depths=(1, 1, 4, 1), dims=(8, 8, 16, 16))
    recipe = argparse.Namespace(**load("linear-probe"), lr=0.1, momentum=0.9)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(recipe))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):  # the bias of head.norm begins at zero, and moves once head.fc is not
        model(torch.randn(4, 3, 64, 64)).logsumexp(1).sum().backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    assert {k for k, p in model.named_parameters() if p.requires_grad} == changed
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}


def test_list_recipes(capsys):
    assert main(["--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in helpers.RECIPES.glob("*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


def test_recipe_and_its_header(recipe_file):
    recipe = load_recipe("finetune-1k-tiny", helpers.RECIPES)
    assert recipe.path == helpers.RECIPES / "finetune-1k-tiny.yaml" and recipe.name == "finetune-1k-tiny"
    assert recipe.description == "ConvNeXt V2 tiny: finetune on ImageNet-1K at 224 px after FCMAE pretraining"
    assert recipe.global_batch == 1024 and recipe.values["pretrained"] and recipe.values["epochs"] == 260
    scratch = recipe.evolve(pretrained=False)
    assert scratch.values == {**recipe.values, "pretrained": False} and scratch.path == recipe.path
    path = recipe_file(epochs=3)
    path.write_text(f"# Mine\n\n# Global batch: 2,048\n{path.read_text()}# Global batch: 7\n")
    mine = load_recipe(str(path), helpers.RECIPES)
    assert (mine.name, mine.description, mine.global_batch, mine.values) == ("mine", "Mine", 2048, {"epochs": 3})


def test_unknown_recipe_lists_all(refused):
    message = refused(recipe="finetune-1k-tinny")
    assert "Did you mean 'finetune-1k-tiny'?" in message and all(n in message for n in RECIPES)


@pytest.mark.parametrize(
    "text, words", [("", "NoneType"), ("- a\n", "list"), ("a: [", "cannot be read"), (None, "none")]
)
def test_recipe_file_that_is_none(refused, tmp_path, text, words):
    path = tmp_path / "none.yaml"
    if text is not None:
        path.write_text(text)
    assert words in refused(recipe=path)
