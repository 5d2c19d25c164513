"""Readers of files that other parts write, on folders that real commands wrote."""

import csv
import shutil
from pathlib import Path

import pytest
import yaml
from real import call, strict
from test_export import make_run
from test_html import Page

from timm_convnextv2.checkpoint import export_finetuned
from timm_convnextv2.commands.report import main
from timm_convnextv2.files import read_rows
from timm_convnextv2.pretraining import loop
from timm_convnextv2.report.kinds import verdict
from timm_convnextv2.report.run import read_run
from timm_convnextv2.runs.folder import WRITTEN
from timm_convnextv2.transfer import loop as dense


def test_report_of_a_pretraining(pretrained, tmp_path):
    """Everything that the run measured, without a note about corrupt files; the first line says what it is."""
    folder, printed = pretrained
    run = read_run(folder)
    assert run.notes == [] and [*run.rows] == [0, 1] and "--probe-dir" in run.command
    assert [len(rows) for rows in run.collapse.values()] == [4, 4]
    assert {"random", "pixels", "histogram"} < run.probe["baselines"].keys() and run.progress["num_images"] == 13
    assert {"eval_loss", "eval_knn", "eval_ridge", "eval_rank", "eval_distance"} <= run.rows[1].keys()
    assert [*run.predictions] == [*run.neighbours] == [1, 2]
    page = Page((folder / "report.html").read_text(encoding="utf-8"))  # as the run itself wrote it
    assert page.text.startswith(" Pretraining of pretrained") and "fcmae_convnextv2_atto on " in page.text
    assert "Left out" not in page.text and "Feature collapse" in page.text and "this run, epoch 2" in page.text
    assert len(page.all("img")) == 2 + 2 and "report.html" in printed
    text, good = verdict(run)  # 6 updates: the run says so at its end and on its page
    assert good is False and "warning: 6 updates are too few" in text and text in printed
    assert all(" ".join(line.split()) in page.text for line in text.splitlines())


def test_report_of_a_segmentation(segmented):
    folder, _ = segmented
    run = read_run(folder)
    assert run.notes == [] and run.task == "segmentation" and "eval_miou" in run.rows[0]
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert text.startswith(" Segmentation of run") and "Left out" not in text and "mIoU was highest" in text
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("td")) > len(run.classes.classes) ** 2 and "Confusion" in text
    names, counts = zip(*((of.name, of.count) for of in run.classes.classes), strict=True)
    assert [*names] == run.settings["classes"] and sum(counts) > 0 and " taken for" in text


def test_overwrite_knows_every_file_of_a_run(pretrained, segmented):
    """What no pattern names would stay from the run before, and be taken for the new one's."""
    for (folder, _), own in ((pretrained, loop.WRITTEN), (segmented, dense.WRITTEN)):
        patterns = (*WRITTEN, *own)
        unknown = [path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in patterns)]
        assert not unknown


def test_corrupt_results_per_class_are_noted(segmented, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(segmented[0], folder)
    wrong = '{"measure": "IoU", "unit": "pixels", "classes": [{"name": "a", "count": 1, "value": "x"}]}'
    other = wrong.replace('"x"}]', '1}], "confusion": [[1, 2]]')
    for content in ("{", "[]", wrong, other):
        (folder / "classes.json").write_text(content)
        assert main([str(folder)]) == 0
        text = Page((folder / "report.html").read_text(encoding="utf-8")).text
        assert "classes.json cannot be read" in text and "taken for" not in text


def test_report_of_a_finetuning(tmp_path, capsys):
    """As timm's own functions write it, with the header that a resumed run repeats."""
    folder, _ = make_run(tmp_path / "run", config="recipes/smoke.yaml")
    summary = folder / "summary.csv"
    summary.write_text(summary.read_text() + summary.read_text())
    export_finetuned(folder, folder / "model", license="mit")
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert not err and "report.html" in out
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for words in (
        "Finetuning of run", "Top-1 was highest after epoch 1 (60.0 %), and is 50.0 % after epoch 2.", "2 of 2",
        "convnextv2_atto", "/data/pets", "smoke.yaml", "validate --model", "USER/NAME --dry-run",
    ):  # fmt: skip
        assert words in page.text, words
    assert [svg["aria-label"].partition(" over")[0] for svg in page.all("svg")][:2] == ["Accuracy, %", "Loss"]


def test_tables_of_runs(pretrained, segmented):
    for (folder, _), names in ((pretrained, ("summary.csv", "collapse.csv")), (segmented, ("summary.csv",))):
        for name in names:
            rows, damaged = read_rows(folder / name)
            with open(folder / name, newline="") as file:
                assert rows == [*csv.DictReader(file)] and rows and not damaged
        assert isinstance(yaml.safe_load((folder / "args.yaml").read_text()), dict)
    assert strict(pretrained[0] / "probe.json")["test"] > 0


@pytest.mark.parametrize("name", ["evaluation.json", "check.json", "stats.json"])
def test_json_of_commands(pretrained, demo, tmp_path, name):
    """Other readers take it: there is no NaN, and the keys that docs name are there."""
    images, encoder = demo / "validation", f"local-dir:{pretrained[0] / 'encoder'}"
    if name == "evaluation.json":
        call("evaluate --device cpu --workers 0", encoder, "--data-dir", images, "--output", tmp_path)
        found = strict(tmp_path / name)
        assert {"results", "data"} <= found.keys() and found["results"][0]["measures"]
    elif name == "check.json":
        call("check -j 0 --show-bands 3 2 1 --data-dir", images, "--output", tmp_path / name)
        assert strict(tmp_path / name)["files"] == len([*Path(images).rglob("*.png")])
    else:
        call("stats -j 0", images, "--output", tmp_path / name)
        assert len(strict(tmp_path / name)["channels"]) == 3
