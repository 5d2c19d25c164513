"""The commands evaluate and collapse, from models and images to table, files and messages."""

import csv
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from encoders import make_encoder
from PIL import Image

from timm_convnextv2.checkpoint.loading import model_name
from timm_convnextv2.commands import collapse as collapse_command
from timm_convnextv2.commands import main as program
from timm_convnextv2.commands.evaluate import main
from timm_convnextv2.data import DemoSource, create_source
from timm_convnextv2.features import Estimate, collapse, evaluate_models
from timm_convnextv2.features.collapse_models import draw_images
from timm_convnextv2.features.config import Extraction, Scoring
from timm_convnextv2.features.encoder import open_encoder
from timm_convnextv2.features.evaluate import warnings_of

BASELINES = ["8x8 pixels", "histogram of each channel", "border only", "convnextv2_atto, random weights"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, as far as it has an encoder."""
    folder = tmp_path_factory.mktemp("run")
    make_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes, by colour, as textured images of 40 x 36 pixels."""
    folder = tmp_path_factory.mktemp("labelled")
    source = DemoSource(40, size=32)
    for part, numbers in (("train", range(24)), ("validation", range(24, 40))):
        for i in numbers:
            image = source[i].float() * torch.tensor([1.0, 0.2] if i % 2 else [0.2, 1.0]).repeat(2)[:3].view(3, 1, 1)
            place = folder / part / ("odd" if i % 2 else "even")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.byte().permute(1, 2, 0).numpy()).resize((40, 36)).save(place / f"{i}.png")
    return folder


