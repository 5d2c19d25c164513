"""The project's own promises: README, CI and style."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

import timm_convnextv2
from timm_convnextv2.models.registry import VARIANTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert command in README


def test_workflow_calls_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert {"run": "bash .ci/run"} in workflow["jobs"]["test"]["steps"]


def test_readme_names_what_there_is():
    for path in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", README) + re.findall(r'src="(?!http)([^"]+)"', README):
        assert (ROOT / path).exists(), f"README links to {path}, which does not exist"
    folders = ("train_scripts", "benchmarks", "examples", "timm_convnextv2/data/embedded")
    scripts = "".join(p.read_text() for folder in folders for p in (ROOT / folder).glob("*.py"))
    foreign = {"--nproc-per-node"}  # torchrun's
    # timm's train.py, validate.py and inference.py
    foreign |= {"--num-classes", "--device-modules", "--aa", "--warmup-prefix", "--crop-mode", "--include-index"}
    foreign |= {"--results-file"}
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - foreign:
        assert f'"{option}"' in scripts, f"README speaks of {option}, no script has it"


def test_variant_table_is_true():
    rows = re.findall(r"^\| `?(\w+)`? \| ([\d, ]+) \| ([\d, ]+) \| ([\d.]+) M \|", README, flags=re.M)
    assert {row[0] for row in rows} == set(VARIANTS)
    for name, depths, dims, params in rows:
        numbers = [tuple(int(n) for n in text.split(",")) for text in (depths, dims)]
        assert numbers == [VARIANTS[name]["depths"], VARIANTS[name]["dims"]]
        model = timm.create_model(f"convnextv2_{name}", device="meta")
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == params


def test_version_and_licence():
    assert re.fullmatch(r"\d+\.\d+\.\d+", timm_convnextv2.__version__)
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "CC-BY-NC 4.0" in licence
    assert (ROOT / "timm_convnextv2/py.typed").exists()
