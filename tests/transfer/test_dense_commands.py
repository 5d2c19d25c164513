"""The commands detect and segment: from images to metrics, resumed, measured, used; mistakes are one message."""

import io
import json
import pickle
import re
import shlex
import shutil
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from encoders import make_encoder
from helpers import ROOT, assert_same, torchrun
from PIL import Image
from tiny import BACKBONE, SHORT, TASKS, tiny_detector, train

from timm_convnextv2.commands import detect, segment
from timm_convnextv2.commands.main import main
from timm_convnextv2.config import flat
from timm_convnextv2.console import invocation
from timm_convnextv2.data import load_image
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.data.formats.errors import ImageError, MissingPackageError, UnreadableError, naming
from timm_convnextv2.files import read_rows
from timm_convnextv2.recipes import load_recipe, recipe_names
from timm_convnextv2.runs.trainer import Trainer
from timm_convnextv2.transfer import export_detector, find_classes, open_segmenter
from timm_convnextv2.transfer.config import Averaging
from timm_convnextv2.transfer.detection.coco import open_coco
from timm_convnextv2.transfer.loop import Samples
from timm_convnextv2.transfer.segmentation.masks import read_classes

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")

COMMANDS = {"detect": detect.COMMAND, "segment": segment.COMMAND}
COLUMNS = {
    "detect": {"eval_box_ap", "eval_mask_ar_large", "train_loss_mask"},
    "segment": {"eval_miou", "eval_accuracy", "eval_mean_accuracy", "train_loss_seg", "train_loss_aux"},
}
FILES = {"args.yaml", "last.pth.tar", "report.html", "predictions/epoch-0001.png", "predictions/epoch-0002.png"}
CPU = ["-j", "0", "--device", "cpu"]
PAGE = (ROOT / "docs/transfer.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("d") / "d", size=32, train=8, validation=8, coco=True, masks=True)


@pytest.fixture(scope="module", params=TASKS)
def run(request, data, tmp_path_factory):
    """A run of two epochs of a task, and what it printed."""
    folder, task = tmp_path_factory.mktemp(request.param), request.param
    make_encoder(folder, patch_size=4, dims=[8, 12, 16, 20])
    wandb = MagicMock()
    words = ["--layer-decay", "0.9", "--model-ema", "--shown-images", "1", "--log-wandb", "--wandb-project", "mine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        train(task, data, folder, *words, start=["--model", f"local-dir:{folder}"])
    assert wandb.init.call_args.kwargs["project"] == "mine" and wandb.log.call_count == 2
    return types.SimpleNamespace(task=task, path=folder / "run", printed=printed.getvalue())


def test_a_run_writes_its_results(run):
    rows = read_rows(run.path / "summary.csv")[0]
    assert len(rows) == 2 and COLUMNS[run.task] <= rows[1].keys()
    more = {"predictions/validation.json"} if run.task == "detect" else set()
    assert all((run.path / name).stat().st_size for name in FILES | more)
    assert not list(run.path.glob(".*"))  # the lock is given back
    assert re.search(r"^(Box AP|mIoU) was highest after epoch [12] \(", run.printed, flags=re.M | re.I)
    predict = shlex.join([*invocation(run.task), "predict", "--model", str(run.path / "model")])
    assert predict in run.printed
    page = (run.path / "report.html").read_text()
    assert page.count('data-epoch="') == 2 and f"{run.task} eval --model" in page
    assert main(["report", str(run.path)]) == 0


def test_eval_repeats_the_metrics_of_the_run(run, data, tmp_path, capsys):
    words = [run.task, "eval", "--model", str(run.path), "--data-dir", str(data), "--output", str(tmp_path / "e"), *CPU]
    assert main(words) == 0
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    shown, metric = capsys.readouterr().out, metrics[COMMANDS[run.task].task.main_metric[1]]
    name = "ap" if run.task == "detect" else "mIoU"
    assert re.search(rf"^{name} +{metric:.3f}", shown, re.M)  # the unit of summary.csv
    row = {k: float(v) for k, v in read_rows(run.path / "summary.csv")[0][1].items() if k.startswith("eval_")}
    assert {f"eval_{k}": v for k, v in metrics.items() if not isinstance(v, dict)} == pytest.approx(row, abs=1e-4)
    assert (tmp_path / "e/predictions.json").exists() is (run.task == "detect")
    assert main(words) == 2 and "is not empty. Pass --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--device", "tpu9"]) == 2
    assert capsys.readouterr().err.startswith(f"timm-convnextv2 {run.task} eval: error: ")
    if run.task == "segment":
        names = read_classes(data / "classes.txt")
        (tmp_path / "other.txt").write_text("\n".join([names[0], names[2], names[1], *names[3:]]))
        assert main([*words, "--overwrite", "--classes", str(tmp_path / "other.txt")]) == 2
        err = capsys.readouterr().err
        assert f"order differs at 2 indices: 1 ('{names[2]}' and '{names[1]}')" in err and "(9)" in err


