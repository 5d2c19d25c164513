"""The report of planted runs, as text: what it shows, what it leaves out, and what it must not let through."""

import base64
import hashlib
import html
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from planted import COMMAND, EVIL, draw, plant, table

from timm_convnextv2.commands.report import main
from timm_convnextv2.report import html as report_html
from timm_convnextv2.report.charts import Line, line_chart, spread
from timm_convnextv2.report.html import write_report
from timm_convnextv2.report.images import save_neighbours
from timm_convnextv2.report.kinds import verdict
from timm_convnextv2.report.run import RunRecord, read_run
from timm_convnextv2.runs.folder import head_comment


class Page(HTMLParser):
    """Text, elements and their attributes."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return plant(root / "first"), plant(root / "second", 3, full=False, options=("--seed", "7"))


@pytest.fixture
def no_charts(monkeypatch):
    """They take most of the time."""
    for name in ("line_chart", "collapse_chart"):
        monkeypatch.setattr(report_html, name, lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="module")
def page(runs):
    path = runs[0] / "report.html"
    assert write_report([runs[0]], path) == []
    return Page(path.read_text(encoding="utf-8"))


def test_what_a_report_says(page):
    assert not page.open and page.all("html")[0]["lang"] == "en"
    for words in (
        "It is not shown that the encoder learned: kNN 55.0 % (not above random weights 49.0 % and plain pixels "
        "60.0 %) and ridge 45.0 % (not above random weights 52.0 %).",
        "random weights 49.0 % (+6.0 (-4.0 to +16.0): no difference shown) 52.0 % plain pixels 60.0 % 33.0 %",
        "The held-out loss was lowest after epoch 6 (0.5500).",
        "fcmae_convnextv2_atto", "1,234", "6 of 6", "3 x 224 x 224", "31.5 images/s", "6 % of the time", "6.25 GiB",
        "0 h 06 min", "Skipped updates 2", "Images that cannot be decoded 1", "1.50 %", "timm_convnextv2 0.2.0",
        "2 classes, 80 train, 20 test images", "mask_ratio", "publish", "finetune", "timm.create_model",
    ):  # fmt: skip
        assert words in page.text, words
    assert re.sub(r"\s+", " ", COMMAND) in page.text


def test_charts_are_drawn_and_described(page):
    charts = {svg["aria-label"].partition(" over")[0]: svg for svg in page.all("svg")}
    assert len(charts) == 11 and all(svg["role"] == "img" and svg["viewbox"] for svg in page.all("svg"))
    assert "0.5 after epoch 1" in charts["Loss"]["aria-label"] and "(held out)" in charts["Loss"]["aria-label"]
    assert "plain pixels: 60" in charts["kNN accuracy, %"]["aria-label"]
    assert {"random weights", "plain pixels"} <= {word.strip() for word in page.words}
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = re.findall(r"url\(#([^)]+)\)", str(page.elements))
    assert used and len(names) == len(set(names)) and {*used} <= {*names}
    assert "#fe0" not in str(page.elements) and "var(--series-0)" in str(page.elements)


def test_images_are_in_the_page(page, runs):
    images = page.all("img")
    assert len(images) == 6 + 2 and all(image["alt"] for image in images)
    assert [int(i["data-epoch"]) for i in images if "data-epoch" in i] == [1, 2, 3, 4, 5, 6]
    assert ["hidden" in i for i in images if "data-epoch" in i] == [True] * 5 + [False]
    for epoch, image in enumerate(images[:6], 1):
        kind, _, data = image["src"].partition(";base64,")
        content = base64.b64decode(data)
        original = runs[0] / f"reconstructions/epoch-{epoch:04d}.png"
        assert kind.startswith("data:image/") and len(content) <= original.stat().st_size
        with Image.open(io.BytesIO(content)) as shown, Image.open(original) as drawn:
            assert shown.size == drawn.size == (int(image["width"]), int(image["height"]))
            assert np.abs(np.asarray(shown, float) - np.asarray(drawn, float)).mean() < 50
    (slider,) = page.all("input")
    assert slider["max"] == "5" and {"for": slider["id"]} in page.all("label")


def test_nothing_from_outside_and_one_script(page, runs):
    assert not [v for _, a in page.elements for k, v in a.items() if k in ("src", "href") and v[:1] not in "d#"]
    assert not [k for _, a in page.elements for k in a if k.startswith("on")]
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    policy = page.all("meta")[1]["content"]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("several", [False, True])
def test_user_text_is_escaped(tmp_path, several, no_charts):
    """In the folder's name, options, command, names of images, the probe, and damaged lines."""
    folder = plant(tmp_path / "<script>1" / "<script>alert(1)<")
    (folder / "probe.json").write_text(
        '{"data_dir": "<script>2", "classes": [], "baselines": {"<script>3": {"knn": 1}}}'
    )
    with open(folder / "summary.csv", "a") as file:
        file.write("<script>4")
    notes = write_report([folder, plant(tmp_path / "b")] if several else [folder], tmp_path / "x.html")
    assert "<script>4" in notes[0]
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and not [image for image in page.all("img") if "onerror" in image]
    assert text.count("<script>") == text.count("</script>") == 1
    assert html.escape(EVIL, quote=False)[:30] in text
    for i in range(1, 5):
        assert f"<script>{i}" in page.text, i


