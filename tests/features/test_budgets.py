"""Measures over the number of labels."""

import csv
import json

import pytest
import torch
from encoders import make_encoder
from PIL import Image

from timm_convnextv2.commands.evaluate import main
from timm_convnextv2.data import DemoSource
from timm_convnextv2.features.budgets import budget_sizes, nested_subsets, over_budgets
from timm_convnextv2.features.config import Scoring

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def test_subsets_are_nested_and_stratified():
    sizes = budget_sizes((0.1, 20, 0.5, 1), LABELS)
    assert sizes == [10, 20, 50, 100]
    found = nested_subsets(LABELS, sizes, seed=3)
    for small, large in zip(sizes, sizes[1:], strict=False):
        assert set(found[small].tolist()) < set(found[large].tolist())
    assert found[10].unique().numel() == 10 and LABELS[found[50]].bincount().tolist() == pytest.approx(
        [30, 15, 5], abs=1
    )
    assert nested_subsets(LABELS, [3])[3].tolist() != nested_subsets(LABELS, [3], seed=1)[3].tolist()
    assert all(LABELS[nested_subsets(LABELS, [3], seed)[3]].tolist() == [0, 1, 2] for seed in range(20))


def test_more_labels_are_worth_more_and_all_are_one_draw():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 32, generator=generator)
    labels = torch.arange(400) % 4
    rows = means[labels] + 2.5 * torch.randn(400, 32, generator=generator)
    scoring = Scoring(k=(10,), budget_draws=4)
    found = over_budgets(rows[:200], labels[:200], rows[200:], labels[200:], [8, 200], num_classes=4, scoring=scoring)
    few, many = (budget["measures"] for budget in found)
    assert list(few) == ["knn", "ridge", "probe"]
    for key in few:
        assert many[key]["low"] == many[key]["value"] == many[key]["high"] > few[key]["high"] > few[key]["low"]


def test_command_writes_curve_and_table(tmp_path, capsys):
    make_encoder(tmp_path / "run" / "encoder")
    source = DemoSource(24, size=32)
    for i in range(24):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source[i].permute(1, 2, 0).numpy()).save(path)
    words = [str(tmp_path / "run"), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert (
        main([*words, "--label-budgets", "4", "1", "-j", "0", "--no-probe", "--random-seeds", "2", "--device", "cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "budgets.csv" in out
    with (tmp_path / "out" / "budgets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2 and {row["images"] for row in rows} == {"4", "18"}
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    lines = [line for line in out.splitlines() if " / " in line]
    assert lines[0].split("  ")[0] == "labelled images (knn / ridge)" and lines[0].split()[-2:] == ["4", "18"]
    for result, line in zip(results, lines[1:], strict=True):
        cells = [[100 * of["value"] for of in budget["measures"].values()] for budget in result["budgets"]]
        assert line.startswith(result["model"])
        assert line.endswith("  ".join(" / ".join(f"{value:.1f}" for value in of) for of in cells))
        # all labels are the same measurement as in the table, shuffled ones as well
        assert cells[1] == pytest.approx([100 * result["measures"][key]["value"] for key in ("knn_10", "ridge")])
    assert Image.open(tmp_path / "out" / "budgets.png").size[0] > 500
