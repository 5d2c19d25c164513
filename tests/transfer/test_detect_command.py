"""The command detect: from images and annotations to AP, resumed, measured, used; mistakes are one message."""

import json
import re
import shutil

import pytest
import torch
import yaml
from encoders import make_encoder
from helpers import ROOT, assert_same, torchrun
from tiny import FAST

from timm_convnextv2.commands.detect import COMMAND, main
from timm_convnextv2.commands.main import main as cli
from timm_convnextv2.config import flat
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.recipes import load_recipe, recipe_names
from timm_convnextv2.runs.summary import read_rows
from timm_convnextv2.runs.trainer import Trainer
from timm_convnextv2.transfer.detection.coco import open_coco

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")

PAGE = (ROOT / "docs/transfer.md").read_text()
TINY = ["--img-size", "32", "-b", "4", "--out-channels", "8", "-j", "0", "--device", "cpu", "--warmup-updates", "2"]
TINY += ["--shown-images", "1", "--detector-kwargs", *(f"{k}={v}" for k, v in FAST.items())]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "d", size=32, train=8, validation=8, coco=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, patch_size=4, dims=[8, 12, 16, 20])
    return f"local-dir:{folder}"


@pytest.fixture
def command(data, encoder, tmp_path):
    def words(*more, experiment="run", place=data):
        where = ["--data-dir", str(place), "--output", str(tmp_path), "--experiment", experiment]
        return ["train", "--model", encoder, *where, *TINY, "--epochs", "2", *map(str, more)]

    return words


def test_from_images_to_average_precision(command, data, tmp_path, capsys):
    assert main(command("--layer-decay", "0.9", "--model-ema", "--decay-epochs", "1")) == 0
    run = tmp_path / "run"
    out = capsys.readouterr().out
    assert "8 images with 8 objects of 8 classes, 8 to validate; 4 updates of 4 images" in out
    assert "ap50" in out and f"Done: the model is in {run / 'model'}" in out
    rows = read_rows(run / "summary.csv")[0]
    assert len(rows) == 2 and {"eval_box_ap", "eval_mask_ar_large", "train_loss_mask"} <= rows[1].keys()
    assert sorted(p.name for p in (run / "predictions").iterdir()) == [
        "epoch-0001.png", "epoch-0002.png", "validation.json",
    ]  # fmt: skip
    assert not list(run.glob(".*"))  # the lock is given back
    page = (run / "report.html").read_text()
    assert "Box AP" in page and page.count('data-epoch="') == 2 and "detect eval --model" in page
    assert cli(["report", str(run)]) == 0

    (snippet,) = re.findall(r"```python\n(.*?open_detector.*?)```", PAGE, flags=re.S)
    names = {}
    exec(snippet.replace("output/boxes", str(run)).replace("DATA/", f"{data}/"), names)
    assert names["found"].keys() == {"boxes", "labels", "scores", "masks"}

    words = ["--model", str(run / "model"), "--device", "cpu", "-j", "0"]
    assert main(["eval", *words, "--data-dir", str(data), "--output", str(tmp_path / "measured")]) == 0
    metrics = json.loads((tmp_path / "measured/metrics.json").read_text())
    assert {f"eval_{k}": str(v) for k, v in metrics.items()} == {k: v for k, v in rows[1].items() if "eval_" in k}
    assert main(["eval", *words, "--data-dir", str(data), "--soft-nms", "gaussian"]) == 0
    found = tmp_path / "found.json"
    words += ["--images", str(data / "validation/images"), "--output", str(found), "--min-score", "0"]
    assert main(["predict", *words]) == 0
    coco = open_coco(found, data / "validation/images", in_chans=3, drop_wrong=True)  # what it writes, it reads
    assert len(coco.images) == 8 and coco.images[0].height == 32
    assert main(["predict", *words]) == 2 and "exists. Pass --overwrite" in capsys.readouterr().err
    assert main(["predict", *words, "--overwrite", "--device", "tpu9"]) == 2
    assert capsys.readouterr().err.startswith("timm-convnextv2 detect predict: error: ")


def test_a_run_resumes_bit_for_bit(command, tmp_path, monkeypatch):
    """Interrupted after an update of the first epoch."""
    options = ["--boxes-only", "--eval-interval", "9"]
    assert main(command(*options, experiment="whole")) == 0
    original = Trainer.update

    def interrupted(self, *args):
        found = original(self, *args)
        self.world.stop = "SIGTERM"
        return found

    monkeypatch.setattr(Trainer, "update", interrupted)
    assert main(command(*options)) == 0
    monkeypatch.undo()
    assert main(command(*options, "--resume", "auto")) == 0
    whole, parts = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("whole", "run"))
    assert whole["progress"]["epoch"] == 2
    for key in ("state_dict", "optimizer"):
        assert_same(whole[key], parts[key])


