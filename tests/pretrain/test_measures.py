"""Evidence in the run: the held-out loss, collapse by block, kNN and ridge of frozen features, the best encoder."""

import csv
import json
import re
import shutil

import pytest
import torch
from helpers import assert_same
from runs import assert_same_end, at_update, image_folder, kill, load, rows, run, snapshot
from safetensors.torch import load_file

from timm_convnextv2.data import DemoSource, PretrainDataset, hold_out
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.pretraining import measures
from timm_convnextv2.report.kinds import BASELINES, probe_rows
from timm_convnextv2.report.run import read_run

EPOCHS = 3


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "shapes"
    write_folder(folder, size=48, train=32, validation=16)
    return folder


@pytest.fixture(scope="module")
def options(labelled):
    return ["--holdout", "0.25", "--probe-dir", str(labelled), "--probe-interval", "2", "--keep-best", "ridge"]


@pytest.fixture(scope="module")
def measured(options, tmp_path_factory):
    """A run with all measures, and the indices of the images that it trained on."""
    seen, sample = set(), PretrainDataset.__getitem__

    def noted(self, key):
        if key[0] < EPOCHS:
            seen.add(self.source.name(key[1]))
        return sample(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainDataset, "__getitem__", noted)
        out = run(tmp_path_factory.mktemp("measured") / "r", *options, epochs=EPOCHS)
    return out, seen


def test_columns_of_the_summary(measured):
    found = rows(measured[0])
    for name in ("eval_loss", "eval_distance", "eval_dead", "eval_knn", "eval_ridge", "eval_rank"):
        values = [row[name] for row in found]
        every = name in ("eval_loss", "eval_distance", "eval_dead")  # of 3 epochs, recon_interval is 1
        assert [value != "" for value in values] == [True, every or True, True], name  # 1, each second, the last
        assert all(float(value) >= 0 for value in values if value), name
    assert all(0 <= float(row["eval_distance"]) <= 0.5 + 1e-6 and float(row["eval_dead"]) <= 1 for row in found)


def test_no_image_that_is_held_out_is_trained_on(measured):
    _, seen = measured
    train, apart = hold_out(DemoSource(32, 64), 0.25, 42)
    assert len(apart) == 8 and seen == {train.name(i) for i in range(24)}
    assert seen.isdisjoint(apart.name(i) for i in range(8))