def test_several_runs_side_by_side(tmp_path, runs):
    assert write_report(runs, tmp_path / "both.html") == []
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert len(page.all("input")) == 2 and "1: first" in page.text and "2: second" in page.text
    (loss,) = (svg["aria-label"] for svg in page.all("svg") if svg["aria-label"].startswith("Loss "))
    assert "different data" not in page.text
    assert "run 1: 0.5 after epoch 1" in loss and "run 2: 0.5 after epoch 1" in loss and "after epoch 3" in loss
    differing = [attributes for attributes in page.all("tr") if attributes.get("class") == "differs"]
    assert 2 <= len(differing) < 6  # epochs, seed, and what follows from the epochs


def test_the_result_comes_first_and_diagnostics_are_folded(page):
    titles = [h2.strip() for h2 in page.words if h2.strip() in ORDER]
    assert titles == ORDER
    assert ["open" in details for details in page.all("details")] == [False] * 3


ORDER = ["Result", "Frozen features against baselines", "Predictions", "Curves", "Nearest neighbours", "Next steps"]
ORDER += ["Latest numbers", "More curves", "Feature collapse", "Model and training", "Numbers"]


def test_runs_on_different_data_are_marked(tmp_path, no_charts):
    plant(tmp_path / "a", 1, full=False, evil="cells"), plant(tmp_path / "b", 1, full=False, evil="tissue")
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "x.html")
    text = Page((tmp_path / "x.html").read_text()).text
    assert "1: a, on /data/cells" in text and "2: b, on /data/tissue" in text and "have different data" in text


UP, SAME = "+6.0 (+1.0 to +9.0): above", "+6.0 (-1.0 to +9.0): no difference shown"


@pytest.mark.parametrize(
    ("loss", "knn", "against", "good", "text"),
    [
        (0.3, None, {}, None, "The loss went from 1.000 to 0.300 in 2 epochs, which does not show how good"),
        (0.97, None, {}, False, "The encoder has learned little. The loss is still 0.970, where predicting the mean"),
        (0.3, 80, {"knn": UP, "ridge": UP}, True, "The encoder learned: kNN 80.0 % and ridge 80.0 % are above all"),
        (0.97, 80, {"knn": UP, "ridge": UP}, False, "are above all baselines. The loss is still 0.970"),
        (0.3, 80, {"knn": UP, "ridge": SAME}, False, "ahead of all baselines in one measure of two: kNN 80.0 % and"),
        (0.3, 80, {"knn": SAME, "ridge": SAME}, False, "not shown that the encoder learned: kNN 80.0 % (not above ra"),
        (0.3, 80, {}, True, "The encoder learned"),  # by the numbers
        (0.3, 60, {}, False, "kNN 60.0 % (not above random weights 70.0 %)"),
    ],
)
def test_verdicts(tmp_path, loss, knn, against, good, text):
    run = RunRecord(tmp_path, "r", {"norm_pix_loss": True}, warnings=["no good"])
    run.rows = {0: {"train_loss": 1.0}, 1: {"train_loss": loss} | ({"eval_knn": knn, "eval_ridge": knn} if knn else {})}
    run.probe = {"baselines": {"random": {"knn": 70.0, "ridge": 70.0}}}
    run.probe["latest"] = {"epoch": 2, "against": {"random": against}}
    found = verdict(run)
    assert text in found.text and found.good is good and found.text.endswith("\nwarning: no good")


