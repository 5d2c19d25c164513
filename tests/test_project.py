"""The project's own promises: README, docs, CI and style."""

import csv
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import timm_convnextv2
from timm_convnextv2.commands.main import NAMES, main
from timm_convnextv2.console import CommandParser
from timm_convnextv2.registry import VARIANTS
from tools import mutate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("\n## ")[0]
PAGES = {
    p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
    for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
}
FOREIGN_OPTIONS = {
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"),  # torchrun's
    *("--signal", "--nodes", "--gpus-per-node", "--cpus-per-task", "--time"),  # SLURM's
    *("--shutdown-timeout", "--max-restarts"),  # torchrun's
    *("--no-binary", "--no-deps", "--no-build-isolation", "--cpu", "--blas", "--force"),  # pip's, MinkowskiEngine's
    # timm's train.py, validate.py and inference.py
    *("--num-classes", "--device-modules", "--warmup-prefix", "--crop-mode", "--include-index", "--results-file"),
    *("--label-type", "--pretrained-path", "--mixup-mode"),
}
COLUMNS = {"atto:16": "atto, batch 16", "tiny:8": "tiny, batch 8"}


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_clean(arguments):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed: pip install -e '.[test]'")
    run = subprocess.run([ruff, *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_ci_calls_the_readme_command():
    command = (ROOT / ".ci/run").read_text().strip().splitlines()[-1]
    assert command.endswith("-m pytest")
    assert command in README.splitlines()


def test_workflow_calls_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert {"run": "bash .ci/run"} in workflow["jobs"]["test"]["steps"]


def test_bug_template_asks_for_versions_and_explain():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    asked = {field["id"]: field for field in form["body"]}
    assert all(asked[name]["validations"]["required"] for name in ("what", "versions", "explain"))
    assert "explain(" in asked["explain"]["attributes"]["description"]


# ------------------------------------------------------------------------------------------------------- README, docs


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[page]):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links to {path}, which does not exist"
        if anchor:
            known = anchors(target.read_text(encoding="utf-8"))
            assert anchor in known, f"{page} links to {path}#{anchor}; {path} has {sorted(known)}"


def test_every_page_can_be_reached_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, f"README does not link to {page}"


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_options_exist(page):
    folders = ("timm_convnextv2", "train_scripts", "benchmarks", "examples")
    code = "".join(p.read_text(encoding="utf-8") for folder in folders for p in (ROOT / folder).rglob("*.py"))
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES[page])) - FOREIGN_OPTIONS:
        # an option is a field of a config class (`--no-x` of x), or a word of a parser
        name = option.removeprefix("--no-").removeprefix("--").replace("-", "_")
        field = rf"^    {name}: .* = (\w+\.)?option\("
        assert f'"{option}"' in code or re.search(field, code, re.M), f"{page} names {option}, no command has it"


class Parsed(BaseException):
    """The words of a command are parsed; words that no option of it takes."""


