"""The wheel, in an environment and a folder of its own: whoever runs `pip install` has the commands and the recipes."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers import RECIPES, ROOT

for package in ("build", "setuptools"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed: pip install -e '.[test]'", allow_module_level=True)

# Several commands in one process: what takes long is to import torch.
COMMANDS = """
import sys
from pathlib import Path
import timm_convnextv2
from timm_convnextv2.commands.main import main

installed = Path(sys.prefix).resolve()
assert installed in Path(timm_convnextv2.__file__).resolve().parents, timm_convnextv2.__file__
sys.argv[0] = str(installed / "bin" / "timm-convnextv2")
for words in (
    sys.argv[1:],
    ["finetune", "--list-recipes"],
    ["report", "runs/first", "--output", "report.html"],
    ["publish", "runs/first", "USER/NAME", "--license", "mit", "--dry-run"],
    ["embed", "--model", "local-dir:runs/first/encoder", "--dataset", "demo", "--num-images", "9",
     "--output", "rows.npy", "--workers", "0", "--device", "cpu"],
):
    assert main(words) == 0, words
"""


def run(*command, cwd, timeout=120):
    """Without what the tests' own process adds to the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the commands of a fresh environment with the wheel; other packages are those of this one."""
    pytest.importorskip("pip", reason="pip is not installed here")  # as in an environment of uv
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # building leaves folders behind
    shutil.copytree(ROOT / "timm_convnextv2", source / "timm_convnextv2", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", root, source, cwd=root)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", symlinks=True)
    scripts = root / "venv" / "bin"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(scripts / "python", "-c", ask, cwd=root).strip())
    # a line of a .pth is a path to search after the environment's own; .pth files in it, of the clone, are not read
    (packages / "others.pth").write_text(
        "".join(f"{path}\n" for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    install = ("install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", scripts / "python", *install, cwd=root)
    return scripts


def test_the_commands_work_without_a_clone(installed, tmp_path):
    """From pretraining to a dry run of publishing, in an empty folder."""
    assert run(installed / "timm-convnextv2", "--version", cwd=tmp_path).strip()
    options = "--epochs 1 --num-images 8 --batch-size 4 --img-size 32 --patch-size 1 --decoder-dim 8".split()
    options += ["--workers", "0", "--device", "cpu", "--output", "runs", "--experiment", "first"]
    words = ["pretrain", "--model", "fcmae_convnextv2_atto", *options]
    out = run(installed / "python", "-c", COMMANDS, *words, cwd=tmp_path)
    assert "timm-convnextv2 publish" in out and "train_scripts" not in out  # the next steps are ones that exist here
    assert (tmp_path / "runs" / "first" / "encoder" / "model.safetensors").is_file()
    assert all(path.stem in out for path in RECIPES.glob("*.yaml"))
    assert "Dry run, nothing was sent." in out and "rows.npy: 9 rows; 0 images skipped" in out
    card = (tmp_path / "runs" / "first-publish" / "README.md").read_text()
    assert '"hf-hub:USER/NAME"' in card and "train_scripts" not in card
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "rows.npy").stat().st_size > 9 * 320 * 4