def test_verdict_of_one_epoch(tmp_path):
    run = RunRecord(tmp_path, "r", {"norm_pix_loss": True})
    run.rows = {0: {"train_loss": 0.3}}
    assert verdict(run).text.startswith("The loss is 0.300 after 1 epoch, which does not show")


def test_axes_begin_where_they_should():
    chart = line_chart("x", [Line({1: 0.1})], {}, "", top=0.5)
    assert ">0.5</text>" in chart and ">0.0</text>" in chart
    assert re.findall(r">(\d+)</text>", chart) == ["1"]  # of the epochs
    nearly = line_chart("x", [Line({1: 0.99476, 2: 0.99468})], {}, "")
    assert max(map(len, re.findall(r">([\d.]+)</text>", nearly))) <= len("0.9975")  # as much as fits
    assert ">1.0</text>" in line_chart("x", [Line({1: 0.0, 2: 0.0})], {"a": 0.0}, "")


def test_labels_of_baselines_do_not_overlap():
    chart = line_chart("x", [Line({1: 10, 2: 20})], {"a": 11.1, "d": 18.0, "b": 11.0, "c": 11.2}, "")
    assert [text for text in re.findall(r">([a-d, ]+)</text>", chart)] == ["b, a,", "c", "d"]


def test_same_name_in_two_places(tmp_path, no_charts):
    for name in "ab":
        plant(tmp_path / name / "run", 1, full=False)
    write_report([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "x.html")
    text = Page((tmp_path / "x.html").read_text()).text
    assert f"1: {tmp_path / 'a/run'}" in text and f"2: {tmp_path / 'b/run'}" in text


def test_a_run_without_measures(tmp_path, runs):
    assert write_report([runs[1]], tmp_path / "x.html") == []
    page = Page((tmp_path / "x.html").read_text())
    assert "collapse" not in page.text and "kNN" not in page.text and "neighbours" not in page.text
    assert len(page.all("svg")) == 4 and len(page.all("img")) == 3


def test_long_runs_stay_small(tmp_path):
    folder = plant(tmp_path / "long", 1, full=False)
    draw(folder / "more", range(2, 101))
    for path in (folder / "more").iterdir():
        path.rename(folder / "reconstructions" / path.name)
    table(folder / "summary.csv", [{"epoch": e, "train_loss": 1 / (e + 1), "lr": 0.1} for e in range(800)])
    write_report([folder], folder / "report.html")
    page = Page((folder / "report.html").read_text())
    epochs = [int(image["data-epoch"]) for image in page.all("img")]
    assert len(epochs) == 20 and epochs[0] == 1 and epochs[-1] == 100 and "20 epochs of 100" in page.text
    assert (folder / "report.html").stat().st_size < 600_000


@pytest.mark.parametrize("count", [1, 2, 5, 20, 21, 100])
def test_spread(count):
    chosen = spread(range(1, count + 1), 20)
    assert len(chosen) == min(count, 20) and chosen[0] == 1 and chosen[-1] == count and chosen == sorted(set(chosen))


def test_gaps_and_one_point():
    text = line_chart("x", [Line({1: 0.5}), Line({2: 0.1, 9: 0.2}, 1, dashed=True)], {"<b>": 0.3}, 'a "<b>"')
    assert "&lt;b&gt;" in text and "<b>" not in text and 'aria-label="a &quot;' in text
    assert "var(--series-1)" in text and "stroke-dasharray" in text


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("chans", [1, 3, 5])
def test_neighbours_are_drawn_in_their_places(tmp_path, chans):
    levels = torch.linspace(0, 1, 7)
    images = levels.view(7, 1, 1, 1).expand(7, chans, 4, 4) * 0.01 + 0.02  # dark ones
    rows = [(0, [1, 2, 3, 4, 5]), (6, [5, 4, 3, 2, 1])]
    save_neighbours(tmp_path / "x.png", images, rows, "a $title")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("L"), float) / 255
    height, width = pixels.shape
    for row, (query, near) in enumerate(rows):
        line = pixels[round(height * (0.32 + 0.45 * row))]
        seen = [line[round(width * (i + 0.5) / 6)] for i in range(6)]
        np.testing.assert_allclose(seen, levels[[query, *near]], atol=0.01)
    with pytest.raises(ValueError, match="neighbours is empty"):
        save_neighbours(tmp_path / "x.png", images, [])


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("command", "seen"), [("a b\n'c'", "a b\n'c'"), ("\u2028ü\x07\udcff", "\u2028ü\x07\udcff"), ("", "")]
)
def test_the_command_is_read_as_it_was(tmp_path, command, seen):
    folder = plant(tmp_path / "r", 1, full=False)
    rest = (folder / "args.yaml").read_text().split("\n", 2)[2]
    (folder / "args.yaml").write_text(head_comment("v 1", command, ["it is\nslow"]) + rest)
    run = read_run(folder)
    assert run.warnings == ["it is slow"]
    assert run.command == seen and run.versions == "v 1" and run.settings["epochs"] == 1


