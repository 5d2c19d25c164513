"""What detect and segment send to TensorBoard and to Weights & Biases: the numbers of summary.csv."""

import sys
import types

import pytest
from tiny import BACKBONE, DETECTOR, SEGMENTER, SHORT

from timm_convnextv2.commands.main import main
from timm_convnextv2.data.demo import write_folder
from timm_convnextv2.runs.summary import read_rows

TASKS = {
    "detect": (DETECTOR, "eval_box_ap", "train_loss_objectness"),
    "segment": (SEGMENTER, "eval_miou", "train_loss_aux"),
}


@pytest.fixture
def wandb(monkeypatch):
    """The package, as far as it is used here."""
    api = types.ModuleType("wandb")
    api.begun, api.logged = [], []
    api.init, api.log = (lambda **kwargs: api.begun.append(kwargs)), api.logged.append
    monkeypatch.setitem(sys.modules, "wandb", api)
    return api


@pytest.mark.parametrize("task", TASKS)
def test_they_get_the_numbers_of_the_summary(tmp_path, wandb, task):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options, measure, part = TASKS[task]
    data = write_folder(tmp_path / "data", size=32, train=8, validation=8, coco=True, masks=True)
    words = [task, "train", *BACKBONE, *SHORT, *options, "--data-dir", str(data), "--output", str(tmp_path)]
    words += ["--experiment", "run", "-b", "4", "-j", "0", "--eval-interval", "2"]
    assert main([*words, "--log-tensorboard", "--log-wandb", "--wandb-project", "mine"]) == 0
    rows = read_rows(tmp_path / "run/summary.csv")[0]
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["config"]["img_size"]) == ("mine", "run", 32)
    assert [metrics["epoch"] for metrics in wandb.logged] == [0, 1]
    assert measure not in wandb.logged[0] and wandb.logged[1][measure] == float(rows[1][measure])
    assert wandb.logged[0][part.removeprefix("train_")] == float(rows[0][part])
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"loss", "lr", "images_per_s", measure} <= {*events.Tags()["scalars"]}
    assert [(e.step, e.value) for e in events.Scalars(measure)] == [(1, pytest.approx(float(rows[1][measure])))]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([float(row["train_loss"]) for row in rows])


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_package_is_named_before_training(tmp_path, capsys, monkeypatch, task):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [task, "train", "--model", "convnextv2_atto", "--data-dir", str(tmp_path), "--log-wandb"]
    assert main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "--log-wandb needs a package that is missing: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