def broken(data, tmp_path, change):
    """The data with another train.json; images are linked."""
    shutil.copytree(data, tmp_path / "broken")
    path = tmp_path / "broken" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return tmp_path / "broken"


def _move(content):
    content["annotations"][0]["bbox"][0] += 100


def _widen(content):
    content["images"][0]["width"] += 1
    content["annotations"][0].pop("segmentation")
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]


def _rename(content):
    content["categories"][0]["name"] = "dog"


def _empty(content):
    content["annotations"].clear()


@pytest.mark.parametrize(
    "change, options, message",
    [
        (_move, [], "has 1 boxes that reach outside of their image: annotation 1 of 00000.png"),
        (_rename, [], "The classes of '"),
        (_empty, [], "has no annotations: there is nothing to learn"),
        (None, ["--model", "convnextv2_ato"], "Did you mean 'convnextv2_atto'?"),
        (None, ["--recipe", "small-dat"], "--recipe small-dat is unknown. Did you mean 'small-data'?"),
        (None, ["--batch-size", "9"], "the largest --batch-size that works is 8"),
        (None, ["--grad-accum-steps", "3"], "An update takes 3 batches, but an epoch has 2"),
        (
            _widen,
            [],
            "(of 8 tried): 00000.png has 32 x 32 pixels, annotated as 33 x 32",
        ),
        (None, ["--eval-interval", "0"], "--eval-interval must be at least 1, got 0."),
        (None, ["--scale", "2", "1"], "--scale 2 1: expected two factors above 0, the smaller one first"),
        (None, ["--resume", "auto", "--experiment", ""], "--resume auto needs --experiment"),
        (None, ["--device", "tpu9"], "tpu9"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_written(command, data, tmp_path, capsys, change, options, message):
    place = broken(data, tmp_path, change) if change else data
    assert main(command(*options, place=place)) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_missing_evaluator_is_named(command, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    assert main(command()) == 2
    assert "pip install 'timm_convnextv2[detect]'" in capsys.readouterr().err


def test_another_model_does_not_resume(command, capsys):
    assert main(command("--boxes-only", "--epochs", "1", "--eval-interval", "9")) == 0
    assert main(command("--epochs", "1", "--resume", "auto")) == 2
    assert "differs in boxes_only: True there, False here" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(command, tmp_path):
    done = torchrun("-m", "timm_convnextv2", "detect", *command("--batch-size", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done: the model is in") == 1
    assert len(json.loads((tmp_path / "run/predictions/validation.json").read_text())) > 0


@pytest.mark.parametrize("name", recipe_names(COMMAND.recipes))
def test_recipes(name):
    recipe = load_recipe(name, COMMAND.recipes)
    config = flat(COMMAND.parse(["train", "--model", "x", "--data-dir", "y", "--recipe", name])[1])
    for key, value in recipe.values.items():
        assert config[key] == value, key
    header = recipe.path.read_text()
    for part in ("# Source:", "# Global batch:", "# Cost:", "# Expect:"):
        assert part in header
    if name.startswith("mask-rcnn"):  # appendix A.3
        values = dict(epochs=36, lr=1e-4, weight_decay=0.05, decay_epochs=[27, 33], warmup_updates=1000, img_size=1024)
        assert recipe.values.items() >= (values | dict(scale=[0.1, 2.0])).items()
        assert config["layer_decay"] in (0.9, 0.95) and 0.2 <= config["drop_path"] <= 0.5 and recipe.global_batch == 32


def test_options_win_over_the_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(epochs=7, amp=True, scale=[0.5, 1], clip_grad=None)))
    words = ["train", "--data-dir", "y", "--recipe", str(tmp_path / "mine.yaml"), "--epochs", "9", "--no-amp"]
    config = COMMAND.parse(words)[1]
    assert (config.learning.epochs, config.compute.amp, config.crops.scale) == (9, False, (0.5, 1.0))
    assert config.learning.clip_grad is None
    (tmp_path / "mine.yaml").write_text("epoch: 7")
    with pytest.raises(ValueError, match="--recipe mine: unknown option 'epoch'. Did you mean 'epochs'?"):
        COMMAND.parse(words)


def test_the_console_knows_it(capsys):
    assert cli(["detect", "train", "--list-recipes", "--data-dir", "x"]) == 0
    assert "mask-rcnn-base" in capsys.readouterr().out
    assert 'transfer/recipes/*/*.yaml"' in (ROOT / "pyproject.toml").read_text()