def test_collapse_of_each_block_and_epoch(measured):
    with open(measured[0] / "collapse.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in found] == [epoch for epoch in (1, 2, 3) for _ in range(5)]
    assert [float(row["depth"]) for row in found[:5]] == [0, 0.25, 0.5, 0.75, 1]
    last = [float(row["distance"]) for row in found[-5:]]
    assert sum(last) / 5 == pytest.approx(float(rows(measured[0])[-1]["eval_distance"]), rel=1e-4)


def test_baselines_and_neighbours(measured, labelled):
    out, _ = measured
    probe = json.loads((out / "probe.json").read_text())
    assert (probe["train"], probe["test"], probe["k"], len(probe["classes"])) == (32, 16, 20, 8)
    assert probe["baselines"]["random"].keys() == {"knn", "ridge", "rank"}
    assert all(probe["baselines"][name].keys() == {"knn", "ridge"} for name in ("pixels", "histogram", "border"))
    latest = probe["latest"]
    assert latest["epoch"] == 3 and latest["against"].keys() == {"random", "pixels", "histogram", "border"}
    gain = float(rows(out)[-1]["eval_knn"]) - probe["baselines"]["random"]["knn"]
    assert latest["against"]["random"]["knn"].startswith(f"{gain:+.1f} (")
    shown = dict(probe_rows(read_run(out)))
    assert shown["random weights"][0][1] == latest["against"]["random"]["knn"]
    assert [*shown][1:] == ["random weights", *map(BASELINES.get, ("pixels", "histogram", "border"))]
    assert {p.name for p in (out / "neighbours").iterdir()} == {f"epoch-000{i}.png" for i in (1, 2, 3)}


def test_the_best_encoder_is_that_of_the_best_epoch(measured):
    out, _ = measured
    values = [float(row["eval_ridge"]) for row in rows(out)]
    epoch = values.index(max(values)) + 1
    weights = load_file(out / "encoder-best/model.safetensors")
    trained = load(out, f"milestone-{epoch}")["state_dict"]
    own = {k: v for k, v in weights.items() if not k.startswith("head.fc")}
    assert own and all(torch.equal(v, trained[f"encoder.{k}"]) for k, v in own.items())
    assert f"Epochs | {epoch} of 3" in (out / "encoder-best/README.md").read_text()


def test_the_card_says_what_was_measured(measured):
    card = (measured[0] / "encoder/README.md").read_text()
    last = rows(measured[0])[-1]
    assert f"Held-out loss | {float(last['eval_loss']):.4f} (epoch 3)" in card
    assert re.search(
        rf"20-NN {float(last['eval_knn']):.1f} %, ridge .*; random weights 20-NN .*; pixels 20-NN .*; histogram 20-NN",
        card,
    )


def test_a_resumed_run_measures_the_same(measured, options, tmp_path, no_images):
    kill(tmp_path / "r", 7, *options, epochs=EPOCHS)
    run(tmp_path / "r", *options, "--resume", "auto", epochs=EPOCHS)
    assert_same_end(tmp_path / "r", measured[0])
    for name in ("collapse.csv", "probe.json", "encoder-best/model.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (measured[0] / name).read_bytes(), name


def test_measures_change_nothing_of_the_training(options, tmp_path, no_images):
    plain = run(tmp_path / "plain")
    probed = run(tmp_path / "probed", *options[2:])
    assert_same(load(plain)["state_dict"], load(probed)["state_dict"])


def test_the_moving_average_is_what_is_measured(tmp_path, no_images, monkeypatch):
    """It is what is kept and exported; the last weights are others."""
    seen, collapse = [], measures.collapse

    def noted(encoder, images):
        seen.append({k: v.clone() for k, v in encoder.state_dict().items()})
        return collapse(encoder, images)

    monkeypatch.setattr(measures, "collapse", noted)
    out = run(tmp_path / "r", "--lr", "0.1", "--model-ema", "--model-ema-decay", "0.9", "--no-model-ema-warmup")
    (weights,), exported = seen, load_file(out / "encoder/model.safetensors")
    assert all(torch.equal(v, exported[k]) for k, v in weights.items() if not k.startswith("head."))
    state = load(out)
    assert_same(exported, {k: state["state_dict_ema"][f"encoder.{k}"] for k in exported})
    assert not torch.equal(weights["stem.0.weight"], state["state_dict"]["encoder.stem.0.weight"])
    assert "moving average (0.9)" in (out / "encoder/README.md").read_text()


def test_labelled_images_that_go_are_a_warning(labelled, tmp_path, no_images, capsys, monkeypatch):
    folder = tmp_path / "labelled"
    shutil.copytree(labelled, folder)
    at_update(monkeypatch, 0, lambda: next((folder / "train").rglob("*.png")).write_bytes(b"no image"))
    out = run(tmp_path / "r", "--probe-dir", str(folder), epochs=2)
    printed = capsys.readouterr().out
    assert f"Warning: a measure failed (--probe-dir {folder}: Images cannot be decoded" in printed and "Done" in printed
    assert [row["eval_knn"] for row in rows(out)] == ["", ""] and float(rows(out)[1]["eval_distance"]) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--holdout", "0.5"], "holdout: 0.25 there, 0.5 here"),
        (["--holdout", "0"], "holdout: 0.25 there, 0.0 here"),
        (["--seed", "1"], "seed: 42 there, 1 here"),
        (["--num-images", "40"], "num_images: 24 there, 30 here"),
    ],
)
def test_a_resumed_run_holds_out_the_same_images(measured, options, tmp_path, capsys, change, message):
    before = snapshot(measured[0])
    more = [*options, *change, "--resume", str(measured[0] / "milestone-1.pth.tar")]
    run(tmp_path / "other", *more, epochs=EPOCHS, status=2)
    assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert snapshot(measured[0]) == before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--holdout", "0.7"], "between 0 and 0.5, got 0.7"),
        (["--keep-best", "loss"], "--keep-best loss needs --holdout X"),
        (["--keep-best", "knn"], "--keep-best knn needs --probe-dir DIR"),
        (["--probe-dir", "no/such"], "no/such"),
        (["--probe-dir", "{one}"], "one class"),
        (["--holdout", "0.1", "--dataset", "wds/", "--data-dir", "{one}", "--split", "x.tar"], ""),
    ],
)
def test_refused_before_anything_is_written(tmp_path, capsys, more, message):
    image_folder(tmp_path / "one" / "a", 4)
    run(tmp_path / "r", *[word.format(one=tmp_path / "one") for word in more], status=2)
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and not (tmp_path / "r").exists()


@pytest.mark.parametrize("name, values, expected", [("knn", (1, 3, 2, 3, 4), (1, 1, 0, 0, 1)),
                                                    ("loss", (3, 1, 2, "", "nan"), (1, 1, 0, 0, 0))])  # fmt: skip
def test_best(name, values, expected):
    found = measures.Best(name, [])
    assert [found.improves({name: value}) for value in values] == [bool(e) for e in expected]
    again = measures.Best(name, [{f"eval_{name}": str(value)} for value in values])
    assert again.value == found.value and not again.improves({})