def commands_of(text: str) -> list[list[str]]:
    """The words after `timm-convnextv2`, or after `-m timm_convnextv2`, of a page's shell blocks and inline code."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)).replace("\\\n", "")
    inline = re.findall(r"(?<!`)`(timm-convnextv2 [^`]+)`", text)
    lines = [shlex.split(line.partition(" | ")[0], comments=True) for line in (*blocks.splitlines(), *inline)]
    places = [(line, i) for line in lines for i, word in enumerate(line) if re.fullmatch("timm[-_]convnextv2", word)]
    return [line[i + 1 :] for line, i in places if line[i + 1 :] and not line[i + 1].startswith("-")]


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_commands_parse(page, monkeypatch, capsys):
    def parse(self, *args, **kwargs):
        raise Parsed(*real(self, *args, **kwargs)[1])

    real = CommandParser.parse_known_args
    monkeypatch.setattr(CommandParser, "parse_known_args", parse)
    for words in commands_of(PAGES[page]):
        assert words[0] in {*NAMES, "COMMAND"}, words
        if words[0] == "COMMAND" or words[1:] in ([], ["..."]):
            continue
        with pytest.raises(Parsed) as parsed:
            main(words)
        foreign = words[0] in ("compare", "finetune", "predict", "validate")  # options of timm's scripts
        assert foreign or not parsed.value.args, (words, capsys.readouterr().err)


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_recipes_exist(page):
    known = {p.stem for p in (ROOT / "timm_convnextv2").glob("*/recipes/**/*.yaml")}
    for name in re.findall(r"--recipe ([\w-]+)", PAGES[page]):
        assert name in known, f"{page} names the recipe {name}; there are {sorted(known)}"


def test_readme_is_short():
    assert len(README.splitlines()) <= 170
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert images
    for path in images:
        with Image.open(ROOT / path) as image:
            assert image.height <= 500, f"{path} is {image.height} px high"


def test_the_features_of_docs_python_run():
    text = PAGES["docs/python.md"].partition("## Features of any model")[2]
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)[0].replace("cuda:0", "cpu")
    scope: dict = dict(model=timm.create_model("test_resnet"), batches=[torch.rand(8, 3, 32, 32)] * 2)
    scope |= dict(labels=torch.arange(16) % 10, test_rows=torch.rand(20, 800), test_labels=torch.arange(20) % 10)
    exec(compile(code.replace(', "cuda:1"', ""), "docs/python.md", "exec"), scope)
    assert scope["rows"].shape == (16, 800)


def test_the_models_of_docs_python_run(tmp_path, monkeypatch):
    """With a smaller model and batch; `test_api` runs the lines above them."""
    code = re.findall(r"^```python\n(.*?)^```", PAGES["docs/python.md"], flags=re.M | re.S)[1]
    code = code.replace("_tiny", "_atto").replace("(8,", "(1,")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "docs/python.md", "exec"), scope)
    assert scope["model"].encoder.stem[0].weight.grad.abs().sum() > 0
    again = timm.create_model("local-dir:folder", pretrained=True, num_classes=10)
    torch.testing.assert_close(again.stem[0].weight, scope["model"].encoder.stem[0].weight)


def test_private_names_of_timm_are_told():
    """`docs/python.md` names each import from timm's private modules, which is in one file only."""
    files: dict[str, set[str]] = {}
    for path in (ROOT / "timm_convnextv2").rglob("*.py"):
        for module, names in re.findall(
            r"from (timm(?:\.\w+)*\._\w+) import ([^\n(]+)", path.read_text(encoding="utf-8")
        ):
            for name in names.split(", "):
                files.setdefault(f"{module}.{name}", set()).add(path.name)
    assert files
    for name, where in files.items():
        assert len(where) == 1, f"{name} is used in {sorted(where)}"
        assert f"`{name}`" in PAGES["docs/python.md"], f"docs/python.md does not tell that {where} uses {name}"


# ------------------------------------------------------------------------------------------------------------ figures