def test_predict(run, data, tmp_path, capsys):
    images, output = data / "validation/images", tmp_path / "found"
    words = [run.task, "predict", "--model", str(run.path), "--data-dir", str(images), "--output", str(output), *CPU]
    if run.task == "detect":
        assert main([*words, "--min-score", "0", "--soft-nms", "gaussian"]) == 0
        coco = open_coco(output, images, drop_wrong=True)  # what it writes, it reads
        assert len(coco.images) == 8 and coco.images[0].height == 32
        assert main(words) == 2 and "exists. Pass --overwrite" in capsys.readouterr().err
        return
    assert main([*words, "--window", "24", "--flip"]) == 0
    model, how, (mask, *others) = open_segmenter(run.path), Averaging(window=24, flip=True), output.glob("*.png")
    assert Image.open(mask).mode == "P"
    expected = find_classes(model, load_image(images / mask.name), how)
    assert np.array_equal(np.array(Image.open(mask)), expected.numpy())
    assert len(others) == 7 and read_classes(output / "classes.txt") == model.classes
    average = torch.load(run.path / "last.pth.tar", weights_only=True)["state_dict_ema"]
    assert_same(dict(model.state_dict()), dict(average))


def test_predict_skips_what_it_cannot_read(run, data, tmp_path, capsys):
    """Names it, goes on, and returns 1; results have the paths below the folder."""
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(data / "validation/images/00001.png", tmp_path / "in" / folder / "0.png")
    (tmp_path / "in/torn.png").write_bytes(b"torn")
    words = [run.task, "predict", "--model", str(run.path), "--data-dir", str(tmp_path / "in"), *CPU, "-j", "2"]
    output, draw = tmp_path / "found", tmp_path / "drawn"
    assert main([*words, "--output", str(output), "--draw", str(draw)]) == 1
    out, err = capsys.readouterr()
    assert "; 1 image skipped" in out and err.startswith("skipped: ") and "torn.png: cannot be decoded" in err
    assert err.count("\n") == 1
    assert sorted(str(path.relative_to(draw)) for path in draw.rglob("*.png")) == ["a/0.png.png", "b/0.png.png"]
    if run.task == "detect":
        content = json.loads(output.read_text())
        assert [image["file_name"] for image in content["images"]] == ["a/0.png", "b/0.png"]
        assert all(found["score"] >= 0.3 for found in content["annotations"])
    else:
        assert sorted(str(path.relative_to(output)) for path in output.rglob("*.png")) == ["a/0.png", "b/0.png"]
    assert main([*words, "--output", str(tmp_path / "none"), "--max-bad-images", "0.2"]) == 2
    assert "1 of 3 images cannot be decoded (--max-bad-images 0.2)" in capsys.readouterr().err


def test_the_snippets_run(run, data):
    """Those of the model card and of the page."""
    image, place = next((data / "validation/images").iterdir()), str(run.path / "model")
    card = (run.path / "model/README.md").read_text().split("```python\n")[1].split("```")[0]
    name = "boxes" if run.task == "detect" else "classes"
    opens = "open_detector" if run.task == "detect" else "open_segmenter"
    (page,) = re.findall(rf"```python\n([^`]*?{opens}.*?)```", PAGE, flags=re.S)
    for snippet in (card, page.replace(f"output/{name}/model", place).replace("DATA/", f"{data}/")):
        names = {}
        exec(snippet.replace("path/to/this/folder", place).replace("IMAGE", str(image)), names)
        found = names["found"]
        assert found.boxes.shape[1] == 4 and found.masks is not None if run.task == "detect" else len(found) == 32


