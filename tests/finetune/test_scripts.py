"""Finding, checking and importing timm's scripts."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_convnextv2.commands import predict
from timm_convnextv2.commands.finetune import main
from timm_convnextv2.finetune.scripts import find_script, kept_script


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The clone that timm lies in, without scripts; there is no TIMM_TRAIN, and the cache is empty."""
    monkeypatch.delenv("TIMM_TRAIN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "clone" / "timm").mkdir(parents=True)
    monkeypatch.setattr(timm, "__file__", str(tmp_path / "clone" / "timm" / "__init__.py"))
    return tmp_path / "clone"


def test_order_in_which_train_script_is_searched(clone, tmp_path, monkeypatch, stand_in):
    (clone / "train.py").write_text("print('of another project')\n")
    with pytest.raises(ValueError, match="not part of timm's package"):
        find_script("train.py")
    (clone / "train.py").write_text(stand_in)
    assert find_script("train.py") == clone / "train.py"
    for name in ("variable", "option"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(stand_in)
    monkeypatch.setenv("TIMM_TRAIN", str(tmp_path / "variable" / "mine.py"))
    assert find_script("train.py") == tmp_path / "variable" / "mine.py"
    assert find_script("train.py", str(clone)) == clone / "train.py"
    assert find_script("train.py", str(tmp_path / "option" / "mine.py")) == tmp_path / "option" / "mine.py"


@pytest.mark.parametrize("name", ["train.py", "validate.py", "inference.py"])
def test_missing_script_is_an_error_with_all_ways_to_get_it(clone, name, stand_in):
    with pytest.raises(ValueError) as e:
        find_script(name)
    message = str(e.value)
    assert f"v{timm.__version__}/{name}" in message
    words = shlex.split(message.splitlines()[1])  # the line to paste
    assert words[:3] == ["curl", "-fL", "--create-dirs"] and words[3] == "-o"
    assert all(way in message for way in ("--timm-train", "TIMM_TRAIN=", "pip install -e"))
    Path(words[4]).parent.mkdir(parents=True)
    Path(words[4]).write_text(stand_in.replace("def main", "create_loader = None\n\n\ndef main", 1))
    assert find_script(name) == Path(words[4])


@pytest.mark.parametrize("fetched", [True, False])
def test_next_command_names_the_script_only_if_it_is_not_found_alone(command, train, clone, capsys, fetched):
    if fetched:
        kept_script("train.py").parent.mkdir(parents=True)
        shutil.copy(train, kept_script("train.py"))
    assert main(command(*([] if fetched else ["--timm-train", str(train)]))) == 0
    assert ("--timm-train timm/train.py" in capsys.readouterr().out.splitlines()[-2]) == (not fetched)


@pytest.mark.parametrize("kind", ["--timm-train", "TIMM_TRAIN"])
def test_path_that_is_not_there(refused, monkeypatch, tmp_path, kind):
    path = tmp_path / "nowhere.py"
    if kind == "TIMM_TRAIN":
        monkeypatch.setenv(kind, str(path))
    message = refused(*([kind, str(path)] if kind == "--timm-train" else []))
    assert f"{kind} is {path}" in message and f"v{timm.__version__}/train.py" in message
    assert f"curl -fL --create-dirs -o {path} " in message


def test_other_scripts_are_found_beside_train_script(train, tmp_path, capsys):
    assert predict.main(["x", "--data-dir", "y"]) == 2
    message = capsys.readouterr().err
    assert "there is no inference.py there" in message and f"v{timm.__version__}/inference.py" in message
    (train.parent / "inference.py").write_text("x = 1\n")
    assert predict.main(["x", "--data-dir", "y"]) == 2
    assert "is not timm's inference.py: it has no main" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: "x = 1\n", "it has no main"),
        (lambda s: s[: s.index("dataset=")], "is not Python"),
        (lambda s: s.partition("\n\nif __name__")[0], "its end is missing"),
        (lambda s: s.replace("import yaml", "from timm.task import NoSuchTask"), "does not fit the installed timm"),
        (lambda s: s.replace("import yaml", "import no_such_package"), "pip install no_such_package"),
        (lambda s: s.replace('"--device-modules"', '"--other-modules"'), "too old"),
        (lambda s: s.replace(" smoothing=0.1,", ""), "'smoothing'"),
    ],
)
def test_script_that_cannot_be_used(refused, train, stand_in, change, words):
    train.write_text(change(stand_in))
    message = refused()
    assert words in message and (str(train) in message or "pip install" in words)


@pytest.mark.parametrize("version", ["0.0.1", timm.__version__])
def test_version_of_the_script(run, train, capsys, version):
    (train.parent / "timm").mkdir()
    (train.parent / "timm" / "version.py").write_text(f"__version__ = '{version}'\n")
    run()
    out, err = capsys.readouterr()
    assert f"timm {version}" in out
    assert ("is of timm 0.0.1" in err) == (version == "0.0.1")


def test_processes_on_cpu(command, train, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command("--dry-run")) == 0
    task = sys.modules["timm_train_script"].ClassificationTask()
    found = task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=False)
    assert found == (None, dict(broadcast_buffers=False))
    train.write_text(stand_in.replace("class ClassificationTask", "class Other"))
    assert main(command("--dry-run")) == 2
    assert "several processes on CPU" in capsys.readouterr().err
