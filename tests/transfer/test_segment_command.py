"""`timm-convnextv2 segment`: from a folder of images and masks to measures and masks; recipes; what it refuses."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_same, torchrun
from PIL import Image
from tiny import BACKBONE, SEGMENTER

from timm_convnextv2.commands.main import main
from timm_convnextv2.commands.segment import COMMAND
from timm_convnextv2.config import flat
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.recipes import load_recipe, recipe_names
from timm_convnextv2.runs.summary import read_rows
from timm_convnextv2.transfer import find_classes, open_segmenter
from timm_convnextv2.transfer import task as transfer_task
from timm_convnextv2.transfer.segmentation.masks import MaskedImages, open_split, read_classes
from timm_convnextv2.transfer.segmentation.metrics import Inference, evaluate_segmenter

SMALL = [*BACKBONE, *SEGMENTER, "--img-size", "32", "-b", "4", "-j", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("segment") / "data", size=32, train=8, validation=8, masks=True)


def train(data, output, *more, code=0):
    words = ["segment", "train", *SMALL, "--data-dir", data, "--output", output, "--experiment", "run", *more]
    assert main([str(word) for word in words]) == code
    return output / "run"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("output"), "--epochs", 2, "--model-ema")


def test_what_training_writes(run, data):
    rows = read_rows(run / "summary.csv")[0]
    assert len(rows) == 2 and 0 <= float(rows[1]["eval_miou"]) <= 1
    assert {"train_loss_seg", "train_loss_aux", "eval_accuracy", "eval_mean_accuracy"} <= rows[0].keys()
    for name in (
        "args.yaml",
        "last.pth.tar",
        "predictions/epoch-0001.png",
        "predictions/epoch-0002.png",
        "report.html",
    ):
        assert (run / name).stat().st_size, name
    assert "mIoU" in (run / "report.html").read_text()
    model, classes = open_segmenter(run), read_classes(data / "classes.txt")
    assert model.classes == classes
    average = torch.load(run / "last.pth.tar", weights_only=True)["state_dict_ema"]
    assert_same(dict(model.state_dict()), dict(average))
    measured = evaluate_segmenter(model, MaskedImages(*open_split(data, "validation"), classes))[0]
    assert measured == json.loads((run / "model/config.json").read_text())["metrics"]
    assert measured["miou"] == pytest.approx(float(rows[1]["eval_miou"]), abs=1e-4)


def test_the_snippet_of_the_card_runs(run, data, monkeypatch):
    snippet = (run / "model/README.md").read_text().split("```python\n")[1].split("```")[0]
    image = next((data / "validation/images").iterdir())
    names = {}
    exec(snippet.replace("path/to/this/folder", str(run / "model")).replace("IMAGE", str(image)), names)
    assert names["classes"].shape == (32, 32) and len(snippet.strip().splitlines()) <= 6


def test_eval_and_predict_agree(run, data, tmp_path, capsys):
    common = ["--model", str(run / "model"), "-j", "0", "--device", "cpu", "--window", "24", "--flip"]
    words = ["segment", "eval", *common, "--data-dir", str(data), "--output", str(tmp_path / "eval")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "mIoU" in out and "mean accuracy" in out
    measures = json.loads((tmp_path / "eval/metrics.json").read_text())
    images = data / "validation/images"
    assert main(["segment", "predict", *common, "--images", str(images), "--output", str(tmp_path / "masks")]) == 0
    model, inference = open_segmenter(run), Inference(window=24, flip=True)
    hits = pixels = 0
    for path in sorted((tmp_path / "masks").glob("*.png")):
        with Image.open(path) as mask, Image.open(data / "validation/masks" / path.name) as truth:
            assert mask.mode == "P"
            found, true = np.array(mask), np.array(truth)
        image = torch.from_numpy(np.array(Image.open(images / path.name))).permute(2, 0, 1)
        assert np.array_equal(found, find_classes(model, image, inference).numpy())
        hits, pixels = hits + (found == true).sum(), pixels + true.size
    assert pixels == 8 * 32 * 32 and measures["accuracy"] == pytest.approx(hits / pixels)
    assert read_classes(tmp_path / "masks/classes.txt") == model.classes == list(measures["iou"])
    assert main(words) == 2
    assert "is not empty. Pass --overwrite" in capsys.readouterr().err


def test_resume_is_bit_identical(data, tmp_path):
    """A run of three epochs, of one update of two steps each, that a signal stops after the first evaluation."""
    more = ("--updates", 3, "--sched", "cosine", "--grad-accum-steps", 2, "--drop-path", 0.2)
    whole = torch.load(train(data, tmp_path / "whole", *more) / "last.pth.tar", weights_only=True)
    original = transfer_task.evaluate_epoch

    def signalled(*args, world, **kwargs):
        world.stop = "SIGTERM"
        return original(*args, world=world, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_task, "evaluate_epoch", signalled)
        train(data, tmp_path / "parts", *more)
    parts = tmp_path / "parts/run/last.pth.tar"
    assert torch.load(parts, weights_only=True)["progress"]["epoch"] == 2
    train(data, tmp_path / "parts", *more, "--resume", "auto")
    again = torch.load(parts, weights_only=True)
    assert_same(whole["state_dict"], again["state_dict"])
    assert_same(whole["optimizer"], again["optimizer"])


def test_a_dry_run_checks_and_writes_nothing(data, tmp_path, capsys):
    train(data, tmp_path, "--dry-run", "--recipe", "small-data", "--frozen")
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "8 images of 9 classes, 8 to validate; 200 updates of 4 images" in out
    assert "the recipe small-data is for 8 images per update, this run has 4" in out


@pytest.mark.parametrize(
    "more, said",
    [
        (["-b", "1"], "--batch-size must be at least 2, got 1"),
        (["--recipe", "smal-data"], "Did you mean 'small-data'"),
        (["--resume", "auto", "--experiment", ""], "--resume auto needs --experiment"),
        (["--window", "8", "--stride", "9"], "--stride is 9, expected 1 to --window, which is 8"),
        (["--classes", "absent.txt"], "class names 'absent.txt' cannot be read"),
        (["--ignore-index", "3"], "ignore index 3 is the index of the class"),
        (["--in-chans", "4"], "None of 8 images tried (of 8) can be read"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes_are_one_message_and_nothing_is_written(data, tmp_path, capsys, more, said):
    train(data, tmp_path, *more, code=2)
    err = capsys.readouterr().err
    assert said in err and err.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_masks_are_checked_before_training(data, tmp_path, capsys):
    copy = write_folder(tmp_path / "data", size=32, train=8, validation=8, masks=True)
    Image.new("L", (9, 9)).save(copy / "validation/masks/00001.png")
    train(copy, tmp_path / "output", code=2)
    assert "1 of 8 masks have another size than their images: " in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_another_list_of_classes_than_the_models(run, data, tmp_path, capsys):
    names = read_classes(data / "classes.txt")
    (tmp_path / "other.txt").write_text("\n".join([names[0], names[2], names[1], *names[3:]]))
    words = ["segment", "eval", "--model", str(run), "--data-dir", str(data), "--classes", str(tmp_path / "other.txt")]
    assert main([*words, "-j", "0"]) == 2
    err = capsys.readouterr().err
    assert f"order differs at 2 indices: 1 ('{names[2]}' and '{names[1]}')" in err and "(9)" in err


@pytest.mark.parametrize("name", recipe_names(COMMAND.recipes))
def test_recipes_are_options(name):
    recipe = load_recipe(name, COMMAND.recipes)
    config = flat(COMMAND.parse(["train", "--recipe", name, "--data-dir", "x", "--lr", "5"])[1])
    assert config.items() >= (recipe.values | {"lr": 5}).items()
    assert recipe.global_batch and recipe.description
    if name.startswith("upernet"):  # the paper's appendix A.4
        assert config.items() >= dict(updates=160000, weight_decay=0.05, img_size=512, sched="poly").items()
        assert recipe.global_batch == 16 and 0.1 <= config["drop_path"] <= 0.4 and config["layer_decay"] in (0.8, 0.9)


@pytest.mark.slow
def test_two_processes(run, data, tmp_path):
    """They train together, share the images of the evaluation, and count each once."""
    words = [*SMALL, "-b", "2", "--epochs", "1", "--data-dir", data, "--output", tmp_path, "--experiment", "run"]
    done = torchrun("-m", "timm_convnextv2", "segment", "train", *words)
    assert done.returncode == 0, done.stderr
    assert "2 updates of 4 images" in done.stdout and done.stdout.count("mIoU") == 1
    model, classes = open_segmenter(tmp_path / "run"), read_classes(data / "classes.txt")
    measured = evaluate_segmenter(model, MaskedImages(*open_split(data, "validation"), classes))[0]
    assert measured == json.loads((tmp_path / "run/model/config.json").read_text())["metrics"]
    done = torchrun("-m", "timm_convnextv2", "segment", "train", *words, "--experiment", "two", "--ignore-index", "3")
    assert done.returncode and done.stderr.count("error: The ignore index 3") == 1


@pytest.mark.slow
def test_it_memorises_eight_images(tmp_path):
    data = write_folder(tmp_path / "data", size=64, train=8, validation=8, masks=True)
    (data / "validation").rename(data / "other")
    (data / "train").rename(data / "validation")
    (data / "train").symlink_to(data / "validation")
    more = ["--model-kwargs", "depths=(1,1,1,1)", "dims=(16,24,32,40)", "patch_size=2", "--channels", 64, "-b", 8]
    more += ["--img-size", 64, "--scale", 1, 1, "--no-colours", "--hflip", 0, "--lr", 1e-2, "--weight-decay", 0]
    more += ["--epochs", 180, "--warmup-updates", 20, "--clip-grad", 1, "--eval-interval", 180]
    train(data, tmp_path, *more)
    assert float(read_rows(tmp_path / "run/summary.csv")[0][-1]["eval_miou"]) > 0.9