def test_command(tmp_path, capsys, monkeypatch, no_charts):
    folder, other = plant(tmp_path / "a", 1, full=False), plant(tmp_path / "b", 2)
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder / 'report.html'}: ") and not err
    monkeypatch.chdir(tmp_path)
    assert main(["a", "b"]) == 0 and main(["b", "a"]) == 0  # it replaces a report
    assert "b and a" in Page((tmp_path / "report.html").read_text()).text
    assert main([str(other), "--output", "one.html"]) == 0 and (tmp_path / "one.html").stat().st_size > 5_000


def cut_summary(folder, more=""):
    """Leaves only the head of the table."""
    path = folder / "summary.csv"
    path.write_text(path.read_text().splitlines(keepends=True)[0] + more)


# what is done to the folder, the path that is given, and what the message must hold
BAD = {
    "nothing there": (None, "../none", "none"),
    "a file": (None, "summary.csv", "is a file"),
    "no run": (None, "..", "args.yaml. Runs below it: r."),
    "another program": (lambda r: (r / "args.yaml").write_text("model: resnet50\nepochs: 3\n"), ".", "mask_ratio"),
    "torn args": (lambda r: (r / "args.yaml").write_text("model: [\n"), ".", "args.yaml"),
    "no summary": (lambda r: (r / "summary.csv").unlink(), ".", "summary.csv"),
    "empty summary": (cut_summary, ".", "summary.csv"),
    "torn summary": (lambda r: cut_summary(r, "0,0."), ".", "summary.csv: 1 corrupt line is left out"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_one_message(tmp_path, capsys, what, no_charts):
    folder = plant(tmp_path / "r", 1, full=False)
    damage, path, words = BAD[what]
    if damage:
        damage(folder)
    assert main([os.path.normpath(folder / path), "--output", str(tmp_path / "x.html")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("timm-convnextv2 report: error: ") and words in err and err.count("error:") == 1
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.csv", None, "summary.csv: 1 corrupt line is left out"),
        ("collapse.csv", None, "collapse.csv: 1 corrupt line is left out"),
        ("probe.json", b"{", "probe.json cannot be read"),
        ("probe.json", b"[1]", "probe.json does not hold a probe"),
        ("last.pth.tar", b"PK\x03\x04torn", "last.pth.tar cannot be read"),
        ("reconstructions/epoch-0001.png", b"torn", "reconstructions/epoch-0001.png cannot be read"),
        ("neighbours/epoch-0002.png", b"\x89PNG\r\n\x1a\n", "neighbours/epoch-0002.png cannot be read"),
    ],
)
def test_what_is_damaged_is_left_out_and_told(tmp_path, capsys, name, content, words, no_charts):
    folder = plant(tmp_path / "r", 2)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"{folder}: ") and words in err and "report.html" in out
    assert words in Page((folder / "report.html").read_text()).text


def test_refusals_of_the_command(tmp_path, capsys, no_charts):
    folder = plant(tmp_path / "r", 1, full=False)
    (tmp_path / "mine.html").write_text("<p>my own page")
    for words, message in (
        ([str(folder), "--output", str(tmp_path / "mine.html")], "mine.html' exists"),
        ([str(folder), "--output", str(tmp_path)], "is a folder"),
        ([str(folder), f"{folder}/."], "is named twice"),
        ([str(folder), "--output", str(tmp_path / "mine.html" / "x.html")], "cannot be written"),
        ([], "the following arguments are required: RUN"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>my own page"
