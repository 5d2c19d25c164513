"""The report of planted runs of detection and segmentation."""

import re

import pytest
import yaml
from planted import EVIL, draw, plant, table
from test_html import Page

from timm_convnextv2.commands.report import main
from timm_convnextv2.report import html as report_html
from timm_convnextv2.report.html import write_report
from timm_convnextv2.report.run import read_run
from timm_convnextv2.runs.folder import head_comment

MEASURES = {
    "detection": {"eval_box_ap": 0.25, "eval_box_ap50": 0.5, "eval_mask_ap": 0.125, "eval_box_ap_large": -1},
    "segmentation": {"eval_miou": 0.25, "eval_accuracy": 0.75, "eval_mean_accuracy": 0.5},
}


def plant_transfer(folder, task, epochs=3, **more):
    """The folder of a run in which every second epoch was measured, the best in the middle."""
    folder.mkdir(parents=True)
    settings = dict(
        task=task, model=f"local-dir:/runs/{EVIL}", data_dir="/data/my cells", classes=["nucleus", EVIL],
        num_images=500, num_validation=80, batch_size=4, grad_accum_steps=2, world_size=2, total_updates=93,
        img_size=640, in_chans=5, seed=1, from_scratch=False, lr=1e-4, layer_decay=0.9, pixels={"divide": 1000.0},
        recipe="small-data", device="cuda", amp=True, amp_dtype="bfloat16", boxes_only=False, **more,
    )  # fmt: skip
    text = head_comment("timm_convnextv2 0.2.0", f"timm-convnextv2 {task} train --data-dir 'x y'")
    (folder / "args.yaml").write_text(text + yaml.safe_dump(settings))
    part = "train_loss_box_reg" if task == "detection" else "train_loss_aux"
    rows = []
    for e in range(epochs):
        row = {"epoch": e, "train_loss": 2 / (e + 1), part: 0.5, "train_images_per_s": 31.5, "train_seconds": 90.0}
        row |= {"train_data_wait": 0.0625, "train_memory_gib": 11.25, "lr": 1e-4}
        factor = 2 if e == 1 else 1
        rows.append(row | {k: v * (factor if v > 0 else 1) if e else "" for k, v in MEASURES[task].items()})
    table(folder / "summary.csv", rows)
    draw(folder / "predictions", range(2, epochs + 1))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("task", MEASURES)
def test_what_it_says(tmp_path, task):
    folder = plant_transfer(tmp_path / "run", task)
    assert write_report([folder], folder / "report.html") == []
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.open and len(page.all("script")) == 1 and text.count("<script>") == 1
    detect = task == "detection"
    command, measure = ("detect", "Box AP") if detect else ("segment", "mIoU")
    for words in (
        f"Report of {task}", f"{'Mask R-CNN' if detect else 'UPerNet'} on local-dir:/runs/", "2: nucleus, <script>",
        f"{measure} was highest after epoch 2 (50.0 %), and is 25.0 % after epoch 3.", "500 images, 80 to validate",
        "/data/my cells: 500 images, 80 to validate; 3 epochs",
        "5 channels, crops of 640 x 640", "divide 1000.0", "small-data", "4 x 2 steps x 2 processes", "0.0001",
        "cuda, bfloat16", "31.5 images/s", "11.25 GiB", "0 h 04 min", f"{command} eval --model {folder / 'model'}",
        "--data-dir '/data/my cells'", f"{command} predict", "timm_convnextv2 0.2.0",
        f"publish {folder} USER/NAME --license ID --dry-run",
        f"timm-convnextv2 {task} train --data-dir 'x y'",
    ):  # fmt: skip
        assert words in page.text, words
    charts = [svg["aria-label"].partition(" over")[0] for svg in page.all("svg")]
    curves = ["AP, %", "AP at IoU 0.5, %"] if detect else ["mIoU, %", "Accuracy, %"]
    part = "Loss: box reg" if detect else "Loss: aux"
    assert charts == [*curves, "Loss", part, "Speed, images/s", "Waiting for data, % of the time", "Learning rate"]
    assert ("(masks): 25 after epoch 2" if detect else "(mean over classes): 100") in str(page.all("svg"))
    images = page.all("img")
    assert [image["data-epoch"] for image in images] == ["2", "3"] and ["hidden" in i for i in images] == [True, False]
    assert page.all("input")[0]["max"] == "1" and "FCMAE" not in text and "masked" not in page.text
    assert read_run(folder).column("eval_box_ap_large") == {}  # COCO's -1


@pytest.fixture
def no_charts(monkeypatch):
    monkeypatch.setattr(report_html, "line_chart", lambda *_, **__: "<svg></svg>")


def test_runs_side_by_side_are_of_one_task(tmp_path, capsys, no_charts):
    runs = [plant_transfer(tmp_path / name, "detection", seconds=name) for name in ("a", "b")]
    other = plant_transfer(tmp_path / "c", "segmentation")
    out = str(tmp_path / "x.html")
    assert main([*map(str, runs), "--output", out]) == 0
    text = Page((tmp_path / "x.html").read_text()).text
    assert re.search("Box AP 25.0 % 25.0 %", text) and "1: a" in text
    for second, task in ((other, "segmentation"), (plant(tmp_path / "p", 1, full=False), "pretraining")):
        assert main([str(runs[0]), str(second), "--output", out]) == 2
        assert f"is a run of detection and '{second}' one of {task}, which share no number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_images": None}, "does not hold the settings of a run of detection: num_images missing"),
        ({"task": "cooking"}, "does not hold the settings of a run of cooking"),
        ({"task": [1]}, "does not hold the settings of a run of [1]"),
    ],
)
def test_damaged_settings(tmp_path, capsys, changes, said):
    folder = plant_transfer(tmp_path / "run", "detection")
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    (folder / "args.yaml").write_text(yaml.safe_dump(settings | changes))
    assert main([str(folder)]) == 2
    assert said in capsys.readouterr().err