def test_models_beside_baselines(run, labelled, tmp_path, capsys):
    make_encoder(tmp_path / "other", patch_size=2)  # 64 pixels, where the first has 32
    models = [str(run), f"local-dir:{tmp_path / 'other'}"]
    words = [*models, "--data-dir", str(labelled), "--output", str(tmp_path / "out"), "-k", "3", "50", "-j", "0"]
    assert main([*words, "-b", "7", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    results = {result["model"]: result for result in found["results"]}
    assert list(results) == [*BASELINES, f"{models[0]}, shuffled labels", *models]
    assert found["data"]["classes"] == ["even", "odd"] and found["data"]["chance"] == 0.5
    assert (found["data"]["train_images"], found["data"]["test_images"]) == (24, 16)
    assert [result["preprocessing"]["input_size"][1] for result in results.values()] == [32] * 6 + [64]
    for result in results.values():
        assert list(result["measures"]) == ["knn_3", "knn_24", "ridge", "probe", "rank"]
        assert all(m["low"] <= m["value"] <= m["high"] for m in result["measures"].values())
    assert results["8x8 pixels"]["measures"]["ridge"]["value"] > 0.85  # colours tell the classes apart
    lines = out.splitlines()
    assert lines[0].split() == ["model", "kNN", "3", "kNN", "24", "ridge", "probe", "rank", "images/s"]
    assert [line.split("  ")[0] for line in lines[1:8]] == list(results)
    assert "bootstrap over 16 test images); chance: always the most frequent class gives 50.0 %." in lines[-2]
    random = results[BASELINES[-1]]
    assert any(len({*seeds}) > 1 for seeds in random["seeds"].values())
    assert all(
        sum(seeds) / 3 == pytest.approx(random["measures"][key]["value"]) for key, seeds in random["seeds"].items()
    )
    for model in models:
        assert list(results[model]["against"]) == BASELINES
        assert list(results[model]["against"]["8x8 pixels"]) == ["knn_3", "knn_24", "ridge", "probe"]
        for key in ("kNN 3", "ridge"):
            (line,) = [line for line in lines if line.startswith(f"{model}, {key}: ")]
            assert all(base in line for base in BASELINES)
    # colour is the label, and a histogram tells it
    assert re.search(rf"a shortcut is [a-z ]*as good as {models[0]}: histogram of each channel alone has", out)
    assert "may hide what a model has learned: try --all-stages." in out
    easy = [name for name, of in results.items() if any(of["measures"][k]["value"] == 1 for k in ("knn_3", "ridge"))]
    assert "8x8 pixels" in easy
    assert f"16 test images are too few or too easy to tell models apart: {', '.join(easy)} have all of them" in out
    assert "24 images to train on and 16 to test on, 2 classes (even, odd); chance: always the most" in err
    assert "at most 24 neighbours, as many as there are training images (asked for 50)" in err
    assert Image.open(tmp_path / "out" / "evaluation.png").size[0] > 500

    assert main(words) == 2
    assert "already has evaluation.json, evaluation.png" in capsys.readouterr().err


def test_intervals_are_of_groups(run, labelled, tmp_path, capsys):
    """Three copies of each test image, of one patient, give the interval of one copy."""
    images = [(path, path.parts[-3]) for path in sorted(labelled.rglob("*.png"))]
    found, lines = [], []
    for name, copies, words in ("one", 1, ()), ("groups", 3, ("--groups", "patient")), ("images", 3, ()):
        rows = ["name,label,split,patient"]
        for i, (path, part) in enumerate(images):
            for copy in range(copies if part == "validation" else 1):
                other = tmp_path / name / f"{i}-{copy}.png"
                other.parent.mkdir(exist_ok=True)
                shutil.copy(path, other)
                rows.append(f"{name}/{other.name},{'ab'[i % 3 == 0]},{part},p{i}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
        scoring = ["-k", "3", "-j", "0", "--no-probe", "--random-seeds", "1", "--device", "cpu", "--output"]
        assert (
            main([str(run), "--data-dir", str(tmp_path / f"{name}.csv"), *words, *scoring, str(tmp_path / name)]) == 0
        )
        found.append(json.loads((tmp_path / name / "evaluation.json").read_text())["results"])
        lines.append(capsys.readouterr().out.splitlines()[-2])
    assert "(bootstrap over 16 groups of test images)" in lines[1] and "over 48 test images)" in lines[2]
    narrower = []
    one, groups, images = ([(r["measures"], r.get("against")) for r in results] for results in found)
    for (measures, against), (same, paired), (narrow, _) in zip(one, groups, images, strict=True):
        assert {k: measures[k] for k in ("knn_3", "ridge")} == {k: same[k] for k in ("knn_3", "ridge")}
        assert against == paired
        width, other = (of["ridge"]["high"] - of["ridge"]["low"] for of in (measures, narrow))
        narrower.append(other < 0.8 * width)
    assert sum(narrower) >= 3


def test_one_group_gives_no_interval(run, tmp_path, capsys):
    for part, patients in (("train", "pq"), ("validation", "r")):
        for i in range(4):
            random = np.random.default_rng(i)
            save(tmp_path / part / "ab"[i % 2] / patients[i // 2 % len(patients)] / f"{i}.png",
                 random.integers(0, 256, (32, 32, 3)))  # fmt: skip
    words = [str(run), "--data-dir", str(tmp_path), "-j", "0", "--group-by", "parent-folder", "--device", "cpu"]
    assert main(words) == 2 and "The test images are of one group" in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high", "said"), [
    (-9.0, -2.0, "better than"), (-3.0, 2.0, "as good as"), (None, None, "at least as good as")])  # fmt: skip
def test_shortcuts_that_are_better(low, high, said):
    """By the paired intervals of kNN and ridge; None: one of either kind."""
    lows, highs = ((-9.0, -3.0), (-2.0, 2.0)) if low is None else ((low, low), (high, high))
    gains = {
        base: {key: Estimate(sum(ends) / 2, *ends) for key, *ends in zip(("knn_10", "ridge"), lows, highs, strict=True)}
        for base in ("histogram of each channel", "border only")
    }
    measures = {key: {"value": 0.8, "low": 0.7, "high": 0.9} for key in ("knn_10", "ridge")}
    lines = warnings_of("mine", gains, [{"model": base, "measures": measures} for base in gains], 0.25)
    assert len(lines) == 2 and all(f"a shortcut is {said} mine: " in line for line in lines)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.mark.parametrize("baseline", ["border only", "histogram of each channel"])
def test_a_planted_shortcut_is_told(run, tmp_path, capsys, baseline):
    """A frame that is light on one side; two levels that differ little, beside hot pixels."""
    random = np.random.default_rng(0)
    for part, numbers in (("train", range(24)), ("validation", range(24, 40))):
        for i in numbers:
            if baseline == "border only":
                image = np.full((32, 32), 90)
                image[:, 16:] = 160
                image = image[:, :: (1, -1)[i % 2]].copy()
                image[6:-6, 6:-6] = random.integers(0, 256, (20, 20))
            else:
                image = (100, 110)[i % 2] + random.integers(-3, 4, (32, 32))
                image[1, 1], image[2, 2] = 0, 255
            save(tmp_path / part / "ab"[i % 2] / f"{i}.png", image.repeat(3).reshape(32, 32, 3))
    words = [str(run), "--data-dir", str(tmp_path), "-j", "0", "--no-probe", "--device", "cpu", "--random-seeds", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    values = {result["model"]: result["measures"]["ridge"]["value"] for result in found}
    assert values[baseline] > 0.9 and f"{baseline} alone has" in capsys.readouterr().out
    assert values[f"{run}, shuffled labels"] < 0.85
    if baseline == "border only":
        assert values["histogram of each channel"] < 0.85


def test_near_duplicates_across_the_split_are_told(run, tmp_path, capsys, monkeypatch):
    """With a stand-in for the package: a hash of how many rows are light."""
    levels = {"train": {"a": (4, 8), "b": (12, 16)}, "validation": {"a": (4, 20), "b": (16, 24)}}
    for part, classes in levels.items():
        for name, values in classes.items():
            for value in values:
                image = np.full((32, 32, 3), 50)
                image[:value] = 200
                save(tmp_path / part / name / f"{value}.png", image)
    words = [str(run), "--data-dir", str(tmp_path), "-j", "0", "--no-probe", "--device", "cpu", "--random-seeds", "1"]
    stand_in = types.SimpleNamespace(phash=lambda image: f"{int(np.asarray(image).mean() / 4):016x}")
    monkeypatch.setitem(sys.modules, "imagehash", stand_in)
    assert main(words) == 0
    assert "2 of 4 test images look like a training image, such as " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "pip install imagehash" in err and "look like" not in err


def test_repeatable_and_only_what_is_asked_for(run, labelled):
    rows, scoring = Extraction(device="cpu", workers=0), Scoring(k=(1,), probe=False, draws=20)
    first, again = (evaluate_models([str(run)], labelled, rows, scoring, baselines=False)["results"] for _ in range(2))
    assert [result["model"] for result in first] == [str(run)]
    assert list(first[0]["measures"]) == ["knn_1", "ridge", "rank"]
    assert first[0]["measures"] == again[0]["measures"]


def test_all_stages_of_the_models_and_of_random_weights(run, labelled, capsys, tmp_path):
    """Baselines without a network stay the same."""
    words = [str(run), "--data-dir", str(labelled), "-j", "0", "--no-probe", "--device", "cpu", "--random-seeds", "1"]
    found = []
    for name, more in (("last", []), ("all", ["--all-stages"])):
        assert main([*words, *more, "--output", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
        out = capsys.readouterr().out
        assert ("Features are the mean and standard deviation" in out) == bool(more) and "a shortcut is" in out
        assert ("try --all-stages" in out) == (not more)
    last, every = ({one["model"]: one for one in part["results"]} for part in found)
    stages = [stage["num_chs"] for stage in open_encoder(run).model.feature_info]
    for name, one in every.items():
        plain = name in ("8x8 pixels", "histogram of each channel", "border only")
        assert one["features"] == (last[name]["features"] if plain else 2 * sum(stages))
        assert plain == (one["measures"] == last[name]["measures"])
    assert [part["settings"]["all_stages"] for part in found] == [False, True]


def test_random_weights_are_of_the_architecture_and_the_seed(run):
    encoder = open_encoder(str(run))
    trained = encoder.model
    state = torch.random.get_rng_state()
    one, same, other = (encoder.with_random_weights(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    key = "stages.1.blocks.0.mlp.fc1.weight"
    weights = [model.state_dict()[key] for model in (trained, one, same, other)]
    assert weights[0].shape == weights[1].shape and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])


def test_names_of_models(run, tmp_path):
    assert model_name(str(run)) == model_name(str(run / "encoder")) == f"local-dir:{run / 'encoder'}"
    assert model_name("convnextv2_atto.fcmae") == "convnextv2_atto.fcmae"
    assert model_name("atto") == "convnextv2_atto" and model_name("atto", "fcmae_convnextv2") == "fcmae_convnextv2_atto"
    assert model_name("timm/resnet18.a1_in1k") == "timm/resnet18.a1_in1k" and model_name("a/*.pth") == "a/*.pth"
    with pytest.raises(ValueError, match="no config.json in it, nor in encoder/ or model/"):
        model_name(str(tmp_path))


@pytest.mark.parametrize("name", ["runs/nothing", "local-dir:runs/nothing"])
@pytest.mark.parametrize("words", [
    "evaluate MODEL --data-dir DATA", "embed DATA --model MODEL --output x.npy", "collapse MODEL --data-dir DATA",
    "pretrain DATA --model MODEL", "export MODEL --output x.onnx", "segment predict DATA --model MODEL --output x",
    "compare --data-dir DATA --encoder MODEL", "report MODEL",
])  # fmt: skip
def test_a_model_that_is_not_there(name, words, labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMM_TRAIN", str(Path(__file__).parents[1] / "finetune" / "stand_in_train.py"))
    given = words.replace("MODEL", name).replace("DATA", str(labelled)).split()
    assert program.main(given) == 2
    err = capsys.readouterr().err
    assert re.search("nothing.* (does not exist|no such folder)", err) and err.count("error:") == 1, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [
    "evaluate RUN --data-dir BANDS", "embed BANDS --model RUN --output x.npy", "collapse RUN --data-dir BANDS",
    "pretrain BANDS --img-size 32 --dry-run", "pretrain GOOD --probe-dir BANDS --img-size 32 -b 4 --dry-run",
])  # fmt: skip
def test_other_channels_have_one_remedy(words, run, labelled, tmp_path, capsys, monkeypatch):
    """It is true of commands that train, and of those that do not; --probe-dir is named if its images are meant."""
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        (tmp_path / "bands" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "bands" / "ab"[i % 2] / f"{i}.npy", np.full((12, 40, 40 + i), i, np.uint8))
    places = {"RUN": run, "BANDS": tmp_path / "bands", "GOOD": labelled}
    assert program.main([str(places.get(word, word)) for word in words.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("which pretrain and finetune make with --in-chans 12") == 1
    assert err.count("expected 3 channels") == 3 and "train with" not in err
    assert (f"--probe-dir {tmp_path}/bands: " in err) == ("--probe-dir" in words)


def test_distances_and_channels(run, labelled, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = dict(depths=[1, 1, 2, 1], dims=[8, 12, 16, 20])
    v1, how = timm.create_model("convnext_atto", num_classes=0, **sizes), dict(safe_serialization=True)
    timm.models.save_for_hf(v1, tmp_path / "v1", model_config={"num_classes": 0}, model_args=sizes, **how)
    models, out = [str(run), str(tmp_path / "v1")], tmp_path / "out"
    words = [*models, "--data-dir", str(labelled), "--output", str(out), "--num-images", "5", "--device", "cpu"]
    assert collapse_command.main([*words, "--img-size", "32", "-b", "2"]) == 0
    said, err = capsys.readouterr()
    rows = list(csv.DictReader((out / "collapse.csv").open(newline="")))
    assert [row["model"] for row in rows] == [models[0]] * 4 + [models[1]] * 5
    depths = [0, 1 / 3, 2 / 3, 1, 0, 0.25, 0.5, 0.75, 1]
    assert [float(row["depth"]) for row in rows] == pytest.approx(depths)
    encoder = open_encoder(str(run), 32)
    source = create_source(labelled)
    images = draw_images(source, 5, encoder.transform, 0, print)
    expected = [block.distance for block in collapse(encoder.model, images)]
    assert [float(row["distance"]) for row in rows[:4]] == pytest.approx(expected, rel=1e-4)
    assert all(Image.open(out / name).size[0] > 500 for name in ("collapse.png", "channels.png"))
    assert said.count("mean cosine distance") == 2 and "5 images of 32 x 32" in err

    assert collapse_command.main(words) == 2
    assert "already has collapse.csv, collapse.png, channels.png" in capsys.readouterr().err
    assert collapse_command.main([*words, "--overwrite", "--layer", "stages.2.blocks.1"]) == 2
    assert f"'{models[0]}' has no block 'stages.2.blocks.1' (--layer); there are: stages.0" in capsys.readouterr().err


def test_images_that_cannot_be_decoded_are_replaced(labelled, tmp_path):
    for i, path in enumerate(sorted(labelled.rglob("*.png"))[:6]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes() if i % 3 else b"no image")
    said = []
    images = draw_images(create_source(tmp_path), 4, lambda image: image[:, :32, :32], 0, said.append)
    assert len(images) == 4 and "left out 2 images that cannot be decoded" in said[0]
    assert len(draw_images(create_source(tmp_path), 9, lambda x: x, 0, said.append)) == 4
    assert "4 images" in said[-1] and "9" in said[-1]


EVALUATE = {
    "The model is 'convnextv2_atoo'": ["convnextv2_atoo", "--data-dir", "{data}"],
    "has no model: there is no config.json": ["{new}", "--data-dir", "{data}"],
    "has one class, only": ["{run}", "--data-dir", "{one}"],
    "--k must be at least 1": ["{run}", "--data-dir", "{data}", "-k", "0"],
    "--device nowhere cannot be used": ["{run}", "--data-dir", "{data}", "--device", "cpu,nowhere"],
    "--batch-size must be at least 1": ["{run}", "--data-dir", "{data}", "-b", "0"],
    "--label-budgets 0.05 is 1 of 24 training images; expected at least one per class, 2 or 0.083": (
        "{run} --data-dir {data} --label-budgets 0.05 1".split()
    ),
    "--label-budgets 2.5 is above 1": ["{run}", "--data-dir", "{data}", "--label-budgets", "2.5"],
    "--label-budgets 25 is 25 of 24": ["{run}", "--data-dir", "{data}", "--label-budgets", "25"],
    "--label-budgets must be above 0": ["{run}", "--data-dir", "{data}", "--label-budgets", "0"],
    "--groups patient is a column of a CSV": ["{run}", "--data-dir", "{data}", "--groups", "patient"],
    "is a file, expected a folder": ["{run}", "--data-dir", "{data}", "--output", __file__],
}
COLLAPSE = {
    "no image": ["{run}", "--data-dir", "{new}"],
    "No images given": ["{run}"],
    "--num-images must be at least 1": ["{run}", "--data-dir", "{data}", "--num-images", "0"],
}


@pytest.mark.parametrize(
    ("command", "message"), [(main, m) for m in EVALUATE] + [(collapse_command.main, m) for m in COLLAPSE]
)
def test_mistakes_are_one_message(command, message, run, labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_convnextv2.features.evaluate.extract_many", None)  # nothing is computed before
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "data": labelled, "new": tmp_path / "new", "one": tmp_path / "one"}
    places["new"].mkdir(), (places["one"] / "only").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(places["one"] / "only" / "x.png")
    assert command([word.format(**places) for word in {**EVALUATE, **COLLAPSE}[message]]) == 2
    out, err = capsys.readouterr()
    assert not out and message.lower() in err.lower() and err.count("error:") == 1 and "Traceback" not in err


def test_collapse_names_what_a_model_has(labelled, tmp_path, capsys):
    model = timm.create_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "resnet", model_config={"num_classes": 0}, safe_serialization=True)
    words = [str(tmp_path / "resnet"), "--data-dir", str(labelled), "--output", str(tmp_path / "out")]
    assert collapse_command.main(words) == 2
    assert "ResNet has 4 BasicBlock, expected the blocks of ConvNeXt V1 or V2" in capsys.readouterr().err