def results(name: str) -> list[dict[str, str]]:
    """Rows of a file of benchmarks/results."""
    lines = (ROOT / "benchmarks/results" / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def table_rows(text: str, header: list[str]) -> dict[str, dict[str, str]]:
    """A Markdown table with this header, by the first cell of its rows; each row by column."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        for line in text.splitlines()
    ]
    start = next((i for i, row in enumerate(cells) if row[1:] == header), None)
    assert start is not None, f"there is no table with the columns {header}"
    rows = {}
    for first, *rest in itertools.takewhile(bool, cells[start + 2 :]):
        rows[first] = dict(zip(header, rest, strict=True))
    return rows


def step_result(case: str, measure: str) -> dict[str, str]:
    """The row of a case whose measure starts so, from the CPU result of the training step."""
    rows = [
        r for r in results("pretrain_step_cpu_float32.csv") if r["case"] == case and r["measure"].startswith(measure)
    ]
    assert len(rows) == 1, f"{len(rows)} rows of {case} start with '{measure}'"
    return rows[0]


def spread(row: dict[str, str]) -> str:
    """'median (min to max)', or the median alone where all rounds agree."""
    return row["ratio"] if row["min"] == row["max"] else f"{row['ratio']} ({row['min']} to {row['max']})"


@pytest.mark.parametrize("case", COLUMNS)
def test_first_screen_quotes_the_result(case):
    assert "pip install timm_convnextv2" in FIRST_SCREEN
    rows = table_rows(FIRST_SCREEN, list(COLUMNS.values()))
    said = {name.partition(":")[0]: cells[COLUMNS[case]] for name, cells in rows.items()}
    assert said["times faster than dense with masks"] == spread(step_result(case, "dense-with-masks"))
    assert said["times faster than a supervised step of stock timm"] == spread(step_result(case, "supervised stock"))
    (official,) = (
        row for row in results("official_cpu_float32.csv")
        if row["case"] == case and row["candidate"] == "official on MinkowskiEngine"
    )  # fmt: skip
    ratio = f"{official['time / ours']} ({official['min']} to {official['max']})"
    assert said["times faster than the official code on MinkowskiEngine"] == ratio
    memory = float(step_result(case, "peak memory of the step")["ratio"])
    assert said["peak memory relative to dense with masks"] == f"{100 * memory:.0f} %"


@pytest.mark.parametrize("case", COLUMNS)
def test_performance_page_quotes_the_step(case):
    rows = table_rows(PAGES["docs/performance.md"], list(COLUMNS.values()))
    measures = {
        "dense with masks (the plain reference) / ours, time": "dense-with-masks",
        "supervised step of stock timm's encoder / ours, time": "supervised stock",
        "ours at mask ratio 0.9 / at 0.6, time": "our step at mask ratio",
        "ours in float32 / in bfloat16, time": "our step in float32",
        "dense training step, stock timm / `ConvNeXtV2`, time": "dense training",
        "ours / dense with masks, peak memory of the step": "peak memory of the step",
        "ours / stock timm, kept for the backward of dense training": "saved by dense training",
    }
    assert set(rows) == set(measures)
    for name, measure in measures.items():
        assert rows[name][COLUMNS[case]] == spread(step_result(case, measure)), name


def test_performance_page_quotes_slow_bfloat16():
    times = [1 / float(step_result(case, "our step in float32")["ratio"]) for case in ("atto:4", "tiny:2")]
    quoted = f"{times[0]:.0f} to {times[1]:.0f} times as long"
    assert quoted in PAGES["docs/performance.md"] and quoted in " ".join(PAGES["CHANGELOG.md"].split())


def test_performance_page_quotes_the_compiled_step():
    rows = {(r["case"], r["measure"]): r for r in results("pretrain_step_cpu_float32_compiled.csv")}
    page = " ".join(PAGES["docs/performance.md"].split())
    for measure in ("dense-with-masks reference compiled / our step", "dense training, stock timm compiled / ours"):
        atto, tiny = (spread(rows[case, measure]) for case in COLUMNS)
        assert f"{atto} and {tiny} times our" in page
    first = [rows[case, "dense-with-masks reference / our step"]["ratio"] for case in COLUMNS]
    assert f"the first row was {' and '.join(first)}" in page


def test_performance_page_quotes_inference():
    measured = results("inference_cpu_float32.csv")
    assert {r["size"] for r in measured if r["batch"] == "1"} == set(VARIANTS)
    spans = []
    for batch in ("1", "32"):
        ratios = [float(r["stock / ours"]) for r in measured if r["batch"] == batch]
        spans.append(f"{min(ratios):.2f} to {max(ratios):.2f} at batch {batch}")
    assert ", ".join(spans) in PAGES["docs/performance.md"]


def test_performance_page_quotes_the_official_code():
    measured = results("official_cpu_float32.csv")
    cases = {r["case"] for r in measured}
    columns = {f"{name}: time / ours": case for case, name in COLUMNS.items() if case in cases}
    rows = table_rows(PAGES["docs/performance.md"], list(columns))
    assert set(rows) == {r["candidate"] for r in measured if not r["cannot run"]}
    for row in measured:
        if not row["cannot run"]:
            (column,) = (name for name, case in columns.items() if case == row["case"])
            said = f"{row['time / ours']} ({row['min']} to {row['max']}), {row['peak MiB']} MiB"
            assert rows[row["candidate"]][column] == said, row


def test_performance_page_quotes_the_prediction():
    predicted = json.loads((ROOT / "benchmarks/results/roofline.json").read_text())["predicted"]
    columns = {f"{name.split(', ')[1]}, batch {row['batch']}": name.split(", ")[1] for name, row in predicted.items()}
    rows = table_rows(PAGES["docs/performance.md"], list(columns))
    assert len(rows) == 2 * 3
    for name, cells in rows.items():
        gpu, _, what = name.partition(": ")
        gpu = {"H100": "H100 SXM", "A100": "A100 SXM 80 GB"}[gpu]
        what = "images/s" if what.startswith("images/s") else what.removesuffix(", time")
        assert cells == {column: str(predicted[f"{gpu}, {size}"][what]) for column, size in columns.items()}, name


def test_triton_kernels_spill_nothing():
    """As docs/performance.md says; each loads 16 bytes at once, which is the most that a load can."""
    rows = results("triton_kernels.csv")
    assert {r["channels"] for r in rows} == {"40", "384", "2816"}
    assert {r["architecture"] for r in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {r["spilled bytes"] for r in rows} == {"0"}
    assert all(r["bytes x loads"].startswith("16x") for r in rows)


def test_pages_stay_short():
    """At most 15,000 words without the references: what reads longer is not read."""
    guides = {name: text for name, text in PAGES.items() if name == "README.md" or name.startswith("docs/")}
    words = {name: len(text.split()) for name, text in guides.items()}
    assert sum(words.values()) - words["docs/python.md"] - words["docs/images.md"] <= 15_000, words


def test_pages_quote_the_first_command():
    rows = results("probe_curve.csv")
    last = {(r["seed"], r["start"]): r for r in rows}  # the last epoch of each
    seeds = sorted({r["seed"] for r in rows})
    table = table_rows(PAGES["docs/evaluation.md"], ["kNN, %", "ridge, %"])
    for cells, start in zip(table.values(), dict.fromkeys(["pretrained", *(r["start"] for r in rows)]), strict=True):
        for cell, name in zip(cells.values(), ("knn", "ridge"), strict=True):
            assert cell == ", ".join(f"{float(last[seed, start][name]):.1f}" for seed in seeds), (start, name)


def test_pretraining_page_quotes_channel_dropout():
    rows = table_rows(PAGES["docs/pretraining.md"], ["without dropout", "`--channel-dropout 0.3`"])
    columns = ("all", "queries_lack_half", "both_lack_half")
    for cells, column in zip(rows.values(), columns, strict=True):
        for cell, rate in zip(cells.values(), ("0.0", "0.3"), strict=True):
            own = [r[column] for r in results("channel_dropout.csv") if r["channel_dropout"] == rate]
            assert cell == ", ".join(own), column


def test_pretraining_page_quotes_the_settings_of_small_images():
    rows = results("pretrain_settings.csv")
    text = PAGES["docs/pretraining.md"].partition("### Settings for small images")[2]
    table = table_rows(text, ["kNN, %", "ridge, %"])
    expected = [(r["setting"], r["eval_knn"], r["eval_ridge"]) for r in rows]
    expected.append(("random weights", rows[0]["random_knn"], rows[0]["random_ridge"]))
    assert [(name, *cells.values()) for name, cells in table.items()] == [
        (name, f"{float(knn):.1f}", f"{float(ridge):.1f}") for name, knn, ridge in expected
    ]


def test_data_page_quotes_the_index():
    opened = results("file_index.csv")[0]
    text = " ".join(PAGES["docs/data.md"].split())
    said = re.search(r"index of 200,000 files takes ([\d.]+) ms, (\d+) times less than listing", text)
    assert float(said[1]) == pytest.approx(1000 * float(opened["seconds"]), rel=0.02)
    assert float(said[2]) == float(opened["ratio"])


def test_variant_table_is_true():
    pattern = r"^\| `?(\w+)`? \| ([\d, ]+) \| ([\d, ]+) \| ([\d.]+) M \|"
    rows = re.findall(pattern, PAGES["docs/python.md"], flags=re.M)
    assert {row[0] for row in rows} == set(VARIANTS)
    for name, depths, dims, params in rows:
        numbers = [tuple(int(n) for n in text.split(",")) for text in (depths, dims)]
        assert numbers == [VARIANTS[name]["depths"], VARIANTS[name]["dims"]]
        model = timm.create_model(f"convnextv2_{name}", device="meta")
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == params


def test_version_and_licence():
    assert re.fullmatch(r"\d+\.\d+\.\d+", timm_convnextv2.__version__)
    assert f"## {timm_convnextv2.__version__}" in PAGES["CHANGELOG.md"]
    assert f"version = {{{timm_convnextv2.__version__}}}" in README
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "CC-BY-NC 4.0" in licence
    assert (ROOT / "timm_convnextv2/py.typed").exists()


def test_mutations_fit_the_code():
    for mutation in mutate.load():  # refuses a text that is gone
        assert all((ROOT / path).is_file() for path in mutation["tests"].split()), mutation["name"]
