"""The console command: its table, help, version, and mistakes."""

import importlib
import runpy
import shlex
import sys
import types

import pytest
from helpers import SCRIPTS

import timm_convnextv2
from timm_convnextv2 import console as command
from timm_convnextv2.commands import main as cli
from timm_convnextv2.commands.table import COMMANDS

NAMES = ("pretrain", "finetune", "validate", "predict", "report", "publish", "export", "compare", "embed")
NAMES += ("evaluate", "collapse", "stats", "check", "detect", "segment", "demo")


def test_help_names_every_command(capsys):
    assert tuple(cli.NAMES) == NAMES
    for option in ("--help", "-h"):
        assert cli.main([option]) == 0
        out, err = capsys.readouterr()
        assert not err and out.startswith("usage: timm-convnextv2 COMMAND")
        assert all(f"\n  {name} " in out for name in NAMES)
    assert cli.main([]) == 2
    assert capsys.readouterr() == ("", out)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"timm-convnextv2 {timm_convnextv2.__version__}\n"


@pytest.mark.parametrize(
    ("word", "near"), [("pretrian", " Did you mean 'pretrain'?"), ("embedd", " Did you mean 'embed'?"), ("x", "")]
)
def test_an_unknown_command_is_one_message(word, near, capsys):
    assert cli.main([word, "--help"]) == 2
    expected = f"timm-convnextv2: error: no command '{word}'.{near} Expected one of {', '.join(NAMES)}; see "
    out, err = capsys.readouterr()
    assert not out and err.startswith(expected) and err.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_command_gets_its_options_and_gives_its_status(name, monkeypatch):
    seen = []
    module = types.ModuleType(f"timm_convnextv2.commands.{name}")
    module.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    words = shlex.split(COMMANDS.get(name, COMMANDS.get(f"{name} train")).example.splitlines()[0])
    words = ["train", *words] if name in cli.GROUPS else words
    assert cli.main([name, *words]) == 3
    monkeypatch.setattr(sys, "argv", ["timm-convnextv2", name, *words])
    assert cli.main() == 3
    assert seen == [words, words]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_there_and_names_itself(name, capsys):
    """By the module that the table names, as the console command; its mistakes are one message."""
    module = importlib.import_module(f"timm_convnextv2.commands.{name}")
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: timm-convnextv2 {name} ")
    assert module.main(["--no-such-option"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"timm-convnextv2 {name}: error: ") and err.count("error:") == 1


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_each_script_is_its_command(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and f" {script.stem} " in capsys.readouterr().out


# --- the commands that are printed


@pytest.fixture
def alone(monkeypatch):
    """No torchrun around, and the console command on the path or not."""
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def called(program, installed):
        monkeypatch.setattr(sys, "argv", [program])
        here = {"python": sys.executable, "timm-convnextv2": "/bin/timm-convnextv2" if installed else None}
        monkeypatch.setattr(command.shutil, "which", here.get)

    return called


@pytest.mark.parametrize(
    ("program", "installed", "expected"),
    [
        (str(SCRIPTS / "pretrain.py"), True, ["python", str(SCRIPTS / "publish.py")]),
        ("env/bin/timm-convnextv2", True, ["timm-convnextv2", "publish"]),
        ("env/bin/timm-convnextv2", False, ["env/bin/timm-convnextv2", "publish"]),
        ("site-packages/timm_convnextv2/__main__.py", True, ["timm-convnextv2", "publish"]),
        ("site-packages/timm_convnextv2/__main__.py", False, ["python", "-m", "timm_convnextv2", "publish"]),
        ("elsewhere/train_scripts/mine.py", False, ["python", "-m", "timm_convnextv2", "publish"]),
    ],
)
def test_a_printed_command_exists_where_the_user_is(program, installed, expected, alone):
    alone(program, installed)
    assert command.invocation("publish") == command.invocation("publish", distributed=True) == expected


def test_a_printed_command_starts_as_many_processes(alone, monkeypatch):
    alone("site-packages/timm_convnextv2/__main__.py", True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    module = ["-m", "timm_convnextv2", "pretrain"]
    assert command.invocation("pretrain", distributed=True) == ["torchrun", "--nproc-per-node", "8", *module]
    assert command.invocation("pretrain") == ["timm-convnextv2", "pretrain"]
    for name, value in (("GROUP_WORLD_SIZE", "4"), ("MASTER_ADDR", "node0"), ("TORCHELASTIC_RUN_ID", "job")):
        monkeypatch.setenv(name, value)
    nodes = "--nnodes 4 --rdzv-backend c10d --rdzv-id job --rdzv-endpoint node0:29500 --nproc-per-node 8".split()
    assert command.invocation("pretrain", distributed=True) == ["torchrun", *nodes, *module]


def test_printed_commands_name_this_interpreter(alone, monkeypatch, tmp_path):
    """Of an environment that is not activated, by its path: `python` would be another one, or none."""
    alone(str(SCRIPTS / "pretrain.py"), False)
    assert command.invocation("publish")[0] == "python"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(command.shutil, "which", {"python": "/usr/bin/python"}.get)
    monkeypatch.chdir(tmp_path)  # from below it too: the printed line is for any folder
    assert command.invocation("publish")[0] == str(tmp_path / ".venv" / "bin" / "python")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "image", "0 images"), (1, "image", "1 image"), (2, "process", "2 processes"), (1, "class", "1 class")],
)
def test_counts_agree_with_their_nouns(number, noun, text):
    assert command.count(number, noun) == text