@pytest.mark.parametrize("task, update", [("detect", 1), ("segment", 2)])
def test_a_run_resumes_bit_for_bit(task, update, data, tmp_path, monkeypatch):
    """Interrupted within an epoch of two updates, and after the second of three epochs of one."""
    more = ["--boxes-only"] if task == "detect" else ["--sched", "cosine", "--drop-path", "0.2", "--model-ema"]
    more += ["--eval-interval", "9", "--grad-accum-steps", update, "--epochs", 1 + update]
    whole = train(task, data, tmp_path / "whole", *more)
    original = Trainer.update

    def interrupted(self, batches, number):
        self.world.stop = "SIGTERM" * (number == update - 1)
        return original(self, batches, number)

    monkeypatch.setattr(Trainer, "update", interrupted)
    train(task, data, tmp_path / "parts", *more)
    monkeypatch.undo()
    parts = train(task, data, tmp_path / "parts", *more, "--resume", "auto")
    whole, parts = (torch.load(path / "last.pth.tar", weights_only=True) for path in (whole, parts))
    rows = read_rows(tmp_path / "parts/run/summary.csv")[0]
    metric = f"eval_{COMMANDS[task].task.main_metric[1]}"
    assert [row[metric] != "" for row in rows] == [False] * update + [True] and whole["progress"]["epoch"] == 1 + update
    for key in ("state_dict", "optimizer"):
        assert_same(whole[key], parts[key])
    train(task, data, tmp_path / "parts", *more, "--resume", "auto", "--layer-decay", "0.5", status=2)


@pytest.mark.parametrize("task, workers", [("detect", 0), ("segment", 2)])
def test_a_broken_image_ends_the_run_with_its_name(task, workers, data, tmp_path, capfd, monkeypatch):
    """In the second epoch; the run continues once the file is fixed."""
    more = [*(["--boxes-only"] if task == "detect" else []), "-b", "2", "--eval-interval", "9", "-j", workers]
    read, torn = Samples.__getitem__, tmp_path / "torn.png"
    torn.write_bytes(b"torn")

    def broken(self, key):
        images = self.data.coco.images if task == "detect" else self.data.source.paths
        before = images[3]
        if key == (1, 3):
            images[3] = before._replace(path=str(torn)) if task == "detect" else str(torn)
        try:
            return read(self, key)
        finally:
            images[3] = before

    monkeypatch.setattr(Samples, "__getitem__", broken)
    capfd.readouterr()
    run = train(task, data, tmp_path, *more, status=1)
    err = capfd.readouterr().err
    name = "The image 00003.png (id 4)" if task == "detect" else f"The image {torn} with its mask"
    assert f"error: {name} cannot be used: " in err and err.count("error:") == 1 and "Traceback" not in err
    assert "--experiment run --resume auto" in err
    progress = torch.load(run / "last.pth.tar", weights_only=True)["progress"]
    assert progress["epoch"] == 1 and f"last.pth.tar (after epoch 1, and update {progress['update']}" in err
    monkeypatch.undo()
    train(task, data, tmp_path, *more, "--resume", "auto")


