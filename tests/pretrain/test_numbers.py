"""Fifty updates give the numbers that they have always given: a refactoring that changes one of them is none."""

import csv

import pytest

from timm_convnextv2.commands.pretrain import main

# First and second epoch of 25 updates, in float32 on CPU. The tolerance allows for another CPU's rounding, which grows
# over the updates; on one machine the numbers are equal to the last digit.
EXPECTED = {
    "train_loss": (0.784103832244873, 0.6304057574272156),
    "eval_loss": (0.7026613447401259, 0.6563500695758395),
    "eval_distance": (0.4930807749430339, 0.4943931500116984),
    "eval_dead": (0.0, 0.0),
    "lr": (0.0006017280065263169, 1.165615404730369e-06),
}


def test_fifty_updates(tmp_path):
    words = "--dataset embedded --train-num-samples 450 --holdout 0.1 --img-size 32 --patch-size 1 --batch-size 16"
    words += f" --epochs 2 --lr-base 1.6e-2 --workers 0 --seed 7 --output {tmp_path} --experiment x"
    assert main(words.split()) == 0
    with open(tmp_path / "x" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, expected in EXPECTED.items():
        assert [float(row[name]) for row in rows] == pytest.approx(expected, rel=2e-3), name