def test_an_image_that_eval_cannot_read(data, tmp_path, capsys, monkeypatch):
    names = (data / "classes.txt").read_text().split()[1:]
    export_detector(tiny_detector(boxes_only=True, img_size=32), tmp_path, classes=names)

    def gone(*args):
        if torch.utils.data.get_worker_info() is not None:  # after the checks
            raise OSError("gone")
        return load_image(*args)

    monkeypatch.setattr("timm_convnextv2.transfer.detection.coco.load_image", gone)
    words = ["detect", "eval", "--model", str(tmp_path), "--data-dir", str(data), "-j", "2", "--device", "cpu"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err == "timm-convnextv2 detect eval: error: The image 00000.png (id 1) cannot be used: gone\n"


def test_what_is_no_fault_of_the_file():
    for error in (ImageError("is\ntorn"), OSError("gone")):
        with pytest.raises(UnreadableError, match="^x cannot be used: (is torn|gone)$"), naming("x"):
            raise error
    with pytest.raises(MissingPackageError), naming("x"):
        raise MissingPackageError("tifffile")
    error = pickle.loads(pickle.dumps(UnreadableError("Caught UnreadableError in worker\n  a: UnreadableError: x y\n")))
    assert str(error) == "x y"


@pytest.mark.parametrize(
    "task, what", [("detect", "8 images with 8 objects of 8 classes"), ("segment", "8 images of 9")]
)
def test_a_dry_run_checks_and_writes_nothing(task, what, data, tmp_path, tmp_path_factory, capsys):
    data = shutil.copytree(data, tmp_path_factory.mktemp("leak") / "d")
    shutil.copy(data / "train/images/00000.png", data / "validation/images/00000.png")
    train(task, data, tmp_path, "--dry-run", "--recipe", "small-data", "--frozen", "--epochs", "100")
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert what in out and "8 to validate; 200 updates of 4 images" in out
    assert "the recipe small-data is for 8 images per update, this run has 4" in out
    assert "warning: 1 validation image has the same bytes as a training image (8 compared with 8)" in out


MISTAKES = [
    ("detect", lambda file: file["annotations"][0].update(bbox=[99, 0, 9, 9]), [], "has 1 boxes that reach outside"),
    ("detect", lambda file: file["categories"][0].update(name="dog"), [], "The classes of '"),
    ("detect", lambda file: file["annotations"].clear(), [], "has no annotations"),
    ("detect", lambda file: file["images"][0].update(width=33), ["--boxes-only"], "(id 1) cannot be used: it has 32 x"),
    ("detect", None, ["--model", "convnextv2_ato"], "Did you mean 'convnextv2_atto'?"),
    ("detect", None, ["--batch-size", "9"], "the largest --batch-size that works is 8"),
    ("detect", None, ["--grad-accum-steps", "3"], "An update takes 3 batches, but an epoch has 2"),
    ("detect", None, ["--eval-interval", "0"], "--eval-interval must be at least 1, got 0."),
    ("detect", None, ["--scale", "2", "1"], "--scale 2 1: expected two factors above 0"),
    ("detect", None, ["--device", "tpu9"], "tpu9"),
    ("detect", "faster_coco_eval.core", [], "pip install 'timm_convnextv2[detect]'"),
    ("detect", "wandb", ["--log-wandb"], "pip install wandb"),
    ("segment", "wandb", ["--log-wandb"], "pip install wandb"),
    ("segment", None, ["-b", "1"], "--batch-size must be at least 2, got 1"),
    ("segment", None, ["--recipe", "smal-data"], "Did you mean 'small-data'"),
    ("segment", None, ["--resume", "auto", "--experiment", ""], "--resume auto needs --experiment"),
    ("segment", None, ["--window", "8", "--stride", "9"], "--stride is 9, expected 1 to --window, which is 8"),
    ("segment", None, ["--classes", "absent.txt"], "class names 'absent.txt' cannot be read"),
    ("segment", None, ["--ignore-index", "3"], "ignore index 3 is the index of the class"),
    ("segment", None, ["--in-chans", "4"], "None of 8 images tried (of 8) can be read"),
    ("segment", "a class", [], "1 of 10 classes have no pixel in train: unseen"),
    ("segment", "a mask", [], "1 of 8 masks have another size than their images: "),
]


@pytest.mark.parametrize("task, change, more, message", MISTAKES)
def test_mistakes_are_one_message_before_anything_is_written(
    task, change, more, message, data, tmp_path, capsys, monkeypatch
):
    if callable(change) or change in ("a mask", "a class"):
        data = shutil.copytree(data, tmp_path / "data")
        if change == "a class":
            (data / "classes.txt").write_text((data / "classes.txt").read_text() + "unseen\n")
        elif change == "a mask":
            Image.new("L", (9, 9)).save(data / "validation/masks/00001.png")
        else:
            content = json.loads((data / "train.json").read_text())
            change(content)
            (data / "train.json").write_text(json.dumps(content))
    elif change:
        monkeypatch.setitem(sys.modules, change, None)
    train(task, data, tmp_path / "output", *more, status=2)
    err = capsys.readouterr().err
    assert message in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "task, name", [(t, n) for t, command in COMMANDS.items() for n in recipe_names(command.recipes)]
)
def test_recipes_are_options(task, name):
    recipe = load_recipe(name, COMMANDS[task].recipes)
    config = flat(COMMANDS[task].parse(["train", "--recipe", name, "--data-dir", "x", "--lr", "5"])[1])
    assert config.items() >= (recipe.values | {"lr": 5}).items()
    assert recipe.global_batch and recipe.description
    if name.startswith("mask-rcnn"):  # the paper's appendix A.3
        fixed = dict(epochs=36, weight_decay=0.05, img_size=1024, sched="step", decay_epochs=[27, 33], scale=[0.1, 2.0])
        assert config["layer_decay"] in (0.9, 0.95) and 0.2 <= config["drop_path"] <= 0.5 and recipe.global_batch == 32
        assert recipe.values.items() >= fixed.items() and recipe.values["lr"] == 1e-4
    elif name.startswith("upernet"):  # appendix A.4
        assert config.items() >= dict(updates=160000, weight_decay=0.05, img_size=512, sched="poly").items()
        assert recipe.global_batch == 16 and 0.1 <= config["drop_path"] <= 0.4 and config["layer_decay"] in (0.8, 0.9)


def test_options_win_over_the_recipe(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(epochs=7, amp=True, scale=[0.5, 1], clip_grad=None)))
    words = ["train", "--data-dir", "y", "--recipe", str(tmp_path / "mine.yaml"), "--epochs", "9", "--no-amp"]
    config = detect.COMMAND.parse(words)[1]
    assert (config.learning.epochs, config.compute.amp, config.crops.scale) == (9, False, (0.5, 1.0))
    assert config.learning.clip_grad is None
    (tmp_path / "mine.yaml").write_text("epoch: 7")
    with pytest.raises(ValueError, match="--recipe mine: unknown option 'epoch'. Did you mean 'epochs'?"):
        detect.COMMAND.parse(words)
    assert main(["detect", "train", "--list-recipes", "--data-dir", "x"]) == 0
    assert "mask-rcnn-base" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes(task, data, tmp_path):
    """They train together, share the images of the evaluation, and count each once."""
    place = ["--data-dir", data, "--output", tmp_path, "--experiment", "run"]
    words = [*BACKBONE, *TASKS[task], *SHORT, "-b", "2", "--epochs", "1", *place]
    done = torchrun("-m", "timm_convnextv2", task, "train", *words)
    assert done.returncode == 0, done.stderr
    row = r"^mIoU +\d" if task == "segment" else r"^ap50 +\d"
    assert "2 updates of 4 images" in done.stdout and len(re.findall(row, done.stdout, re.M)) == 1
    words = ["--model", str(tmp_path / "run"), "--data-dir", str(data), "--output", str(tmp_path / "eval"), *CPU]
    assert main([task, "eval", *words]) == 0
    measured = json.loads((tmp_path / "eval/metrics.json").read_text())
    there = json.loads((tmp_path / "run/model/config.json").read_text())["metrics"]
    assert {k: v for k, v in measured.items() if not isinstance(v, dict)} == {
        k: v for k, v in there.items() if not isinstance(v, list)
    }


@pytest.mark.slow
def test_it_memorises_eight_images(tmp_path):
    data = write_folder(tmp_path / "data", size=64, train=8, validation=8, masks=True)
    (data / "validation").rename(data / "other")
    (data / "train").rename(data / "validation")
    (data / "train").symlink_to(data / "validation")
    more = ["--model-kwargs", "depths=(1,1,1,1)", "dims=(16,24,32,40)", "patch_size=2", "--channels", 64, "-b", 8]
    more += ["--img-size", 64, "--scale", 1, 1, "--no-colours", "--hflip", 0, "--lr", 1e-2, "--weight-decay", 0]
    more += ["--epochs", 180, "--warmup-updates", 20, "--clip-grad", 1, "--eval-interval", 180]
    train("segment", data, tmp_path, *more)
    assert float(read_rows(tmp_path / "run/summary.csv")[0][-1]["eval_miou"]) > 0.9


# --- the commands of docs/transfer.md


def commands_of(text):
    """The words of the commands on data, detection and segmentation in the blocks of a page."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [words for words in lines if {*words[1:2]} & {"demo", *TASKS}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an encoder where pretraining without arguments leaves it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    make_encoder(tmp_path / "output/demo/encoder", patch_size=1)
    return tmp_path


def test_all_commands_are_known_and_training_would_begin(here, capsys):
    """Those that train, with --dry-run."""
    commands = commands_of(PAGE)
    assert [words[1:3] for words in commands if words[1] != "demo"] == [
        [task, action] for task in TASKS for action in ("train", "eval", "predict")
    ]
    for words in commands:
        if words[1] == "demo":
            assert main([*words[1:], "--train", "16", "--validation", "8"]) == 0
        elif words[2] == "train":
            assert main([*words[1:], "--dry-run", *CPU]) == 0
        else:
            assert COMMANDS[words[1]].parse(words[2:])[0] == words[2]
    assert capsys.readouterr().out.count("updates of 8 images") == 2
    for name, options in COMMANDS.items():  # in the text, too
        for line in re.findall(rf"timm-convnextv2 {name} ((?:train|eval|predict) -[^`\n]+)`", PAGE):
            options.parse(shlex.split(line))


@pytest.mark.slow
def test_they_run_as_written(here, capsys):
    """With an encoder of random weights, so that nothing is said of AP."""
    for words in commands_of(PAGE):
        assert main(words[1:]) == 0, words
    out = capsys.readouterr().out
    assert "ap50" in out and "mIoU" in out
    assert len(json.loads((here / "found.json").read_text())["images"]) == 80
    assert len(list((here / "masks").glob("*.png"))) == 80
    for name in ("boxes", "classes"):
        assert (here / "output" / name / "report.html").stat().st_size > 20_000
